"""The attack of Carlini and Wagner: distance against margin, for l2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.minimum_norm import FromTheCentre, check_between, seek, slope, widths
from calipers.attacks.engine.queue import Look, Memory
from calipers.attacks.engine.targets import target_count
from calipers.problem.capabilities import Capabilities, check_fit
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.ball import Region

_PROGRESS = 1e-4  # a smaller relative decrease of the objective counts as none
_LOST = 10.0  # the factor on c while nothing is found


@dataclass(frozen=True)
class CarliniWagner:
    """The attack of Carlini and Wagner (2017), for l2.

    Adam on distance^2 + c max(margin, 0), with c searched by bisection, `rounds` times. Each point
    has its own c, and ends a round early when the objective has not improved for a tenth of
    `steps`; its next round then begins at once.

    Differs from the paper: iterates are projected into the box instead of passing through tanh;
    steps left over by early ends go to more rounds; the first c comes from a linear model, not
    0.001; the nearest example is pulled back to the boundary.

    Cost: (steps x rounds + 1) x max(targets, 1) forward and backward passes, and about 10 forwards
    at the end.

    Args:
        steps: Adam steps of each round at most.
        rounds: Rounds of the bisection over c; more if rounds end early.
        step: Step length of Adam, as a share of what each feature can move; where there is no box,
            as a share of the distance to the boundary of a linear model.
        initial_const: First c, as a multiple of the one that solves a linear model.
        targets: Number of other classes, nearest first, each of which gets a search of its own; 0
            follows the worst margin.

    Raises:
        BadInput: A setting is out of its range, or the norm is not l2.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "nearest example", "distance and margin weighed in one loss", norms=("l2",)
    )

    steps: int = 100
    rounds: int = 9
    step: float = 0.01
    initial_const: float = 1.0
    targets: int = 0

    def __post_init__(self) -> None:
        check_between(
            self,
            steps=(1, 10**9),
            rounds=(1, 10**6),
            step=(1e-9, 10),
            initial_const=(1e-9, 1e9),
            targets=(0, 10**9),
        )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the nearest candidates as points are decided.

        The search itself is deterministic; `seed` draws the random starts of the final polish where
        the search found nothing.
        """
        check_fit(self, problem.threat)
        return seek(
            problem,
            _CarliniWagnerState(
                tool=self,
                steps=self.steps * self.rounds,
                targets=target_count(problem, self.targets),
            ),
            seed,
        )


@dataclass(frozen=True, kw_only=True)
class _CarliniWagnerState(FromTheCentre):
    tool: CarliniWagner

    def memory(self, region: Region, x: Tensor) -> Memory:
        zero, none = torch.zeros_like(region.radius), torch.full_like(region.radius, torch.inf)
        numbers = {
            "c": zero,
            "unit": zero,
            "low": zero,
            "high": none,
            "made": zero,
            "idle": zero,
            "least": none,
            "hit": zero,
        }
        return {**numbers, "mean": torch.zeros_like(x), "square": torch.zeros_like(x)}

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        region, m, tiny = look.region, dict(memory), torch.finfo(look.x.dtype).tiny
        steepness, first = slope(region, look.gradient).double().clamp_min(1e-150), look.step == 0
        # On a linear model the minimum of the objective lies on the boundary exactly where
        # c = 2 margin / |gradient|^2.
        m["c"] = torch.where(
            first, self.tool.initial_const * 2 * look.worst.double() / steepness.square(), m["c"]
        ).clamp(1e-300, 1e300)
        m["unit"] = torch.where(
            first, (look.worst.double() / steepness).minimum(region.radius), m["unit"]
        )
        objective = region.distance(look.x).square() + m["c"] * look.worst.double().clamp_min(0)
        m["idle"] = torch.where(
            objective < m["least"] * (1 - _PROGRESS), torch.zeros_like(m["idle"]), m["idle"] + 1
        )
        m["least"] = torch.minimum(m["least"], objective)
        m["hit"] = torch.maximum(m["hit"], is_adversarial(look.worst).to(m["hit"]))
        m["made"] = m["made"] + 1
        over = (m["made"] >= self.tool.steps) | (m["idle"] >= max(self.tool.steps // 10, 1))
        moved = self._descend(look, m, tiny)
        return torch.where(per_job(over, moved), region.center, moved), _next_round(m, over)

    def _descend(self, look: Look, m: Memory, tiny: float) -> Tensor:
        """Return the next iterate after one step of Adam on the objective.

        The moments in `m` are updated in place.
        """
        region, resists = look.region, ~is_adversarial(look.worst)
        weight = 1.0 if region.weight is None else region.weight.square().view_as(region.center[0])
        scale = per_job((m["c"] * resists).to(look.x.dtype), look.x)
        gradient = 2 * weight * (look.x - region.center) - scale * look.gradient
        m["mean"] = 0.9 * m["mean"] + 0.1 * gradient
        m["square"] = 0.999 * m["square"] + 0.001 * gradient.square()
        first, second = (
            per_job((1 - rate ** m["made"]).to(gradient.dtype), gradient) for rate in (0.9, 0.999)
        )
        size = widths(region)
        size = torch.where(size.isinf(), per_job(m["unit"].to(size.dtype), size), size)
        return region.project(
            look.x
            - self.tool.step
            * size
            * (m["mean"] / first)
            / (m["square"] / second).sqrt().clamp_min(tiny)
        )


def _next_round(m: Memory, over: Tensor) -> Memory:
    """Return the memory with a new c for the jobs whose round is over.

    All else of theirs is forgotten. The new c lies halfway between the smallest that succeeded and
    the largest that failed, or is larger while none succeeded.
    """
    hit = m["hit"] > 0
    high, low = (
        torch.where(hit, torch.minimum(m["high"], m["c"]), m["high"]),
        torch.where(hit, m["low"], torch.maximum(m["low"], m["c"])),
    )
    c = torch.where(high.isinf(), (m["c"] * _LOST).clamp(max=1e300), (low + high) / 2)
    fresh: Memory = {"c": c, "low": low, "high": high, "least": torch.full_like(c, torch.inf)}
    fresh |= {name: torch.zeros_like(m[name]) for name in ("made", "idle", "hit", "mean", "square")}
    return {
        name: torch.where(per_job(over, value), fresh[name], value) if name in fresh else value
        for name, value in m.items()
    }
