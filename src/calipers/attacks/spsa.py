"""Gradient ascent along gradients estimated from scores (SPSA, NES)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from calipers.attacks.engine.query_loop import Memory, PointsInFlight, Queries, run_queries
from calipers.errors import BadInput
from calipers.problem.capabilities import LP, Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_MOMENTUM = 0.75


@dataclass(frozen=True)
class SPSA:
    """Projected ascent along a gradient estimated from scores.

    `directions` "signs" is SPSA (Uesato et al. 2018), "normal" is NES (Ilyas et al. 2018). Each
    step asks about the iterate and `pairs` pairs of opposite probes, and moves along the norm's
    steepest direction of the running mean of the estimates.

    Differs from the papers: steepest ascent with momentum in every norm instead of Adam or sign
    steps; probes are admissible themselves, and count by how far they really moved; any probe that
    is adversarial ends the search.

    Cost: steps x (2 pairs + 1) + 1 forward passes for a point that resists.

    Args:
        steps: Gradient steps.
        pairs: Pairs of opposite probes per step.
        delta: Distance of the probes from the iterate as a share of the radius, above 0 and at most
            1.
        step: Length of a step as a share of the radius, above 0 and at most 2. Default: 2.5 /
            steps.
        directions: Probes with random signs ("signs") or with normal entries ("normal").

    Raises:
        BadInput: A setting is out of its range, or the norm counts features.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "gradients estimated from random probes",
        norms=LP,
        needs="scores",
    )

    steps: int = 40
    pairs: int = 64
    delta: float = 0.1
    step: float | None = None
    directions: Literal["signs", "normal"] = "signs"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.pairs < 1:
            raise BadInput(
                f"SPSA takes steps >= 1 and pairs >= 1 (usually 40 and 64), got {self.steps}, "
                f"{self.pairs}"
            )
        if not 0 < self.delta <= 1 or (self.step is not None and not 0 < self.step <= 2):
            raise BadInput(
                "reach (above 0, at most 1) and step (above 0, at most 2) are shares of the "
                f"radius, got {self.delta}, {self.step}"
            )
        if self.directions not in ("signs", "normal"):
            raise BadInput(f"directions is 'signs' or 'normal', got {self.directions!r}")

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        norm = problem.region.norm
        if norm.is_count:
            raise BadInput(
                f"a small probe has no length in norm {norm.name!r}; take 'linf', 'l2' or 'l1'"
            )
        share = min(2.5 / self.steps if self.step is None else self.step, 2.0)
        return run_queries(
            problem,
            _Estimate(self.steps, self.pairs, self.delta, share, self.directions == "signs"),
            seed=seed,
            batch=batch,
        )


@dataclass(frozen=True)
class _Estimate:
    steps: int
    pairs: int
    reach: float
    share: float
    signs: bool
    labels_only: bool = False

    @property
    def width(self) -> int:
        return 2 * self.pairs + 1

    @property
    def queries(self) -> int:
        return self.steps * self.width + 1

    def start(self, region: Region, streams: Streams) -> Memory:
        return {"x": region.center.clone(), "slope": torch.zeros_like(region.center)}

    def ask(self, look: PointsInFlight, memory: Memory) -> Queries:
        """Ask about the iterate, then the probes.

        The last round asks about the iterate alone.
        """
        x = memory["x"]
        count = torch.where(look.spent >= self.queries - 1, 1, self.width)
        slot = torch.repeat_interleave(torch.arange(len(x), device=x.device), count)
        number = torch.arange(len(slot), device=slot.device) - (count.cumsum(0) - count)[slot]
        probing = torch.nonzero(number > 0).flatten()
        points = x[slot]
        if len(probing):
            place, number = slot[probing], number[probing] - 1
            region = look.region.take(place)
            streams = look.streams.take(place).fork(look.spent[place] + number // 2)
            d = region.low.shape[1]
            draw = (
                torch.where(streams.uniform(d, x.dtype) < 0.5, -1.0, 1.0).to(x.dtype)
                if self.signs
                else streams.normal(d, x.dtype)
            )
            if region.weight is not None:
                draw = draw / region.weight
            size = region.norm.of(draw if region.weight is None else draw * region.weight)
            side = torch.where(number % 2 == 0, 1.0, -1.0).to(x.dtype)
            move = draw * (side * self.reach * region.radius.to(x.dtype) / size)[:, None]
            points = points.index_copy(
                0,
                probing,
                region.snap(region.project(points[probing] + move.view(-1, *x.shape[1:]))),
            )
        return Queries(slot, points)

    def hear(self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor) -> Tensor:
        x, width = memory["x"], self.width
        full = torch.bincount(asked.slot, minlength=len(x)) == width
        rows = torch.nonzero(full[asked.slot]).flatten()
        if len(rows):
            place = torch.nonzero(full).flatten()
            points, values = (
                asked.points[rows].view(len(place), width, *x.shape[1:]),
                answers[rows].view(len(place), width),
            )
            estimate = self._estimate(
                points[:, 1::2] - points[:, 2::2], values[:, 1::2] - values[:, 2::2]
            )
            if look.region.weight is not None:
                # Probes are shorter where weights are larger, and a sum of moves weighed by changes
                # of the margin is the gradient times the squared move; the weight undoes it.
                estimate = estimate * look.region.weight.square()
            slope = _MOMENTUM * memory["slope"][place] + (1 - _MOMENTUM) * estimate.view_as(
                x[place]
            )
            region = look.region.take(place)
            moved = region.snap(region.project(region.step(x[place], -slope, self.share)))
            memory["slope"] = memory["slope"].index_copy(0, place, slope)
            memory["x"] = x.index_copy(0, place, moved)
        return look.spent >= self.queries

    def _estimate(self, moves: Tensor, falls: Tensor) -> Tensor:
        """Return the estimated gradients (B, d), each of largest entry 1.

        Each is the sum of the moves weighed by how much the margin changed along them.
        """
        weight = falls.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        weight = (
            weight / weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        ).to(moves.dtype)
        total = torch.zeros_like(moves[:, 0].flatten(1))
        # in order, so that the sum of a point does not depend on its neighbours in the batch
        for k in range(self.pairs):
            total = total + weight[:, k, None] * moves[:, k].flatten(1)
        return total / total.abs().amax(1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
