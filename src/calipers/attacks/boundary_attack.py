"""Boundary Attack: a random walk along the boundary, by labels alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.query_loop import (
    SEEK,
    Memory,
    PointsInFlight,
    Queries,
    approach,
    approached,
    at_the_start,
    one_each,
    run_queries,
    unbounded,
)
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_ASIDE, _INWARD = 2, 3
_AT_FIRST = 1e-2  # relative width at which the first bisection ends; the walk does the rest
_LEARNING = 0.1
# success rates at which the step lengths stay as they are
_ASIDE_RATE, _INWARD_RATE = 0.5, 0.25


@dataclass(frozen=True)
class BoundaryAttack:
    """Boundary Attack: a random walk along the decision boundary, by labels.

    The nearest adversarial point of the walk is returned (Brendel, Rauber and Bethge 2018); the
    problem's radius is ignored. From a random adversarial point, the walk takes a step aside at the
    same distance, and where that stays adversarial a step inward; the length of each adapts to its
    own rate of success.

    Differs from the paper: the sphere is that of the problem's norm, and the box is part of it;
    each point adapts its lengths after every step; every other step aside moves a few features only
    (at a hyperplane in linf that brings 1.19 times the distance down to 1.00); and the walk begins
    with a bisection. HopSkipJump needs fewer queries; this attack needs no estimate of a gradient.

    Cost: `queries` forward passes per point, 1 where it is wrong already, `starts` where nothing
    adversarial is found.

    Args:
        queries: Budget of forward passes per point.
        starts: Random points of the box tried until one is adversarial.

    Raises:
        BadInput: A setting is out of its range.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "nearest example", "a random walk along the boundary", needs="labels"
    )

    queries: int = 5000
    starts: int = 200

    def __post_init__(self) -> None:
        if min(self.queries, self.starts) < 1:
            raise BadInput(
                "BoundaryAttack takes queries >= 1 (usually 5000 to 25000) and starts >= 1, got "
                f"{self.queries}, {self.starts}"
            )

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield the nearest candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        return run_queries(
            unbounded(problem), _RandomWalk(self.queries, self.starts), seed=seed, batch=batch
        )


@dataclass(frozen=True)
class _RandomWalk:
    queries: int
    starts: int
    width: int = 1
    labels_only: bool = True

    def start(self, region: Region, streams: Streams) -> Memory:
        aside, inward = torch.full_like(region.radius, 0.1), torch.full_like(region.radius, 0.1)
        return {
            **at_the_start(region),
            "aside": aside,
            "inward": inward,
            "beside": region.center.clone(),
        }

    def ask(self, look: PointsInFlight, memory: Memory) -> Queries:
        phase, points = memory["phase"], approach(look, memory)
        for which, step in ((_ASIDE, self._aside), (_INWARD, self._inward)):
            rows = torch.nonzero(phase == which).flatten()
            if len(rows):
                points = points.index_copy(0, rows, step(look, memory, rows))
        return one_each(points)

    def _aside(self, look: PointsInFlight, memory: Memory, rows: Tensor) -> Tensor:
        """Return random points beside the present ones.

        They are no farther from the centre.
        """
        region, far, outer = look.region.take(rows), memory["far"][rows], memory["outer"][rows]
        offset = (far.double() - region.center.double()).flatten(1)
        draw = look.streams.take(rows).fork(look.spent[rows]).normal(offset.shape[1], torch.float64)
        # Every other step moves a few random features by a random share: where the norm's ball has
        # corners, a step of all features nearly always moves off them.
        luck = (
            look.streams.take(rows)
            .fork(look.spent[rows])
            .fork(1)
            .uniform(offset.shape[1] + 2, torch.float64)
        )
        few, share, choice = look.spent[rows] % 2 == 1, 2 * luck[:, -1].square(), luck[:, :-2]
        chosen = (choice < offset.shape[1] ** -luck[:, -2:-1]) | (
            choice == choice.amin(1, keepdim=True)
        )
        along = (draw * offset).sum(1) / offset.square().sum(1).clamp_min(
            torch.finfo(torch.float64).tiny
        )
        tangent = (draw - along[:, None] * offset) if offset.shape[1] > 1 else draw
        tangent = torch.where(few[:, None], draw * chosen, tangent)
        size = region.distance(region.center.double() + tangent.view_as(far)).clamp_min(
            torch.finfo(torch.float64).tiny
        )
        moved = (
            offset
            + tangent * (torch.where(few, share, memory["aside"][rows]) * outer / size)[:, None]
        )
        return region.at(outer).project(region.center + moved.to(far.dtype).view_as(far))

    def _inward(self, look: PointsInFlight, memory: Memory, rows: Tensor) -> Tensor:
        region = look.region.take(rows)
        return region.at(memory["outer"][rows] * (1 - memory["inward"][rows])).project(
            memory["beside"][rows]
        )

    def hear(self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor) -> Tensor:
        before, points, broken = memory["phase"], asked.points, answers < 0
        arrived = approached(look, memory, points, broken, _AT_FIRST)
        aside, inward = before == _ASIDE, before == _INWARD
        memory["beside"] = torch.where(per_job(aside & broken, points), points, memory["beside"])
        # A step aside that stayed adversarial is kept, whether or not the step inward succeeds.
        kept = (aside | inward) & broken
        memory["far"] = torch.where(per_job(kept, points), points, memory["far"])
        memory["outer"] = torch.where(kept, look.region.distance(points), memory["outer"])
        whole = look.spent % 2 == 1  # spent counts this answer already
        for name, tried, rate in (
            ("aside", aside & whole, _ASIDE_RATE),
            ("inward", inward, _INWARD_RATE),
        ):
            factor = (_LEARNING * (broken.double() - rate)).exp()
            memory[name] = torch.where(
                tried, (memory[name] * factor).clamp(1e-8, 0.5), memory[name]
            )
        memory["phase"] = torch.where(
            aside & broken, _INWARD, torch.where(arrived | inward | aside, _ASIDE, memory["phase"])
        )
        return (memory["phase"] == SEEK) & (look.spent >= self.starts)
