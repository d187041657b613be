"""Random search, then ascent along finite differences of scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.query_loop import Memory, Play, PointsInFlight, Queries, run_queries
from calipers.attacks.square import windowed
from calipers.errors import BadInput
from calipers.problem.capabilities import LP, Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_MOMENTUM = 0.9
_STEP = 0.2  # share of the radius of the first step; it falls to zero with the budget
# probes start this share of the way inward from the iterate and are a little shorter: so they are
# admissible themselves, and may be the result
_INWARD = 0.02
_PROBE = 0.018  # share of the radius by which a probe moves its feature


@dataclass(frozen=True)
class FiniteDifferences:
    """Random search, then ascent along finite differences of the margin.

    Scores only; the differences by coordinates follow ZOO (Chen et al. 2017). The first `search`
    queries are those of `Square`. Then each step asks about the iterate and about `features` copies
    of it, each with one other feature moved; all features are taken in turn, in a random order. The
    slopes enter a running sum, and the point moves along the norm's steepest direction of that sum.

    Differs from the paper: one-sided differences (half the queries; the margin is known where the
    step starts), taken away from the nearer end of the box; momentum over all features and a
    projected step instead of Adam on the probed ones; a search before it. Measured on 100 digits of
    mnist-plain with 5000 queries each: in linf at 0.1, gradients (100 steps, 5 restarts) break 88,
    this 85, `Square` 83; in l2 at 1.5, gradients 85, this 86, `Square` 82.

    Cost: up to `queries` forward passes per point, until it is broken.

    Args:
        queries: Budget of forward passes per point.
        search: Queries of the random search at the start, 0 to `queries`.
        features: Features probed per step.

    Raises:
        BadInput: A setting is out of its range, or the norm counts features.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "gradients estimated by finite differences",
        norms=LP,
        needs="scores",
    )

    queries: int = 5000
    search: int = 1000
    features: int = 48

    def __post_init__(self) -> None:
        if self.queries < 1 or self.features < 1 or not 0 <= self.search <= self.queries:
            got = f"{self.queries}, {self.search}, {self.features}"
            raise BadInput(
                "FiniteDifferences takes queries >= 1 (usually 5000), search from 0 to queries "
                f"(usually 1000) and features >= 1 (usually 48), got {got}"
            )

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        if problem.region.norm.is_count:
            raise BadInput(
                f"a small change has no length in norm {problem.region.norm.name!r}; take 'linf', "
                "'l2' or 'l1'"
            )
        search = windowed(problem, max(1, self.search))
        features = min(self.features, problem.region.low.shape[1])
        return run_queries(
            problem,
            _Slopes(self.queries, max(1, self.search), features, search),
            seed=seed,
            batch=batch,
        )


@dataclass(frozen=True)
class _Slopes:
    """The two phases of one budget.

    First the questions of `search`, up to its own budget; then rounds of the iterate, the iterate
    moved a little inward, and its probes.
    """

    queries: int
    searching: int
    features: int
    search: Play
    labels_only: bool = False

    @property
    def width(self) -> int:
        return self.features + 2

    def start(self, region: Region, streams: Streams) -> Memory:
        own = {
            "x": region.center.clone(),
            "slope": torch.zeros_like(region.low),
            "round": torch.zeros_like(region.radius, dtype=torch.long),
        }
        return {**self.search.start(region, streams), **own}

    def ask(self, look: PointsInFlight, memory: Memory) -> Queries:
        """Ask the question of the random search, or a round of probes."""
        early = look.spent < self.searching
        memory["x"] = torch.where(
            per_job(look.spent == self.searching, look.best), look.best, memory["x"]
        )
        count = torch.where(early, 1, (self.queries - look.spent).clamp(1, self.width))
        slot = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        number = torch.arange(len(slot), device=slot.device) - (count.cumsum(0) - count)[slot]
        points = memory["x"][slot]
        searching = torch.nonzero(early[slot]).flatten()
        if len(searching):
            points = points.index_copy(
                0, searching, self.search.ask(look, memory).points[slot[searching]]
            )
        inward = torch.nonzero(number > 0).flatten()
        if len(inward):
            points = points.index_copy(
                0, inward, self._probes(look, memory, slot[inward], number[inward] - 2)
            )
        return Queries(slot, points)

    def hear(self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor) -> Tensor:
        count = torch.bincount(asked.slot, minlength=len(look.spent))
        place = torch.nonzero(count == self.width).flatten()
        if len(place):
            values = answers[(count == self.width)[asked.slot]].view(len(place), self.width)
            self._ascend(look, memory, place, values)
        return self.search.hear(look, memory, asked, answers)

    def _probes(self, look: PointsInFlight, memory: Memory, slot: Tensor, probe: Tensor) -> Tensor:
        """Return the iterates of `slot (R,)` moved inward, each with a probe.

        The feature of its `probe (R,)` is moved on; a probe below 0 moves none.
        """
        feature, move = self._moves(look.region, look.streams, memory)
        inner = _inward(look.region, memory["x"])[slot].flatten(1)
        chosen = probe.clamp_min(0)
        change = torch.where(probe < 0, 0.0, move[slot, chosen])
        return inner.scatter_add(1, feature[slot, chosen][:, None], change[:, None]).view(
            -1, *look.region.center.shape[1:]
        )

    def _moves(self, region: Region, streams: Streams, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return this round's features and how far each moves, both (B, features).

        The moves stay within what moving inward left free, and go towards the farther end of the
        box.
        """
        movable = region.low < region.high
        rounds = ((movable.sum(1) + self.features - 1) // self.features).clamp_min(1)
        luck = (
            streams.fork(memory["round"] // rounds)
            .fork(-2)
            .uniform(movable.shape[1], torch.float64)
            + 2.0 * ~movable
        )
        first = (memory["round"] % rounds * self.features).clamp(
            max=movable.shape[1] - self.features
        )
        feature = luck.argsort(1).gather(
            1, first[:, None] + torch.arange(self.features, device=first.device)
        )
        offset = (_inward(region, memory["x"]) - region.center).flatten(1)
        up, down = (
            (region.high - offset).gather(1, feature),
            (offset - region.low).gather(1, feature),
        )
        most = (_PROBE * region.radius).to(offset.dtype)[:, None].expand_as(feature)
        if region.weight is not None:
            most = most / region.weight[feature]
        return feature, torch.where(up >= down, torch.minimum(up, most), -torch.minimum(down, most))

    def _ascend(self, look: PointsInFlight, memory: Memory, place: Tensor, values: Tensor) -> None:
        """Add the slopes of a full round to the running sum, and move along it."""
        region = look.region.take(place)
        part = {name: memory[name][place] for name in ("x", "slope", "round")}
        feature, move = self._moves(region, look.streams.take(place), part)
        rise = (
            (values[:, 2:] - values[:, 1:2])
            .nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            .to(move.dtype)
        )
        slope = (_MOMENTUM * part["slope"]).scatter_add(
            1, feature, torch.where(move == 0, 0.0, rise / torch.where(move == 0, 1.0, move))
        )
        left = (self.queries - look.spent[place]).double() / max(1, self.queries - self.searching)
        moved = region.step(part["x"], -slope.view_as(part["x"]), (_STEP * left).to(move.dtype))
        memory["x"] = memory["x"].index_copy(0, place, region.snap(region.project(moved)))
        memory["slope"] = memory["slope"].index_copy(0, place, slope)
        memory["round"] = memory["round"].index_copy(0, place, part["round"] + 1)


def _inward(region: Region, points: Tensor) -> Tensor:
    """Return the points moved a little towards their centres.

    The share of the way leaves room for a probe in every direction.
    """
    return points + _INWARD * (region.center - points)
