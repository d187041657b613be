"""The job queue of iterated attacks: (point x target x restart) jobs.

Jobs run in micro-batches that are refilled as they end. A point leaves the queue the moment it is
broken, so weak models cost a few steps, and the batch stays full for the hard points. The
randomness of a job depends on its point, target and restart alone, and the first successful job *by
rank* wins: results do not depend on batch size, order or neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from calipers.attacks.engine.batches import BATCH, backwards_of, in_flight, input_gradient, per_job
from calipers.attacks.engine.jobs import Book
from calipers.attacks.engine.losses import toward
from calipers.attacks.engine.targets import looked_at, rank_targets
from calipers.problem.goals import is_adversarial
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

# steps on a device where reading a value stalls the queue; a slot that ended idles until the next
_STEPS_BETWEEN_SYNCS = 8
_SECONDS_BETWEEN_YIELDS = 1.0


Memory = dict[str, Tensor]
"""What a job carries from step to step besides its iterate: tensors (B, ...) by name."""


@dataclass(frozen=True, eq=False)
class Look:
    """What the jobs see when they choose their next step.

    All (B, ...), in the jobs' order: `x` the iterates, and `gradient` that of the `loss (B,)`
    climbed there, `worst (B,)` the margin that decides, `step (B,)` the steps made so far, `best`
    the iterate of lowest score so far, and `score (B,)`: the worst margin, or the distance for
    recipes that seek the nearest example (infinite while none is found).
    """

    region: Region
    x: Tensor
    gradient: Tensor
    loss: Tensor
    worst: Tensor
    step: Tensor
    best: Tensor
    score: Tensor


class Recipe(Protocol):
    """What one attack does inside the queue."""

    @property
    def steps(self) -> int:
        """The number of moves of one job."""

    @property
    def restarts(self) -> int:
        """The number of starts for each point and target."""

    @property
    def targets(self) -> int:
        """The number of classes attacked one by one; 0 climbs the worst margin."""

    def start(self, region: Region, streams: Streams, restart: Tensor) -> Tensor:
        """Return the first iterate of each job, (B, *D)."""

    @property
    def nearest(self) -> bool:
        """Whether the nearest adversarial iterate is sought, whatever the radius.

        Otherwise any inside the region counts, and a job ends when it has one.
        """

    def memory(self, region: Region, x: Tensor) -> Memory:
        """Return what each job remembers at its start."""

    def loss(self, margins: Tensor, problem: Problem, restart: Tensor) -> Tensor:
        """Return what an untargeted job climbs, (B,)."""

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the next iterates, admissible, and what to remember."""


@dataclass(eq=False)
class Slots:
    """The jobs in flight, as a structure of arrays.

    `best` is the iterate of lowest score so far.
    """

    job: Tensor
    step: Tensor
    x: Tensor
    best: Tensor
    score: Tensor
    memory: Memory

    def take(self, keep: Tensor) -> Slots:
        memory = {name: value[keep] for name, value in self.memory.items()}
        return Slots(
            self.job[keep], self.step[keep], self.x[keep], self.best[keep], self.score[keep], memory
        )

    def join(self, other: Slots) -> Slots:
        job, step, x, best, score = (
            torch.cat([getattr(self, name), getattr(other, name)])
            for name in ("job", "step", "x", "best", "score")
        )
        return Slots(
            job,
            step,
            x,
            best,
            score,
            {name: torch.cat([value, other.memory[name]]) for name, value in self.memory.items()},
        )


class SearchOptions(NamedTuple):
    """How a search runs, whatever it searches for.

    `seed` draws the random starts. `dtype` runs the search in another precision; the model's own
    judges each job's end. `batch` is the number of jobs in flight, None for the usual one; it does
    not change the result.
    """

    seed: int = 0
    dtype: torch.dtype | None = None
    batch: int | None = None

    @property
    def in_flight(self) -> int:
        """Return the number of jobs in flight, before memory limits it."""
        return self.batch or BATCH


class WarmStart(NamedTuple):
    """What is known before the search begins.

    `starts (N, S, *D)` are the first iterates of each point's first S jobs, in place of the
    recipe's own (they are projected into the region); `targets (N, T)` are the margin columns to
    attack, in this order.
    """

    starts: Tensor | None = None
    targets: Tensor | None = None


NOTHING_KNOWN = WarmStart()


class Queue:
    """One run of the queue.

    Where `warm` names no targets, they are ranked here. With `keep_all` the best iterate of every
    job is remembered, (N, ranks, *D). `enough (N,)` are distances at which a search for the nearest
    example ends like any other that has succeeded.

    Cost: each job runs up to `steps` forward and backward passes and one more forward; `steps *
    restarts * max(targets, 1)` for a point that resists. No host synchronisation inside the steps
    on a GPU.
    """

    def __init__(
        self,
        problem: Problem,
        recipe: Recipe,
        options: SearchOptions,
        warm: WarmStart = NOTHING_KNOWN,
        keep_all: bool = False,
        enough: Tensor | None = None,
    ) -> None:
        self.problem, self.recipe = problem, recipe
        self.batch, self.starts = in_flight(problem, options.in_flight), warm.starts
        dtype, ranked = options.dtype, warm.targets
        self.goal = torch.full(
            (len(problem),),
            -torch.inf if recipe.nearest else 0.0,
            dtype=problem.x.dtype,
            device=problem.x.device,
        )
        if enough is not None:
            self.goal = enough.to(self.goal)
        self.n, device = len(problem), problem.x.device
        self.streams = problem.streams(options.seed)
        self.network = problem.classifier.step(dtype)
        self.coarse = dtype not in (None, problem.classifier.dtype) or problem.classifier.in_half
        self.back = backwards_of(problem)
        ranking = (
            (0, 0)
            if ranked is not None or not recipe.targets
            else (1, looked_at(problem, recipe.targets) * self.back)
        )
        self.ranked = (
            ranked
            if ranked is not None or not recipe.targets
            else rank_targets(problem, recipe.targets, self.batch)
        )
        self.book = Book(self.n, recipe.restarts * max(recipe.targets, 1))
        self.best = problem.x.clone()
        self.score = torch.full((self.n,), torch.inf, dtype=problem.x.dtype, device=device)
        self.all_best = (
            problem.x[:, None].repeat(1, self.book.ranks, *[1] * (problem.x.dim() - 1))
            if keep_all
            else None
        )
        self.all_scores = torch.full(
            (self.n, self.book.ranks), torch.inf, dtype=problem.x.dtype, device=device
        )
        self.forwards, self.backwards = (
            torch.full((self.n,), passes, dtype=torch.long, device=device) for passes in ranking
        )
        self.chunk = 1 if device.type == "cpu" else _STEPS_BETWEEN_SYNCS

    def run(self) -> Iterator[Attempt]:
        """Yield the points as they are decided.

        An interrupt first yields what is found, and is then passed on.
        """
        slots: Slots | None = None
        decided: list[int] = []
        try:
            slots, fresh = self._fill(None)
            while slots is not None and len(slots.job):
                said = time.monotonic()
                # The model is frozen between two yields, not around each step: restoring its flags
                # and random state costs as much as moving the points.
                with self.problem.classifier.frozen():
                    while (
                        slots is not None
                        and len(slots.job)
                        and not (decided and time.monotonic() - said > _SECONDS_BETWEEN_YIELDS)
                    ):
                        if fresh:
                            view = self._view(slots)
                        for _ in range(self.chunk):
                            slots = self._step(slots, *view)
                        slots, fresh = self._exchange(slots, decided)
                if decided:
                    attempt, decided = self._attempt(decided), []
                    yield attempt
        except KeyboardInterrupt:  # raised in a step, or by the consumer of what was yielded
            left = decided + self._found(slots)
            if left:
                yield self._attempt(left)
            raise

    def _found(self, slots: Slots | None) -> list[int]:
        """Return the undecided points of which an adversarial example is known.

        Iterates in flight are included.
        """
        if slots is not None:
            point = slots.job % self.n
            for i in torch.nonzero(slots.score < self.score[point]).flatten().tolist():
                # another job of the point may have been kept in the meantime
                if bool(slots.score[i] < self.score[point[i]]):
                    self._keep(slots, [i])
        known = self.score.isfinite() if self.recipe.nearest else is_adversarial(self.score)
        return [p for p in torch.nonzero(known).flatten().tolist() if not self.book.decided[p]]

    def promising(self, points: Tensor, count: int) -> WarmStart:
        """Return the most promising classes of some points, and their iterates.

        For the points (M,), the classes of the `count` best jobs, (M, count), and their best
        iterates, (M, count, *D). Needs `keep_all`.
        """
        assert self.all_best is not None and self.ranked is not None
        targets = self.recipe.targets
        scores = self.all_scores[points].view(len(points), -1, targets)
        score, restart = scores.min(1)  # each class's best restart
        column = score.argsort(1)[:, :count]
        rank = restart.gather(1, column) * targets + column
        return WarmStart(
            self.all_best[points[:, None], rank], self.ranked[points].gather(1, column)
        )

    def _exchange(self, slots: Slots, decided: list[int]) -> tuple[Slots | None, bool]:
        """Book the jobs that ended and fill their slots.

        Also return whether anything changed.
        """
        over = self._over(slots)
        ended, moot = self._retire(slots, over.tolist(), decided)
        if not ended:
            return slots, False
        gone = set(ended) | set(moot)
        kept = slots.take(
            torch.tensor(
                [i for i in range(len(slots.job)) if i not in gone],
                dtype=torch.long,
                device=self.problem.x.device,
            )
        )
        return self._fill(kept)

    def _over(self, slots: Slots) -> Tensor:
        """Return which jobs have ended, (B,) bool.

        Margins of a search in lower precision are hints only: the model's own arithmetic judges
        each end, and a job that it refutes goes on.
        """
        over = self._through(slots)
        if self.coarse and bool(over.any()):
            some = torch.nonzero(over).flatten()
            part = self._part(slots.job[some])
            margins = part.margins(part.classifier.logits(slots.best[some]))
            worst = part.goal.worst(margins).nan_to_num(nan=-torch.inf)
            slots.score[some] = (
                torch.where(is_adversarial(worst), slots.score[some], torch.inf)
                if self.recipe.nearest
                else worst
            )
            over = self._through(slots)
        return over

    def _through(self, slots: Slots) -> Tensor:
        return (slots.step > self.recipe.steps) | self._won(slots)

    def _won(self, slots: Slots) -> Tensor:
        """Return which jobs need not go on, (B,) bool.

        NaN counts as won, as in `is_adversarial`.
        """
        return ~(slots.score > self.goal[slots.job % self.n])

    def _part(self, job: Tensor) -> Problem:
        """Return the problem of the jobs' points, its names left out."""
        p, point = self.problem, job % self.n
        return Problem(
            p.classifier, p.x[point], p.y[point], p.threat, p.goal.take(point), p.classes, ()
        )

    def _fill(self, slots: Slots | None) -> tuple[Slots | None, bool]:
        """Fill the batch up with new jobs."""
        jobs = self.book.draw(self.batch - (0 if slots is None else len(slots.job)))
        if not jobs:
            return slots, True
        job = torch.tensor(jobs, dtype=torch.long, device=self.problem.x.device)
        rank, point = job // self.n, job % self.n
        region, restart = self.problem.region.take(point), self._restart(rank)
        x = self.recipe.start(region, self.streams.take(point).fork(rank), restart)
        if self.starts is not None:
            given = rank < self.starts.shape[1]
            x = torch.where(
                per_job(given, x),
                region.project(self.starts[point, rank.clamp(max=self.starts.shape[1] - 1)]),
                x,
            )
        score = torch.full((len(job),), torch.inf, dtype=x.dtype, device=x.device)
        new = Slots(job, torch.zeros_like(job), x, x.clone(), score, self.recipe.memory(region, x))
        return (new if slots is None else slots.join(new)), True

    def _restart(self, rank: Tensor) -> Tensor:
        return rank // max(self.recipe.targets, 1)

    def _view(self, slots: Slots) -> tuple[Problem, Region, Tensor, Tensor | None]:
        """Gather what the steps need to know about the points in flight.

        Only done when the batch has changed.
        """
        rank, point = slots.job // self.n, slots.job % self.n
        target = None if self.ranked is None else self.ranked[point, rank % self.recipe.targets]
        return self._part(slots.job), self.problem.region.take(point), self._restart(rank), target

    def _step(
        self, slots: Slots, part: Problem, region: Region, restart: Tensor, target: Tensor | None
    ) -> Slots:
        """Make one forward and backward pass for every slot.

        A slot that has ended keeps its state.
        """
        give_way()
        x = slots.x.requires_grad_()
        self.problem.classifier.passes.add(forwards=len(x), backwards=len(x) * self.back)
        margins = part.margins(self.network(x))
        loss = (
            self.recipe.loss(margins, part, restart) if target is None else toward(margins, target)
        )
        gradient = input_gradient(loss, x)
        with torch.no_grad():
            worst = part.goal.worst(margins).nan_to_num(nan=-torch.inf)
            active = ~self._through(slots)
            seen = (
                torch.where(is_adversarial(worst), region.distance(x).to(worst.dtype), torch.inf)
                if self.recipe.nearest
                else worst
            )
            better = active & (seen < slots.score)
            best, score = (
                torch.where(per_job(better, x), x, slots.best),
                torch.where(better, seen, slots.score),
            )
            look = Look(region, x.detach(), gradient, loss.detach(), worst, slots.step, best, score)
            moved, memory = self.recipe.move(look, slots.memory)
            if self.chunk > 1:
                moved = torch.where(per_job(active, x), moved, x)
                memory = {
                    name: torch.where(per_job(active, value), value, slots.memory[name])
                    for name, value in memory.items()
                }
        return Slots(slots.job, slots.step + active, moved, best, score, memory)

    def _retire(
        self, slots: Slots, over: list[bool], decided: list[int]
    ) -> tuple[list[int], list[int]]:
        """Book the jobs that ended, and keep their candidates.

        Return the slots to free: those that ended, and those that no longer matter because a lower
        rank succeeded.
        """
        ended = [i for i, done in enumerate(over) if done]
        if not ended:
            return [], []
        jobs, scores, won = slots.job.tolist(), slots.score.tolist(), self._won(slots).tolist()
        take: list[int] = []
        held: dict[int, float] = {}  # the lowest score of each point, this round's included
        touched = set()
        for i in ended:
            point = jobs[i] % self.n
            touched.add(point)
            lowest = self.book.finish(jobs[i], won[i])
            unbroken = self.book.winner[point] == self.book.ranks
            if lowest or (unbroken and scores[i] < held.get(point, float(self.score[point]))):
                held[point] = scores[i]
                take.append(i)
        moot = [i for i, job in enumerate(jobs) if not over[i] and self.book.moot(job)]
        for i in moot:
            self.book.finish(jobs[i], False)
            touched.add(jobs[i] % self.n)
        self._keep(slots, take)
        if self.all_best is not None:
            done = torch.tensor(ended, dtype=torch.long, device=slots.job.device)
            rank, point = slots.job[done] // self.n, slots.job[done] % self.n
            self.all_best[point, rank], self.all_scores[point, rank] = (
                slots.best[done],
                slots.score[done],
            )
        spent = torch.tensor(ended + moot, dtype=torch.long, device=slots.job.device)
        place, passes = slots.job[spent] % self.n, slots.step[spent]
        self.forwards.index_add_(0, place, passes)
        self.backwards.index_add_(0, place, passes * self.back)
        decided += [p for p in sorted(touched) if self.book.settle(p)]
        return ended, moot

    def _keep(self, slots: Slots, take: list[int]) -> None:
        for i in take:  # in order: a later entry of the same point is the better one
            point = int(slots.job[i]) % self.n
            self.best[point], self.score[point] = slots.best[i], slots.score[i]

    def _attempt(self, decided: list[int]) -> Attempt:
        index = torch.tensor(decided, dtype=torch.long, device=self.problem.x.device)
        return Attempt(
            index,
            self.problem.region.take(index).snap(self.best[index]),
            self.forwards[index],
            self.backwards[index],
        )
