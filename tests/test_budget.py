"""Does a certifier that proves nothing end with its share of the time, one that proves go on, and
is what was not run said?

All clocks are counted, none is real.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clocks import Clock
from torch import nn

import calipers
from calipers.measurement import budget
from calipers.measurement import run as running
from calipers.measurement.budget import FLOOR, Purse
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.run import run
from calipers.presets import PLANS, plan_for
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim, Forecast
from calipers.record.record import Record
from calipers.report import caveats
from calipers.report.render import render_html
from calipers.report.report import summaries
from calipers.report.text import render_text

N = 40


@dataclass(frozen=True)
class Attack:
    """Finds nothing, and takes its time."""

    seconds: float
    clock: Clock = field(repr=False)

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        self.clock.now += self.seconds
        none = torch.zeros(len(problem), dtype=torch.long)
        yield Attempt(torch.arange(len(problem)), problem.x.clone(), none, none)


@dataclass(frozen=True)
class Slow:
    """Takes `takes` seconds a point, in `steps` between which it gives way; proves every point
    whose first feature is below `below`.
    """

    takes: float
    clock: Clock = field(repr=False)
    below: float = 0.0
    steps: int = 1
    name: str = "Slow"
    asked: list[float] = field(default_factory=list, repr=False)

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        for i in range(len(problem)):
            self.asked.append(float(problem.x[i, 0]))
            for _ in range(self.steps):
                self.clock.now += self.takes / self.steps
                give_way()
            here, good = torch.tensor([i]), bool(problem.x[i, 0] < self.below)
            radius = problem.threat.radii(len(problem))[i : i + 1]
            margin = (
                torch.ones(1, dtype=torch.float64) if good else -torch.ones(1, dtype=torch.float64)
            )
            yield Claim(
                here, radius if good else radius * 0, margin, "float64-checked", here * 0, here * 0
            )


@dataclass(frozen=True)
class Foreseen(Slow):
    """The same, and says so before."""

    said: Forecast = field(default=Forecast(0.0), repr=False)

    def forecast(self, problem: Problem) -> Forecast:
        assert len(problem) == 1
        return self.said


def posed(n: int = N) -> Problem:
    """Points 0, 1/n, 2/n ... of one feature that counts nothing, and a model that always says the
    same.
    """
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([2.0, -1.0]))
    x = torch.stack([torch.arange(n) / n, torch.zeros(n)], 1)
    return Problem.pose(
        model.eval(), x, torch.zeros(n, dtype=torch.long), calipers.Ball("linf", 0.001)
    )


def ran(
    stages: list[Stage],
    clock: Clock,
    share: float | None = 0.5,
    ledger: Record | None = None,
    problem: Problem | None = None,
) -> Record:
    """Run a plan of these stages."""
    ledger = ledger or Record()
    assert run(
        problem or posed(), Plan("budget", tuple(stages), lower_share=share), ledger, clock=clock
    )
    return ledger


def facts(ledger: Record, key: str = "not_run") -> dict[str, dict[str, object]]:
    """Return what a run noted of its stages."""
    found = ledger.runs(ledger.questions()[0].fingerprint)[-1].notes.get(key, {})
    assert isinstance(found, dict)
    return found


def said(ledger: Record) -> list[str]:
    """Return the sentences on what was not run."""
    (summary,) = summaries(ledger)
    sentences = list(caveats.not_run(summary))
    assert all(sentence in render_text([summary]) for sentence in sentences)
    assert all(sentence in list(caveats.limits(summary)) for sentence in sentences)
    return sentences


def trial(tool: Slow, audit: int | None = 16) -> Stage:
    """Return the stage of a certifier."""
    return Stage(tool, "certifier", pilot=audit)


# ---- a trial, and beyond it
# --------------------------------------------------------------------------------------------------


def proving_nothing_ends() -> None:
    clock = Clock()
    tool = Slow(1.0, clock)
    ledger = ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    assert len(tool.asked) == 16 and facts(ledger, "audits")[repr(tool)] == {
        "kind": "certifier",
        "open": N,
        "tried": 16,
    }
    # drawn at random, or the bound on what was missed means nothing
    assert {round(v * N) for v in tool.asked} != set(range(16))


def proving_goes_on() -> None:
    clock = Clock()
    tool = Slow(1.0, clock, below=2.0)
    ledger = ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    assert len(tool.asked) == N and not facts(ledger)


def going_on_ends_where_nothing_more_is_proved() -> None:
    """Points are dealt in an order drawn at random; with 15 s without a proof it ends, whatever it
    proved before.
    """
    clock = Clock()
    tool = Slow(10.0, clock, below=0.2)
    ledger = ran([Stage(Attack(30.0, clock), "attack"), trial(tool, None)], clock, share=0.5)
    assert 0 < len(tool.asked) < N
    if facts(ledger)[repr(tool)]["proved"]:
        assert "more points" in said(ledger)[0]


def too_dear_is_not_begun() -> None:
    clock = Clock()
    tool = Foreseen(1000.0, clock, said=Forecast(1000.0))
    ledger = ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    assert not tool.asked and facts(ledger)[repr(tool)]["why"] == "cost"
    (sentence,) = said(ledger)
    assert (
        "about 11.1 h for 40 points of this size" in sentence
        and "not run" in sentence
        and "--lower-share all" in sentence
    )


def what_does_not_fit_waits() -> None:
    """A trial of 16 s does not fit the 5 s that it may have after the first attack, but the 55 s
    that it may have after both.
    """
    clock = Clock()
    tool = Foreseen(1.0, clock, below=2.0, said=Forecast(1.0))
    first, second = Attack(10.0, clock), Attack(100.0, clock)
    ledger = ran([Stage(first, "attack"), trial(tool), Stage(second, "attack")], clock)
    tried = [
        e.tool for e in ledger.evidence(ledger.questions()[0].fingerprint) if e.kind == "attempt"
    ]
    assert (
        repr(second) in tried
        and tried.index(repr(second)) < tried.index(repr(tool))
        and len(tool.asked) == N
    )


def what_fits_does_not_wait() -> None:
    clock = Clock()
    tool = Foreseen(1.0, clock, below=2.0, said=Forecast(1.0))
    second = Attack(200.0, clock)
    ledger = ran(
        [Stage(Attack(100.0, clock), "attack"), trial(tool), Stage(second, "attack")], clock
    )
    tried = [
        e.tool for e in ledger.evidence(ledger.questions()[0].fingerprint) if e.kind == "attempt"
    ]
    assert repr(second) not in tried and len(tool.asked) == N  # what is proved nobody attacks


def a_point_is_left_inside() -> None:
    """A point of 1000 s is left after the 50 s of its turn; what was proved before it stands."""
    clock = Clock()
    tool = Slow(1000.0, clock, steps=1000)
    ledger = ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    # once in its place, and once at the end
    assert len(tool.asked) == 2 and clock.now <= 100 + 2 * 51
    assert facts(ledger)[repr(tool)]["why"] == "time"


def without_hope_is_not_begun() -> None:
    clock = Clock()
    tool = Foreseen(1.0, clock, below=2.0, said=Forecast(1.0, 0, "its bound is far off"))
    ledger = ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    assert not tool.asked and "without hope: its bound is far off" in said(ledger)[0]


def cheap_is_tried_even_without_hope() -> None:
    clock = Clock()
    tool = Foreseen(0.01, clock, below=2.0, said=Forecast(0.01, 0, "its bound is far off"))
    ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    assert len(tool.asked) == N


def too_large_is_not_begun() -> None:
    clock = Clock()
    tool = Foreseen(0.01, clock, below=2.0, said=Forecast(0.01, 2**60))
    ledger = ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    assert not tool.asked and "GB at once" in said(ledger)[0]


def the_fallback_has_what_is_too_dear() -> None:
    clock = Clock()
    dear, cheap = (
        Foreseen(1000.0, clock, said=Forecast(1000.0)),
        Slow(0.1, clock, below=2.0, name="Cheap"),
    )
    ran(
        [
            Stage(Attack(100.0, clock), "attack"),
            trial(dear),
            dataclasses.replace(trial(cheap), fallback=True),
        ],
        clock,
    )
    assert not dear.asked and len(cheap.asked) == N


def no_fallback_for_what_was_tried() -> None:
    clock = Clock()
    tried, cheap = Slow(1.0, clock), Slow(0.1, clock, below=2.0, name="Cheap")
    ran(
        [
            Stage(Attack(100.0, clock), "attack"),
            trial(tried),
            dataclasses.replace(trial(cheap), fallback=True),
        ],
        clock,
    )
    assert len(tried.asked) == 16 and not cheap.asked


GUARDS = [
    proving_nothing_ends,
    proving_goes_on,
    going_on_ends_where_nothing_more_is_proved,
    too_dear_is_not_begun,
    what_does_not_fit_waits,
    what_fits_does_not_wait,
    a_point_is_left_inside,
    without_hope_is_not_begun,
    cheap_is_tried_even_without_hope,
    too_large_is_not_begun,
    the_fallback_has_what_is_too_dear,
    no_fallback_for_what_was_tried,
]


@pytest.mark.one_in(1)
@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_a_turn(guard: Callable[[], None]) -> None:
    guard()


def _all_begun(self: Purse, told: Forecast | None, points: int) -> str:
    return "through"


def _without_leash(self: Purse) -> float:
    return float("inf")


MUTANTS: dict[str, tuple[object, str, object, list[Callable[[], None]]]] = {
    "whatever is forecast": (
        Purse,
        "_refused",
        _all_begun,
        [
            too_dear_is_not_begun,
            what_does_not_fit_waits,
            without_hope_is_not_begun,
            too_large_is_not_begun,
            the_fallback_has_what_is_too_dear,
        ],
    ),
    "no end": (
        Purse,
        "allowance",
        property(_without_leash),
        [a_point_is_left_inside, going_on_ends_where_nothing_more_is_proved, too_dear_is_not_begun],
    ),
    "the first points for all": (
        running._Session,
        "_drawn",
        lambda self, places: list(places),
        [proving_nothing_ends],
    ),
    "never hopeless": (budget, "FLOOR", 1e9, [without_hope_is_not_begun]),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_lifted_guard_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, wrong, guards = MUTANTS[mutant]
    monkeypatch.setattr(where, what, wrong)
    for guard in guards:
        with pytest.raises(AssertionError):
            guard()


def test_proofs_buy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 points of 10 s each, all proved, under an allowance of 15 s: all of them, but not if
    proofs buy none.
    """

    def count() -> int:
        clock = Clock()
        tool = Slow(10.0, clock, below=2.0)
        ran([Stage(Attack(30.0, clock), "attack"), trial(tool, None)], clock)
        return len(set(tool.asked))

    assert count() == N
    monkeypatch.setattr(Purse, "proved", lambda self: None)
    assert count() < N


# ---- whoever asks for more gets it, and whoever resumes gets the same
# ----------------------------------------------------------------------------------


def test_without_a_share_nothing_is_limited() -> None:
    clock = Clock()
    tool = Foreseen(1e5, clock, said=Forecast(1e5, 2**60, "no hope"))
    ran([Stage(Attack(1.0, clock), "attack"), trial(tool, None)], clock, share=None)
    assert len(tool.asked) == N


def test_a_few_seconds_are_always_had() -> None:
    purse = Purse(0.5, Clock())
    assert purse.allowance == FLOOR
    purse.attacks = 100.0
    assert purse.allowance == 50.0
    purse.spent = 30.0
    assert purse.allowance == 20.0


@pytest.mark.parametrize("dear", [True, False])
def test_a_resumed_run_repeats_what_the_clock_decided(dear: bool, tmp_path: Path) -> None:
    """The second run's clock would decide otherwise."""
    counts, brackets = [], []
    for costs in ((1000.0 if dear else 0.1), (0.1 if dear else 1000.0)):
        clock = Clock()
        tool = Foreseen(costs, clock, below=2.0, name="Same", said=Forecast(costs))
        tool = dataclasses.replace(tool, takes=0.0)
        with Record(tmp_path / "run.calipers") as ledger:
            ran([Stage(Attack(1.0, Clock()), "attack"), trial(tool)], clock, ledger=ledger)
            counts.append(len(tool.asked))
            brackets.append(
                [
                    (e.point, e.kind, e.radius)
                    for e in ledger.evidence(ledger.questions()[0].fingerprint)
                ]
            )
    assert counts == ([0, 0] if dear else [N, 0]) and brackets[0] == brackets[1]


def test_a_resumed_run_that_forgets_its_decisions_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Record, "decide", lambda self, fingerprint, scope, key, make: make())
    with pytest.raises(AssertionError):
        test_a_resumed_run_repeats_what_the_clock_decided(True, tmp_path)


def test_more_of_the_time_is_another_run(tmp_path: Path) -> None:
    """What was not run for its cost is run by the same command with all the time it takes."""
    clock = Clock()
    tool = Foreseen(0.0, clock, below=2.0, said=Forecast(1000.0))
    with Record(tmp_path / "run.calipers") as ledger:
        ran([Stage(Attack(1.0, clock), "attack"), trial(tool)], clock, ledger=ledger)
        assert not tool.asked
        ran([Stage(Attack(1.0, clock), "attack"), trial(tool)], clock, share=None, ledger=ledger)
        assert len(tool.asked) == N and not said(ledger)


def test_a_limit_in_seconds_holds_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=clock, time_ns=time.time_ns))
    tool, ledger = Slow(1.0, clock, below=2.0), Record()
    plan = Plan("short", (trial(tool, None),), seconds=10.0)
    assert not run(posed(), plan, ledger)
    evidence = ledger.evidence(ledger.questions()[0].fingerprint)
    assert len(tool.asked) == 10 and sum(e.kind == "certificate" for e in evidence) == 9
    assert not any(e.kind == "attempt" for e in evidence)  # the block was not done
    assert run(posed(), dataclasses.replace(plan, seconds=1e9), ledger)
    assert (
        sum(e.kind == "certificate" for e in ledger.evidence(ledger.questions()[0].fingerprint))
        == N
    )


# ---- what users see
# --------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_not_run(tmp_path: Path) -> None:
    clock = Clock()
    tool = Foreseen(1000.0, clock, said=Forecast(1000.0))
    ledger = ran([Stage(Attack(100.0, clock), "attack"), trial(tool)], clock)
    page = render_html(ledger, tmp_path / "page.html").read_text()
    assert "about 11.1 h for 40 points of this size" in page


@pytest.mark.parametrize("name", ["quick", "standard", "brackets", "thorough", "distance"])
def test_plans_bound_the_lower_jaw_and_complete_does_not(name: str) -> None:
    threat = calipers.Ball("linf", 0.1)
    assert plan_for(threat, name).lower_share == PLANS[name].lower_share == 0.75
    assert plan_for(threat, "complete").lower_share is None


@pytest.mark.parametrize("share", [-0.1, float("nan")])
def test_a_share_below_nothing_is_refused(share: float) -> None:
    x = torch.rand(2, 2)
    with pytest.raises(calipers.BadInput, match="lower_share is a share"):
        calipers.measure(
            nn.Linear(2, 2).eval(),
            x,
            torch.zeros(2, dtype=torch.long),
            calipers.Ball("linf", 0.1),
            plan=calipers.Plan(lower_share=share),
        )
