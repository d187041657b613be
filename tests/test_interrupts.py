"""Is an interrupt ever the end of something that was found? The model breaks off at its n-th call; what it had shown by then must be in the record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import arsenal
import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers.attacks import adaptive_restarts
from calipers.attacks.engine import boundary_refinement, minimum_norm, query_loop, queue
from calipers.attacks.transfer import Transfer
from calipers.measurement.plan import Plan
from calipers.measurement.referee import Referee
from calipers.presets import stage_of
from calipers.problem.interrupts import relayed, remaining
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.threats.ball import Ball

N = 12
BALLS = {
    name: (attack, threat)
    for name, (attack, threat) in arsenal.arsenal().items()
    if threat != "letters"
}
TRIALS = 8  # interrupts of each attack, spread over the calls of a whole run


class Telltale(nn.Module):
    """Reads all features but the last, where every point carries its number, so it can tell whom it has been shown at which distance to be adversarial.

    It breaks off once, at the call `fuse`. What it knows belongs to the class, as some attacks work on copies.
    """

    calls, fuse, listening = 0, 0, False
    shown: ClassVar[dict[int, float]] = {}
    problem: Problem

    def __init__(self) -> None:
        super().__init__()
        self.inner = arsenal.net()

    def forward(self, x: Tensor) -> Tensor:
        """(M, 13) -> (M, 4)."""
        if not Telltale.listening or torch.compiler.is_exporting():
            return self.inner(x[:, :-1])  # type: ignore[no-any-return]
        Telltale.calls += 1
        if Telltale.calls == Telltale.fuse:
            raise KeyboardInterrupt
        logits: Tensor = self.inner(x[:, :-1])
        who, points = (x[:, -1] * N).round().long().detach(), x.detach()
        wrong = logits.detach().argmax(1) != Telltale.problem.y[who]
        distance = Telltale.problem.region.take(who).distance(points)
        for i in torch.nonzero(wrong).flatten().tolist():
            Telltale.shown[int(who[i])] = min(
                Telltale.shown.get(int(who[i]), torch.inf), float(distance[i])
            )
        return logits


def pose(threat: str) -> Problem:
    """Return the question; the feature that holds the number is masked."""
    mask = torch.arange(13) < 12
    x = torch.cat([arsenal.points(n=N), torch.arange(N, dtype=arsenal.F64)[:, None] / N], 1)
    Telltale.listening, model = False, Telltale().eval()
    radius = {"linf": 0.15, "l2": 0.3, "l0": 2.0}[threat]
    Telltale.problem = Problem.pose(
        model, x, model(x).argmax(1), Ball(threat, radius, box=(0, 1), mask=mask)
    )
    return Telltale.problem


def listened(attack: Attack, problem: Problem, fuse: int = 0) -> dict[int, float]:
    """Run the attack with an interrupt at the call `fuse`, and return the distance of each point's nearest witness."""
    Telltale.calls, Telltale.fuse, Telltale.shown, Telltale.listening = 0, fuse, {}, True
    found: dict[int, float] = {}
    try:
        for attempt in attack(problem):
            Telltale.listening = False
            for e in Referee(problem).attempt(attempt, torch.arange(N), "any", 0.0).evidence:
                i = problem.names.index(e.point)
                found[i] = min(found.get(i, torch.inf), e.radius)
            Telltale.listening = True
    except KeyboardInterrupt:
        assert fuse
    finally:
        Telltale.listening = False
    return found


def at_work(name: str) -> Attack:
    """Return the attack; of one that votes, one draw and one judge, so that each answer is a vote."""
    attack = BALLS[name][0]
    return dataclasses.replace(attack, samples=1, eval_samples=1) if name == "EOT" else attack  # type: ignore[type-var]


def lost(attack: Attack, threat: str, trials: int = TRIALS) -> list[tuple[int, set[int]]]:
    """Return the calls at which an interrupt loses points, with these; and see that there was something to lose."""
    problem = pose(threat)
    listened(attack, problem)  # some attacks look closer at a model once
    listened(attack, problem)
    whole = Telltale.calls
    losses, owed_ever = list[tuple[int, set[int]]](), set[int]()
    for fuse in sorted({round(float(f)) for f in torch.linspace(2, whole, trials)}):
        found = listened(attack, problem, fuse)
        limit = (
            torch.inf
            if stage_of(attack).objective == "distance"
            else float(problem.region.radius[0])
        )
        owed = {i for i, distance in Telltale.shown.items() if 0 < distance <= limit * (1 + 1e-9)}
        owed_ever |= owed
        if missing := owed - {i for i, distance in found.items() if distance <= limit}:
            losses.append((fuse, missing))
    # these two find what they find at their last call
    assert owed_ever or type(attack).__name__ in ("FGSM", "MultiEpsilon")
    return losses


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a dozen points need several batches, and let finds be handed over as soon as they are made."""
    for module in (queue, query_loop, boundary_refinement, adaptive_restarts):
        monkeypatch.setattr(module, "BATCH", 5)
    for module in (queue, query_loop):
        monkeypatch.setattr(module, "_SECONDS_BETWEEN_YIELDS", -1.0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", list(BALLS))
@pytest.mark.usefixtures("small_batches")
def test_whatever_was_shown_before_an_interrupt_is_a_witness_after_it(name: str) -> None:
    assert lost(at_work(name), BALLS[name][1]) == []


@pytest.mark.parametrize("name", ["PGD", "FMN", "RadiusBisection", "HopSkipJump"])
def test_the_same_in_one_batch(name: str) -> None:
    assert lost(at_work(name), BALLS[name][1]) == []


@pytest.mark.usefixtures("small_batches")
def test_the_same_of_an_attack_on_other_models() -> None:
    """The second surrogate's turn: what the target fell for in the first one's stands."""
    attack = Transfer(BALLS["PGD"][0], (unnumbered(), unnumbered()))
    assert lost(attack, "linf") == []


def unnumbered() -> nn.Module:
    return nn.Sequential(Without(), arsenal.net()).eval()


class Without(nn.Module):
    """Leaves the last feature out."""

    def forward(self, x: Tensor) -> Tensor:
        """(M, 13) -> (M, 12)."""
        return x[:, :-1]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("fuse", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["PGD", "FMN", "APGD, targets", "Square"])
def test_an_interrupt_of_the_referee_loses_nothing_either(name: str, fuse: int) -> None:
    """The interrupt falls into the replay of a witness; afterwards all that the attack was shown before is in the record."""
    attack, threat = BALLS[name]
    problem = pose(threat)
    ruled = interrupted_rulings(fuse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Referee, "attempt", ruled)
        Telltale.calls, Telltale.fuse, Telltale.shown = 0, 0, {}
        result = calipers.measure(
            problem.classifier,
            problem.x,
            problem.y,
            problem.threat,
            plan=Plan("one", (stage_of(attack),)),
        )
    known = {row.index for row in result.points if row.upper < torch.inf}
    limit = (
        torch.inf if stage_of(attack).objective == "distance" else float(problem.region.radius[0])
    )
    assert {i for i, distance in Telltale.shown.items() if 0 < distance <= limit} <= known


def interrupted_rulings(fuse: int) -> Callable[..., object]:
    """Return the referee's ruling, with an interrupt in the `fuse`-th; only what runs between rulings is told to the model."""
    rule, count = Referee.attempt, [0]

    def ruled(self: Referee, *given: object) -> object:
        count[0] += 1
        Telltale.listening = False
        if count[0] == fuse:
            raise KeyboardInterrupt
        ruling = rule(self, *given)  # type: ignore[arg-type]
        Telltale.listening = count[0] < fuse
        return ruling

    return ruled


# ---- the helpers alone -----------------------------------------------------------------------------------------------------------------------------


def holding() -> Iterator[int]:
    """Yield 1, and after an interrupt what is left."""
    try:
        yield 1
        yield 2
    except KeyboardInterrupt:
        yield 3
        yield 4
        raise


def test_what_remains_of_a_tool() -> None:
    source = holding()
    assert next(source) == 1
    assert list(remaining(source, KeyboardInterrupt())) == [3, 4]
    assert list(remaining(source, KeyboardInterrupt())) == []
    assert list(remaining(iter([1, 2]), KeyboardInterrupt())) == []


def test_an_interrupted_use_begins_again() -> None:
    tries, made = list[int](), list[int]()

    def use(value: int) -> int:
        tries.append(value)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return 10 * value

    with pytest.raises(KeyboardInterrupt):
        made.extend(relayed(holding(), use))
    assert made == [10, 30, 40] and tries == [1, 1, 3, 4]


# ---- mutants: each of the places that hold something forgets it ---------------------------------------------------------------------------------------


def forgetful_polish(problem: Problem, points: Tensor, streams: object) -> None:
    """The polish that moves nothing before its end."""
    moved = points.clone()
    boundary_refinement.polish(problem, moved, streams)  # type: ignore[arg-type]
    points.copy_(moved)


MUTANTS = {
    "a polish that keeps its finds to itself": ("CarliniWagner", minimum_norm, "polish", forgetful_polish),
    "a queue that is not told": ("FAB", minimum_norm, "remaining", lambda results, interrupt: iter(())),
    "a queue that forgets what is in flight": ("FMN", queue.Queue, "_found", lambda self, slots: []),
    "a round that forgets its answers": ("SPSA", query_loop._QueryRun, "_note", None),
    "an attack that drops what is judged": ("AdaptiveRestarts", adaptive_restarts, "relayed", lambda results, use: filter(None, map(use, results))),
}  # fmt: skip


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    "mutant",
    [pytest.param(name, marks=[pytest.mark.slow] if "polish" in name else []) for name in MUTANTS],
)
def test_forgetting_is_found_out(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, place, word, instead = MUTANTS[mutant]
    monkeypatch.setattr(place, word, instead or _only_whole_rounds(query_loop._QueryRun._note))
    assert lost(at_work(name), BALLS[name][1], trials=20)


def _only_whole_rounds(note: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what notes the answers of a round unless some are missing."""

    def noted(self: object, slots: object, region: object, asked: object, worst: Tensor) -> Tensor:
        return note(
            self,
            slots,
            region,
            asked,
            worst if bool(worst.isfinite().all()) else torch.full_like(worst, torch.inf),
        )

    return noted
