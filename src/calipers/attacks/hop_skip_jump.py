"""HopSkipJump: boundary normals estimated from labels alone."""

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
    boxed,
    run_queries,
    unbounded,
)
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_PROBE, _JUMP = 2, 3
_MOST_PROBES = 10_000
_HALVINGS = 20  # of one jump; a good estimate of the normal needs a few


@dataclass(frozen=True)
class HopSkipJump:
    """HopSkipJump: the nearest adversarial point that labels alone lead to.

    Chen, Jordan and Wainwright 2020; the problem's radius is ignored. Each iteration bisects to the
    decision boundary, asks about `probes` * sqrt(iteration) points around it to estimate the
    boundary's normal, jumps along the norm's steepest direction, and halves the jump until it lands
    on the adversarial side. `starts` random points of the box are tried first; where none is
    adversarial the point itself is returned.

    Differs from the paper: every estimate is normalised by itself; the bisection draws back in the
    problem's own norm (a segment for l2, a clip for linf); box and mask come from the threat model;
    probes count by how far they really moved inside the box; the first point is noise, corners or a
    flat image, in turn; and any adversarial point that is met counts, probes too.

    Cost: `queries` forward passes per point, 1 where it is wrong already, `starts` where nothing
    adversarial is found.

    Args:
        queries: Budget of forward passes per point.
        probes: Points asked about in the first iteration to estimate the normal.
        starts: Random points of the box tried until one is adversarial.

    Raises:
        BadInput: A setting is out of its range.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "nearest example", "walks along the boundary by estimated normals", needs="labels"
    )

    queries: int = 5000
    probes: int = 100
    starts: int = 200

    def __post_init__(self) -> None:
        if min(self.queries, self.probes, self.starts) < 1:
            got = f"{self.queries}, {self.probes}, {self.starts}"
            raise BadInput(
                "HopSkipJump takes queries >= 1 (usually 1000 to 25000), probes >= 1 (usually "
                f"100) and starts >= 1, got {got}"
            )

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield the nearest candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        return run_queries(
            unbounded(problem),
            _BoundaryWalk(self.queries, self.probes, self.starts),
            seed=seed,
            batch=batch,
        )


@dataclass(frozen=True)
class _BoundaryWalk:
    queries: int
    probes: int
    starts: int
    width: int = 32
    labels_only: bool = True

    def start(self, region: Region, streams: Streams) -> Memory:
        memory = at_the_start(region)
        zero, flat = (
            torch.zeros_like(memory["phase"]),
            torch.zeros_like(region.low, dtype=torch.float64),
        )
        counts = {
            "iteration": zero,
            "probed": zero.clone(),
            "wanted": zero.clone(),
            "halvings": zero.clone(),
        }
        sums = {
            "adversarial": torch.zeros_like(region.radius),
            "towards": flat,
            "moved": flat.clone(),
            "slope": region.center.clone(),
        }
        return {**memory, **counts, **sums, "length": torch.zeros_like(region.radius)}

    def ask(self, look: PointsInFlight, memory: Memory) -> Queries:
        phase = memory["phase"]
        points = approach(look, memory)
        jumping = torch.nonzero(phase == _JUMP).flatten()
        if len(jumping):
            region, length = look.region.take(jumping), memory["length"][jumping]
            jumped = boxed(
                region,
                region.at(length).step(memory["far"][jumping], memory["slope"][jumping], 1.0),
            )
            points = points.index_copy(0, jumping, jumped)
        left = torch.minimum(memory["wanted"] - memory["probed"], self.queries - look.spent)
        count = torch.where(phase == _PROBE, left.clamp(1, self.width), 1)
        slot = torch.repeat_interleave(torch.arange(len(phase), device=phase.device), count)
        number = torch.arange(len(slot), device=slot.device) - (count.cumsum(0) - count)[slot]
        rows = points[slot]
        probing = torch.nonzero(phase[slot] == _PROBE).flatten()
        if len(probing):
            place = slot[probing]
            region = look.region.take(place)
            draw = (
                look.streams.take(place)
                .fork(look.spent[place] + number[probing])
                .normal(region.low.shape[1], torch.float64)
            )
            size = _probe_length(look.region, memory["far"])[place] / draw.square().sum(1).sqrt()
            probes = memory["far"][place] + (draw * size[:, None]).to(rows.dtype).view(
                -1, *rows.shape[1:]
            )
            rows = rows.index_copy(0, probing, boxed(region, probes))
        return Queries(slot, rows)

    def hear(self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor) -> Tensor:
        before = memory["phase"]
        first = torch.searchsorted(asked.slot, torch.arange(len(before), device=before.device))
        points, broken = asked.points[first], answers[first] < 0
        d = look.region.low.shape[1]
        arrived = approached(
            look,
            memory,
            points,
            broken,
            min(1e-3, max(0.25 * d**-1.5, 4 * torch.finfo(points.dtype).eps)),
        )
        self._collect(look, memory, asked, answers, before == _PROBE)
        ready = (before == _PROBE) & (memory["probed"] >= memory["wanted"])
        self._aim(memory, ready)
        # A jump that landed becomes the far end of the next bisection; if no jump lands, the point
        # stays where it was, and is probed again.
        jumping = before == _JUMP
        landed, lost = jumping & broken, jumping & ~broken & (memory["halvings"] >= _HALVINGS)
        memory["far"] = torch.where(per_job(landed, points), points, memory["far"])
        memory["outer"] = torch.where(landed, look.region.distance(points), memory["outer"])
        memory["inner"] = torch.where(landed, 0.0, memory["inner"])
        memory["phase"] = torch.where(landed, 1, memory["phase"])
        memory["length"] = torch.where(jumping, memory["length"] / 2, memory["length"])
        memory["halvings"] = memory["halvings"] + jumping
        self._begin(look, memory, arrived | lost)
        return (memory["phase"] == SEEK) & (look.spent >= self.starts)

    def _begin(self, look: PointsInFlight, memory: Memory, begins: Tensor) -> None:
        """Begin the next iteration's probes."""
        memory["iteration"] = memory["iteration"] + begins
        wanted = (self.probes * memory["iteration"].double().sqrt()).clamp(1, _MOST_PROBES).long()
        memory["wanted"] = torch.where(begins, wanted, memory["wanted"])
        memory["phase"] = torch.where(begins, _PROBE, memory["phase"])
        for name in ("probed", "adversarial", "towards", "moved"):
            memory[name] = memory[name].masked_fill(
                begins.view(-1, *[1] * (memory[name].dim() - 1)), 0
            )

    def _collect(
        self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor, probing: Tensor
    ) -> None:
        """Add the probes of a round to the sums of their points.

        Summed are how far each probe really moved, and the same with the sign of its answer.
        """
        length = _probe_length(look.region, memory["far"]).clamp_min(
            torch.finfo(torch.float64).tiny
        )
        rows = torch.nonzero(probing[asked.slot]).flatten()
        slot, sign = asked.slot[rows], -answers[rows]
        moved = (asked.points[rows].double() - memory["far"][slot].double()).flatten(1) / length[
            slot, None
        ]
        # Row by row, so that the sum of a point does not depend on its neighbours in the batch.
        memory["moved"] = memory["moved"].index_add(0, slot, moved)
        memory["towards"] = memory["towards"].index_add(0, slot, moved * sign[:, None])
        memory["adversarial"] = memory["adversarial"].index_add(0, slot, sign)
        memory["probed"] = memory["probed"].index_add(0, slot, torch.ones_like(slot))

    def _aim(self, memory: Memory, ready: Tensor) -> None:
        """Turn each point's probes into an estimated normal, and prepare a jump.

        The estimate is scaled to largest entry 1.
        """
        mean = memory["adversarial"] / memory["probed"].clamp_min(1)
        one_sided = mean.abs() >= 1  # all answers agree: subtracting the mean would leave nothing
        slope = memory["towards"] - torch.where(one_sided, 0.0, mean)[:, None] * memory["moved"]
        slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        shape = memory["slope"]
        memory["slope"] = torch.where(
            per_job(ready, shape), slope.to(shape.dtype).view_as(shape), shape
        )
        memory["length"] = torch.where(
            ready, memory["outer"] / memory["iteration"].clamp_min(1).sqrt(), memory["length"]
        )
        memory["halvings"] = memory["halvings"].masked_fill(ready, 0)
        memory["phase"] = torch.where(ready, _JUMP, memory["phase"])


def _probe_length(region: Region, boundary: Tensor) -> Tensor:
    """Return how far probes reach, (B,).

    It is a small share of the Euclidean distance from the centre, and wide enough to be seen above
    the tolerance of the bisection.
    """
    gone = (boundary.double() - region.center.double()).flatten(1)
    return gone.square().sum(1).sqrt() / gone.shape[1]
