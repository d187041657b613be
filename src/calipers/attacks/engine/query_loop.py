"""The loop of queries that attacks without gradients share.

Points in flight, each with its own state, are replaced by others as they are decided.

An attack is a state machine: in each round every point in flight asks a few questions and receives
the answers. The rounds of different points need not agree, so a point that enters late runs beside
one that is nearly finished, and the batch stays full. What a point draws depends on its own stream
and on the number of questions it has asked: results do not depend on batch size, order or
neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calipers.attacks.engine.batches import BATCH, in_flight, per_job
from calipers.problem.goals import is_adversarial
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_ROWS = 4096  # questions of one round: an attack that asks many at once has fewer points in flight
_BYTES = 2**27  # bytes of the questions of one round, of which about ten copies are held
_SECONDS_BETWEEN_YIELDS = 1.0
_UNBOUNDED = (
    1e9  # where no box ends the search for a first adversarial point, in the data's own units
)

Memory = dict[str, Tensor]
"""What each point remembers from round to round: tensors (B, ...) by name."""


@dataclass(frozen=True, eq=False)
class PointsInFlight:
    """What an attack sees of the B points in flight.

    Their regions and streams, the number of questions `spent (B,)` on each, and the best answer so
    far: `best (B, *D)` is the question of lowest `score (B,)`, which is the worst margin, or the
    distance of the nearest adversarial one (infinite while none is known).
    """

    region: Region
    streams: Streams
    spent: Tensor
    best: Tensor
    score: Tensor

    def take(self, index: Tensor) -> PointsInFlight:
        """Return some of the points, or repetitions of them."""
        return PointsInFlight(
            self.region.take(index),
            self.streams.take(index),
            self.spent[index],
            self.best[index],
            self.score[index],
        )


@dataclass(frozen=True, eq=False)
class Queries:
    """The questions of one round.

    `points (R, *D)`, and the place `slot (R,)` in the batch that asks each, in rising order.
    """

    slot: Tensor
    points: Tensor


class Play(Protocol):
    """What one attack does inside the loop."""

    @property
    def queries(self) -> int:
        """The budget of one point."""

    @property
    def width(self) -> int:
        """The most questions of one point in one round."""

    @property
    def labels_only(self) -> bool:
        """Whether the attack receives signs instead of margins.

        It then seeks the nearest adversarial point; else the smallest margin inside the region.
        """

    def start(self, region: Region, streams: Streams) -> Memory:
        """Return what each point remembers at its start."""

    def ask(self, look: PointsInFlight, memory: Memory) -> Queries:
        """Return the questions of a round.

        At least one per point, never more than its budget allows.
        """

    def hear(self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor) -> Tensor:
        """Update the memory in place from the answers.

        The answers are the worst margins (R,) or their signs. Return which points have nothing left
        to ask, (B,) bool.
        """


def one_each(points: Tensor) -> Queries:
    """Return a round of one question per point."""
    return Queries(torch.arange(len(points), device=points.device), points)


def run_queries(
    problem: Problem, play: Play, *, seed: int, batch: int | None = None
) -> Iterator[Attempt]:
    """Yield an `Attempt` for every point, as points are decided.

    `forwards` are the questions; there is never a backward pass.
    """
    return _QueryRun(problem, play, seed, batch or BATCH).run()


@dataclass(eq=False)
class _Slots:
    """The points in flight, as a structure of arrays."""

    point: Tensor
    spent: Tensor
    best: Tensor
    score: Tensor
    memory: Memory

    def take(self, keep: Tensor) -> _Slots:
        memory = {name: value[keep] for name, value in self.memory.items()}
        return _Slots(self.point[keep], self.spent[keep], self.best[keep], self.score[keep], memory)

    def join(self, other: _Slots) -> _Slots:
        point, spent, best, score = (
            torch.cat([getattr(self, name), getattr(other, name)])
            for name in ("point", "spent", "best", "score")
        )
        return _Slots(
            point,
            spent,
            best,
            score,
            {name: torch.cat([value, other.memory[name]]) for name, value in self.memory.items()},
        )


class _QueryRun:
    """One run of the loop."""

    def __init__(self, problem: Problem, play: Play, seed: int, batch: int) -> None:
        self.problem, self.play = problem, play
        self.calls = in_flight(problem, BATCH)
        size = max(1, problem.x[:1].numel() * problem.x.element_size())
        self.room = max(1, min(batch, min(_ROWS, _BYTES // size) // play.width))
        self.streams = problem.streams(seed)
        self.entered = 0
        self.done: list[_Slots] = []

    def run(self) -> Iterator[Attempt]:
        """Yield the points as they are decided.

        An interrupt first yields what is found, and is then passed on.
        """
        slots = self._enter(None)
        try:
            while len(slots.point):
                said = time.monotonic()
                with self.problem.classifier.frozen(), torch.no_grad():
                    region, streams = (
                        self.problem.region.take(slots.point),
                        self.streams.take(slots.point),
                    )
                    while len(slots.point) and not (
                        self.done and time.monotonic() - said > _SECONDS_BETWEEN_YIELDS
                    ):
                        over = self._round(
                            slots,
                            PointsInFlight(region, streams, slots.spent, slots.best, slots.score),
                        )
                        if bool(over.any()):
                            slots = self._exchange(slots, over)
                            region, streams = (
                                self.problem.region.take(slots.point),
                                self.streams.take(slots.point),
                            )
                if self.done:
                    yield self._attempt()
        except KeyboardInterrupt:  # raised in a round, or by the consumer of what was yielded
            self._salvage(slots)
            if self.done:
                yield self._attempt()
            raise

    def _salvage(self, slots: _Slots) -> None:
        """Retire the points in flight of which an adversarial example is known."""
        known = slots.score.isfinite() if self.play.labels_only else is_adversarial(slots.score)
        if bool(known.any()):
            self.done.append(slots.take(torch.nonzero(known).flatten()))

    def _enter(self, slots: _Slots | None) -> _Slots:
        """Fill the batch up with new points."""
        count = min(
            self.room - (0 if slots is None else len(slots.point)), len(self.problem) - self.entered
        )
        if slots is not None and not count:
            return slots
        point = torch.arange(self.entered, self.entered + count, device=self.problem.x.device)
        self.entered += count
        region = self.problem.region.take(point)
        score = torch.full((count,), torch.inf, dtype=torch.float64, device=point.device)
        new = _Slots(
            point,
            torch.zeros_like(point),
            region.center.clone(),
            score,
            self.play.start(region, self.streams.take(point)),
        )
        return new if slots is None else slots.join(new)

    def _exchange(self, slots: _Slots, over: Tensor) -> _Slots:
        """Retire the points that have ended, and let others enter."""
        self.done.append(slots.take(torch.nonzero(over).flatten()))
        return self._enter(slots.take(torch.nonzero(~over).flatten()))

    def _round(self, slots: _Slots, look: PointsInFlight) -> Tensor:
        give_way()
        asked = self.play.ask(look, slots.memory)
        worst, interrupt = self._worst(asked, slots.point)
        answers = self._note(slots, look.region, asked, worst)
        if interrupt is not None:
            raise interrupt
        slots.spent = slots.spent + torch.bincount(asked.slot, minlength=len(slots.point))
        heard = PointsInFlight(look.region, look.streams, slots.spent, slots.best, slots.score)
        through = self.play.hear(heard, slots.memory, asked, answers) | (
            slots.spent >= self.play.queries
        )
        return through | (
            slots.score <= 0 if self.play.labels_only else is_adversarial(slots.score)
        )

    def _note(self, slots: _Slots, region: Region, asked: Queries, worst: Tensor) -> Tensor:
        """Keep the best question of each slot.

        Return what the attack receives of the worst margins (R,).
        """
        broken = is_adversarial(worst)
        if self.play.labels_only:
            answers = 1.0 - 2.0 * broken.double()
            seen = torch.where(broken, region.take(asked.slot).distance(asked.points), torch.inf)
        else:
            seen = answers = worst.nan_to_num(nan=-torch.inf)
        row = _lowest(seen, asked.slot, len(slots.point))
        better = seen[row] < slots.score
        slots.best = torch.where(per_job(better, slots.best), asked.points[row], slots.best)
        slots.score = torch.where(better, seen[row], slots.score)
        return answers

    def _worst(self, asked: Queries, point: Tensor) -> tuple[Tensor, KeyboardInterrupt | None]:
        """Return the worst margins (R,), float64, and an interrupt if any came.

        After an interrupt the margins are infinite for the questions that it left unanswered.
        """
        problem, place = self.problem, point[asked.slot]
        network, goal, y = problem.classifier.network, problem.goal.take(place), problem.y[place]
        logits, interrupt = list[Tensor](), None
        try:
            for part in asked.points.split(self.calls):
                problem.classifier.passes.add(forwards=len(part))
                logits.append(network(part))
        except KeyboardInterrupt as error:
            interrupt = error
        worst = torch.full((len(place),), torch.inf, dtype=torch.float64, device=place.device)
        if logits:
            answered = torch.arange(sum(map(len, logits)), device=place.device)
            worst[answered] = (
                goal.take(answered)
                .worst(goal.take(answered).margins(torch.cat(logits), y[answered]))
                .double()
            )
        return worst, interrupt

    def _attempt(self) -> Attempt:
        done, self.done = self.done, []
        point, best, spent = (
            torch.cat([getattr(part, name) for part in done]) for name in ("point", "best", "spent")
        )
        return Attempt(
            point, self.problem.region.take(point).snap(best), spent, torch.zeros_like(spent)
        )


def _lowest(values: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Return the row of each slot's lowest value, the first of equal ones."""
    if len(slot) == slots:
        return torch.arange(slots, device=slot.device)
    low = torch.full((slots,), torch.inf, dtype=values.dtype, device=slot.device).scatter_reduce(
        0, slot, values, "amin"
    )
    row = torch.arange(len(slot), device=slot.device)
    candidate = torch.where(values == low[slot], row, len(slot))
    return torch.full((slots,), len(slot), device=slot.device).scatter_reduce(
        0, slot, candidate, "amin"
    )


# ---- label-only attacks: the way to a first point on the boundary
# -----------------------------------------------------------------------

SEEK, CROSS = 0, 1
"""The first two phases of a label-only attack: random points of the box until one is adversarial;
bisection towards the point itself.
"""


def unbounded(problem: Problem) -> Problem:
    """Return the problem at a radius that excludes nothing."""
    widest = problem.threat.widest(problem.x)
    return problem.at(torch.where(widest.isinf(), _UNBOUNDED, widest))


def boxed(region: Region, points: Tensor) -> Tensor:
    """Return the nearest points of box and mask.

    This is the projection where the radius excludes nothing, at a lower cost.
    """
    delta = (points - region.center).flatten(1).clamp(region.low, region.high)
    return region.center + delta.view_as(region.center)


def at_the_start(region: Region) -> Memory:
    """Return what both phases remember at the start.

    The `phase`, the nearest adversarial point `far`, its distance `outer` and a distance `inner`
    that is not adversarial.
    """
    zero = torch.zeros_like(region.radius)
    return {
        "phase": torch.full_like(zero, SEEK, dtype=torch.long),
        "far": region.center.clone(),
        "outer": zero,
        "inner": zero.clone(),
    }


def approach(look: PointsInFlight, memory: Memory) -> Tensor:
    """Return the next question of each point in one of the two phases.

    What it returns for the other points has no meaning.
    """
    points = memory["far"]
    crossing = torch.nonzero(memory["phase"] == CROSS).flatten()
    if len(crossing):
        middle = (memory["inner"][crossing] + memory["outer"][crossing]) / 2
        points = points.index_copy(
            0, crossing, look.region.take(crossing).at(middle).project(points[crossing])
        )
    seeking = torch.nonzero(memory["phase"] == SEEK).flatten()
    if len(seeking):
        region, spent = look.region.take(seeking), look.spent[seeking]
        found = torch.where(
            per_job(spent == 0, region.center),
            region.center,
            _anywhere(region, look.streams.take(seeking).fork(spent), spent),
        )
        points = points.index_copy(0, seeking, found)
    return points


def _anywhere(region: Region, streams: Streams, spent: Tensor) -> Tensor:
    """Return random points of the box.

    Noise, corners of a random density, or all features at the same height, in turn.
    """
    d, dtype = region.low.shape[1], region.low.dtype
    reach = (1 + region.center.flatten(1).abs().amax(1)) * 2.0 ** (spent // 3).clamp(max=20)
    low, high = (
        torch.where(region.low.isinf(), -reach[:, None], region.low),
        torch.where(region.high.isinf(), reach[:, None], region.high),
    )
    draws = streams.uniform(d + 1, dtype)
    each, common = draws[:, :d], draws[:, d:]
    kind = (spent % 3)[:, None]
    share = torch.where(
        kind == 1, each, torch.where(kind == 2, (each < common).to(dtype), common.expand_as(each))
    )
    return boxed(region, region.center + (low + share * (high - low)).view_as(region.center))


def approached(
    look: PointsInFlight, memory: Memory, points: Tensor, broken: Tensor, tolerance: float
) -> Tensor:
    """Note the answers `broken (B,)` to the questions of `approach`.

    Return which points now stand at the decision boundary, (B,) bool. `tolerance` is the width of
    the bracket at which the bisection ends, as a share of the distance.
    """
    phase, inner, outer = memory["phase"], memory["inner"], memory["outer"]
    here = phase <= CROSS
    hit = here & broken
    missed = (phase == CROSS) & ~broken
    memory["far"] = torch.where(per_job(hit, points), points, memory["far"])
    # The middle of the bracket, not the projection's own distance: that can fall short of the
    # middle, and the end would then move by less.
    memory["inner"] = torch.where(missed, (inner + outer) / 2, inner)
    memory["outer"] = torch.where(hit, look.region.distance(points), outer)
    memory["phase"] = torch.where(hit, CROSS, phase)
    return (
        (memory["phase"] == CROSS)
        & here
        & (memory["outer"] - memory["inner"] <= tolerance * memory["outer"])
    )
