"""Auto-PGD: gradient ascent whose step length adapts by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from calipers.attacks.engine.batches import BATCH, backwards_of, in_flight, per_job
from calipers.attacks.engine.losses import LossName, check_loss, climbed
from calipers.attacks.engine.queue import Look, Memory, Queue, SearchOptions, WarmStart
from calipers.attacks.engine.targets import looked_at, rank_targets, target_count
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import is_adversarial
from calipers.problem.interrupts import relayed
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_RISES = 0.75  # of the steps between two checkpoints must raise the loss, or the step is halved
_MOMENTUM = 0.75  # weight of the new step; the rest goes on in the direction of the last one
# intervals between checkpoints as shares of all steps: the first, the decrease from one to the
# next, the least
_FIRST, _SHRINK, _LEAST = 0.22, 0.03, 0.06
_DENSITY = 0.2  # of all features move in the first sparse step
# if the number of changed features of the best iterate fell below this share of the last one, the
# search is still making progress
_NARROWED = 0.95
# of the three rounds of `halving`: share of the steps, first step as a share of the radius
_PARTS, _SHARES = (0.25, 0.35, 0.5), (2.0, 1.0, 0.5)
_GUIDED_SHARE = 0.5
_SPARSE_CHECK, _SPARSE_FACTOR, _SHORTEST = 0.04, 1.5, 0.03


@dataclass(frozen=True)
class APGD:
    """Auto-PGD (Croce and Hein 2020, arXiv 2003.01690), in every norm.

    Gradient ascent with momentum. The step is halved at checkpoints where too few steps raised the
    loss, and the search then goes back to the best iterate. In l1 it follows Croce and Hein 2021,
    arXiv 2103.01208. Starts are random; starts handed in (`starts` at the call) come first.

    Differs from the papers: exact projection onto the intersection of ball and box in every norm;
    target classes are ranked by distance (margin over the dual norm of its gradient) instead of by
    logits; a search ends when its point is broken; and no number of classes rules a target out.

    Cost for a point that resists: (steps + 1) x restarts x max(targets, 1) forward and backward
    passes.

    Args:
        steps: Gradient steps of each restart.
        restarts: Starts for each point (and for each target class, where `targets` > 0).
        loss: What untargeted searches climb: "cross_entropy", "margin", "dlr", "scaled", or
            "alternate" (cross-entropy and margin in turn over the restarts).
        targets: Number of other classes to attack one by one, nearest first, instead of climbing
            the `loss`; 0 attacks untargeted.
        successive_halving: With more than one target, spend the steps in three rounds: all targets,
            the best third, and the best one, each round with more steps than the one before. Later
            rounds begin at the best iterates of the round before.
        precision: "model" searches in the model's own dtype; "bfloat16" in half precision, with the
            end of each search judged in the model's own dtype.

    Raises:
        BadInput: A setting is out of its range.

    Example:
        >>> import torch, calipers
        >>> from calipers.attacks import APGD
        >>> x, y = torch.tensor([[0.6, 0.2]]), torch.tensor([0])
        >>> ball = calipers.Ball("linf", 0.25)
        >>> calipers.attack(torch.nn.Identity(), x, y, ball, APGD(steps=10)).success
        tensor([True])
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "Auto-PGD: steps choose their own length; `targets` one class at a time",
    )

    steps: int = 100
    restarts: int = 1
    loss: LossName = "cross_entropy"
    targets: int = 0
    successive_halving: bool = False
    precision: Literal["model", "bfloat16"] = "model"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise BadInput(
                f"APGD takes steps >= 1, restarts >= 1 and targets >= 0, got {self.steps}, "
                f"{self.restarts}, {self.targets}"
            )
        if self.precision not in ("model", "bfloat16"):
            raise BadInput(f"precision is 'model' or 'bfloat16', got {self.precision!r}")
        check_loss(self.loss)

    def __call__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        batch: int | None = None,
        starts: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Iterator[Attempt]:
        """Yield candidates as points are decided.

        Args:
            problem: The points to attack, with their model, labels and threat model.
            seed: Seed of the random starts.
            batch: Points in flight; does not change the result.
            starts: First iterates (N, R, S, *D), which take the place of the first R random starts
                of the searches towards each of the classes of the S margins; without targets, of
                the first R x S restarts.
            columns: Indices (N, S) of these S margins, where they are not all of them, nearest
                class first; then these are the targets.
        """
        targets = target_count(problem, self.targets)
        dtype = torch.bfloat16 if self.precision == "bfloat16" else None
        # All best iterates of a block are held at once where target classes are dropped on the way.
        for places in torch.arange(len(problem), device=problem.x.device).split(
            in_flight(problem, BATCH) if targets else len(problem)
        ):
            known = _Known(*(None if t is None else t[places] for t in (starts, columns)))
            yield from relayed(
                self._block(
                    problem.take(places), targets, SearchOptions(seed, dtype, batch), known
                ),
                partial(Attempt.at_places, places=places),
            )

    def _block(
        self, problem: Problem, targets: int, options: SearchOptions, known: _Known
    ) -> Iterator[Attempt]:
        if not targets:
            recipe = Climb(self.steps, self.restarts, 0, self.loss)
            yield from Queue(problem, recipe, options, known.untargeted()).run()
            return
        warm = known.toward(
            rank_targets(problem, targets, options.in_flight)
            if known.columns is None
            else known.columns
        )
        share = 2.0 if known.starts is None else _GUIDED_SHARE
        rounds = (
            _rounds(targets, self.steps)
            if self.successive_halving and targets > 1
            else [(targets, self.steps, 2.0)]
        )
        left = torch.arange(len(problem), device=problem.x.device)
        best = problem.x.clone()
        forwards, backwards = (
            torch.ones_like(left),
            torch.full_like(left, looked_at(problem, targets) * backwards_of(problem)),
        )
        for number, (count, steps, first) in enumerate(rounds):
            part = problem.take(left)
            recipe = Climb(
                steps, self.restarts if number == 0 else 1, count, self.loss, min(first, share)
            )
            turn = options._replace(seed=options.seed + number)
            queue = Queue(part, recipe, turn, warm, keep_all=len(rounds) > 1)

            def noted(
                attempt: Attempt, queue: Queue = queue, left: Tensor = left
            ) -> Attempt | None:
                at = left[attempt.index]
                best[at], forwards[at], backwards[at] = (
                    attempt.candidate,
                    forwards[at] + attempt.forwards,
                    backwards[at] + attempt.backwards,
                )
                won = at[is_adversarial(queue.score[attempt.index])]
                return Attempt(won, best[won], forwards[won], backwards[won]) if len(won) else None

            # yielded at once, not at the end of the block, so that an interrupt does not lose them
            yield from relayed(queue.run(), noted)
            standing = torch.nonzero(queue.score > 0).flatten()
            left = left[standing]
            if number + 1 == len(rounds) or not len(standing):
                break
            warm = queue.promising(standing, rounds[number + 1][0])
        if len(left):
            yield Attempt(left, best[left], forwards[left], backwards[left])


class _Known(NamedTuple):
    """What is handed in about the points, as `APGD.__call__` takes it."""

    starts: Tensor | None
    columns: Tensor | None

    def untargeted(self) -> WarmStart:
        """Return the starts (N, R, S, *D) as those of the first R x S jobs."""
        return WarmStart(None if self.starts is None else self.starts.flatten(1, 2))

    def toward(self, targets: Tensor) -> WarmStart:
        """Return the starts of the jobs towards these margin columns (N, T)."""
        if self.columns is not None:  # the starts are those of these columns already
            return self.untargeted()._replace(targets=targets)
        return WarmStart(None if self.starts is None else chosen(self.starts, targets), targets)


def chosen(starts: Tensor, columns: Tensor) -> Tensor:
    """Return the starts of the chosen classes, in the order of jobs.

    `starts (N, R, S, *D)` and the margin columns `columns (N, T)` give (N, R T, *D).
    """
    points = torch.arange(len(starts), device=starts.device)[:, None]
    return starts.transpose(1, 2)[points, columns].transpose(1, 2).flatten(1, 2)


def _rounds(targets: int, steps: int) -> list[tuple[int, int, float]]:
    """Return the rounds of the halving schedule.

    Each round is the number of target classes that go on, the number of steps, and the length of
    the first step as a share of the radius.
    """
    counts = [targets, max(1, -(-targets // 3)), 1]
    return [
        (count, max(1, round(part * steps)), share)
        for count, part, share in zip(counts, _PARTS, _SHARES, strict=True)
    ]


@dataclass(frozen=True)
class Climb:
    """The Auto-PGD recipe for the job queue."""

    steps: int
    restarts: int
    targets: int
    loss_name: LossName
    first_share: float = 2.0
    nearest: bool = False

    def start(self, region: Region, streams: Streams, restart: Tensor) -> Tensor:
        """Return random points of the region."""
        return region.sample(streams)

    def memory(self, region: Region, x: Tensor) -> Memory:
        """Return the state of the step control, tensors (B, ...)."""
        zero, none = x.new_zeros(len(x)), x.new_full((len(x),), -torch.inf)
        share = torch.full_like(
            zero, self.first_share / 2 if region.norm.is_sparse else self.first_share
        )
        spread = torch.full_like(zero, max(1.0, float(int(_DENSITY * region.low.shape[1]))))
        memory = {
            "share": share,
            "rises": zero,
            "last": none,
            "peak": none,
            "peak_before": none,
            "halved": torch.ones_like(zero, dtype=torch.bool),
        }
        return (
            memory
            | {"previous": x, "summit": x, "slope": torch.zeros_like(x)}
            | ({"spread": spread, "density": spread} if region.norm.is_sparse else {})
        )

    def loss(self, margins: Tensor, problem: Problem, restart: Tensor) -> Tensor:
        """Return the loss of untargeted jobs, (B,)."""
        return climbed(self.loss_name, margins, problem.goal, restart)

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        """Make one step of equation (1) of the paper.

        The step begins at the iterate, or at the best iterate where a checkpoint halves the step.
        """
        m = dict(memory)
        higher = look.loss > m["peak"]
        m["summit"], m["slope"] = (
            torch.where(per_job(higher, look.x), new, m[old])
            for new, old in ((look.x, "summit"), (look.gradient, "slope"))
        )
        m["peak"] = torch.where(higher, look.loss, m["peak"])
        m["rises"] = m["rises"] + (look.loss > m["last"]).to(m["rises"].dtype)
        m["last"] = look.loss
        back = (
            self._control_sparse(look, m) if look.region.norm.is_sparse else self._control(look, m)
        )
        x, gradient = (
            torch.where(per_job(back, look.x), m[name], now)
            for name, now in (("summit", look.x), ("slope", look.gradient))
        )
        if look.region.norm.is_sparse:
            # The first step is the one-step attack: from the centre, the whole budget on as few
            # features as possible. It is optimal on a linear model.
            first = look.step == 0
            base, spread = (
                torch.where(per_job(first, x), look.region.center, x),
                torch.where(first, torch.ones_like(m["spread"]), m["spread"]),
            )
            share = torch.where(first, torch.ones_like(m["share"]), m["share"])
            target = look.region.project(look.region.step(base, gradient, share, spread))
        else:
            target = look.region.project(look.region.step(x, gradient, m["share"]))
            weight = torch.where(look.step > 0, _MOMENTUM, 1.0).to(x.dtype)
            target = look.region.project(
                x + per_job(weight, x) * (target - x) + per_job(1 - weight, x) * (x - m["previous"])
            )
        m["previous"] = x
        return target, m

    def _control(self, look: Look, m: Memory) -> Tensor:
        """Halve the steps of jobs that stall at a checkpoint.

        A job stalls if its loss rose in too few steps since the last checkpoint, or if its best
        loss has not improved although its step was not halved last time. Return which jobs go back
        to their best iterate, (B,) bool.
        """
        interval = self._intervals.to(look.step.device)[look.step.clamp(max=self.steps)].to(
            m["rises"].dtype
        )
        here = interval > 0
        stuck = ~m["halved"] & (m["peak_before"] >= m["peak"])
        halve = here & ((m["rises"] <= _RISES * interval) | stuck)
        m["share"] = torch.where(halve, m["share"] / 2, m["share"])
        m["halved"] = torch.where(here, halve, m["halved"])
        m["peak_before"] = torch.where(here, m["peak"], m["peak_before"])
        m["rises"] = torch.where(here, torch.zeros_like(m["rises"]), m["rises"])
        return halve

    def _control_sparse(self, look: Look, m: Memory) -> Tensor:
        """Adapt the number of features moved and the step length, in sparse norms.

        At a checkpoint, later steps move as many features as the best iterate has changed, divided
        by 1.5. Where that number still falls, the job begins again at its best iterate with a full
        step; elsewhere the step is shortened. Return which jobs begin again, (B,) bool.
        """
        every = max(int(_SPARSE_CHECK * self.steps), 1)
        here = (look.step > 0) & (look.step % every == 0)
        changed = ((m["summit"] - look.region.center).flatten(1) != 0).sum(1).to(m["spread"].dtype)
        narrower = here & (changed < _NARROWED * m["density"])
        shorter = (m["share"] / _SPARSE_FACTOR).clamp_min(_SHORTEST)
        m["share"] = torch.where(
            here, torch.where(narrower, torch.ones_like(shorter), shorter), m["share"]
        )
        m["spread"] = torch.where(
            here, (changed / _SPARSE_FACTOR).floor().clamp_min(1.0), m["spread"]
        )
        m["density"] = torch.where(here, changed, m["density"])
        return narrower

    @cached_property
    def _intervals(self) -> Tensor:
        """The number of steps between checkpoints, (steps + 1,).

        At each checkpoint it is the number of steps since the last one, 0 at all other steps. For
        100 steps the checkpoints are 22, 41, 57, 70, 80, 87, 93, 99.
        """
        intervals = torch.zeros(self.steps + 1, dtype=torch.long)
        gap, place = max(int(_FIRST * self.steps), 1), 0
        while place + gap <= self.steps:
            place += gap
            intervals[place] = gap
            gap = max(gap - max(int(_SHRINK * self.steps), 1), max(int(_LEAST * self.steps), 1))
        return intervals
