"""Does a run that was cut short end with the brackets of one that was not? It is cut at counted
moments; `scripts/kill_runs.py` does it by the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import calipers
from calipers.api.measure import measure_exactly
from calipers.attacks.engine import query_loop, queue
from calipers.measurement import plan as plans
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import Referee
from calipers.presets import PLANS, plan_for
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.record.evidence import Evidence, Point, Question
from calipers.record.record import Record
from calipers.report.caveats import begun_anew
from calipers.report.report import summaries
from calipers.threats.substitutions import Substitutions, one_hot_groups

N, FEATURES = 7, 6


class Killed(BaseException):
    """The process is gone: nobody hands anything over."""


def net(inputs: int = FEATURES) -> nn.Module:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(inputs, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        for p in module.parameters():
            p *= 3
    return module


def points(n: int = N) -> torch.Tensor:
    return torch.rand(n, FEATURES, generator=torch.Generator().manual_seed(5))


BALL = calipers.Ball("linf", 0.12)
Run = Callable[[Record], Any]


def planned(plan: str | Plan) -> Run:
    model, x = net(), points()
    return lambda ledger: (
        calipers.measure(model, x, model(x).argmax(1), BALL, plan=plan, record=ledger).bracket
    )


def swept(ledger: Record) -> calipers.Bracket:
    model, x = net(), points()
    return calipers.curve(
        model,
        x,
        model(x).argmax(1),
        BALL,
        [0.04, 0.08, 0.12, 0.16],
        plan=SHORT["quick"],
        record=ledger,
    ).bracket


def exactly(ledger: Record) -> calipers.Bracket:
    model, x = net(), points(4)
    return measure_exactly(
        model,
        x,
        model(x).argmax(1),
        BALL,
        plan=Plan("one", (Stage(calipers.attacks.FMN(steps=10), "attack", "distance"),)),
        record=ledger,
    ).bracket


def lettered(ledger: Record) -> calipers.Bracket:
    model = net(12)
    x = (
        nn.functional.one_hot(
            torch.randint(3, (N, 4), generator=torch.Generator().manual_seed(5)), 3
        )
        .flatten(1)
        .float()
    )
    return calipers.measure(
        model,
        x,
        model(x).argmax(1),
        Substitutions(one_hot_groups(4, 3), 1),
        plan="categorical",
        record=ledger,
    ).bracket


def shortened(tool: Any) -> Any:
    """Return the tool with fewer steps and queries, of those that it holds too."""
    fields = {f.name: getattr(tool, f.name) for f in dataclasses.fields(tool)}
    most = {"steps": 4, "queries": 30, "rounds": 3, "restarts": 1}
    new = {
        k: min(v, most[k]) if k in most else shortened(v) if dataclasses.is_dataclass(v) else v
        for k, v in fields.items()
    }
    return dataclasses.replace(tool, **new)


def short(name: str) -> Plan:
    """Return the plan as it is for this threat, in small."""
    plan = plan_for(BALL, name)
    return dataclasses.replace(
        plan, stages=tuple(dataclasses.replace(s, tool=shortened(s.tool)) for s in plan.stages)
    )


SHORT = {name: short(name) for name in PLANS if name != "categorical"}
RUNS: dict[str, Run] = {name: planned(plan) for name, plan in SHORT.items()}
RUNS |= {"categorical": lettered, "sweep": swept, "exact": exactly}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few points make several blocks, and tools hand over what they have as soon as they have
    it.
    """
    monkeypatch.setattr(plans, "_POINTS", {"attack": 4, "certifier": 4})
    for module in (queue, query_loop):
        monkeypatch.setattr(module, "_SECONDS_BETWEEN_YIELDS", -1.0)


def cut(run: Run, ledger: Record, at: int, error: type[BaseException]) -> int:
    """Run with one error at the `at`-th moment: a ruling of the referee, a write before it, or
    after it. Returns how many moments there were.
    """
    count = [0]

    def watched(method: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            moment()
            result = method(*given, **named)
            if after:
                moment()
            return result

        return called

    def moment() -> None:
        count[0] += 1
        if count[0] == at:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (
            (Referee, "attempt"),
            (Referee, "claim"),
            (Record, "append"),
            (Record, "finish"),
            (Record, "decide"),
        ):
            patch.setattr(kind, name, watched(getattr(kind, name), after=kind is Record))
        with contextlib.suppress(error):
            run(ledger)
    return count[0]


def plain(bracket: calipers.Bracket) -> tuple[Any, ...]:
    return bracket.lower.tolist(), bracket.upper.tolist(), bracket.lower_tool, bracket.upper_tool


@pytest.mark.one_in(1)
@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_that_is_taken_up_ends_as_one_that_was_left_alone(
    name: str, error: type[BaseException]
) -> None:
    whole = Record()
    expected = plain(RUNS[name](whole))
    moments = cut(RUNS[name], Record(), 0, error)
    for share in (0.25, 0.7):
        ledger = Record()
        cut(RUNS[name], ledger, max(1, round(share * moments)), error)
        # and once more, sooner after its beginning
        cut(RUNS[name], ledger, max(1, round(0.3 * moments)), error)
        assert plain(RUNS[name](ledger)) == expected, f"cut at {share} of {moments}"
        assert not ledger.trust().altered


# ---- what an interrupted tool hands over
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hasty:
    """Finds a distant example of each point at its end; interrupted, it hands over a nearer one, as
    a tool may that was just at it.
    """

    cut: ClassVar[bool] = False

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield one answer a point, all at once."""
        if Hasty.cut:
            Hasty.cut = False
            yield self.answer(problem, 0.5)
            raise KeyboardInterrupt
        yield self.answer(problem, 0.9)

    def answer(self, problem: Problem, share: float) -> Attempt:
        """Return the points moved towards another class by that share of the radius."""
        points = problem.x.clone()
        points[:, 0] += share * problem.threat.radii(len(points)).to(points)
        none = torch.zeros(len(points), dtype=torch.long)
        return Attempt(torch.arange(len(points)), points, none, none)


class Step(nn.Module):
    """Class 1 above 0.52."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 2) -> (N, 2)."""
        return torch.stack([0.52 - x[:, 0], x[:, 0] - 0.52], 1)


def hasty(ledger: Record, radius: float = 0.1) -> calipers.Bracket:
    x = torch.full((3, 2), 0.5) - torch.tensor([[0.0], [0.001], [0.002]])
    return calipers.measure(
        Step(),
        x,
        torch.zeros(3, dtype=torch.long),
        calipers.Ball("linf", radius),
        plan=Plan("one", (Stage(Hasty(), "attack"),)),
        record=ledger,
    ).bracket


def test_finds_of_an_interrupted_block_count_until_it_is_done_again(tmp_path: Path) -> None:
    whole = plain(hasty(Record()))
    with Record(tmp_path / "run.calipers") as ledger:
        Hasty.cut = True
        early = hasty(ledger)
        assert (early.upper < whole[1]).all(), "what was handed over is known"
        assert plain(hasty(ledger)) == whole
        assert plain(hasty(ledger)) == whole
    with Record(tmp_path / "run.calipers") as ledger:
        (asked,) = ledger.questions()
        assert len([e for e in ledger.evidence(asked.fingerprint) if e.kind == "witness"]) == 3
        assert ledger.trust().facts == 3 + 3 + 3 + 3, (
            "clean answers, both kinds of witnesses, attempts: nothing is thrown away"
        )
        assert not ledger.trust().altered


def test_finds_of_another_radius_stand(tmp_path: Path) -> None:
    """The block of one radius was dealt to its end; a cut at another radius takes nothing of it
    away.
    """
    ledger = Record()
    near = hasty(ledger, 0.06)
    Hasty.cut = True
    hasty(ledger, 0.2)
    assert plain(hasty(ledger, 0.2)) == plain(near)


@pytest.mark.parametrize("mutant", ["nothing is passed over", "a block is not asked at a radius"])
def test_keeping_them_for_good_is_found_out(
    mutant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if mutant == "nothing is passed over":

        def finish(
            self: Record,
            fingerprint: str,
            tried: list[Evidence],
            found: list[Evidence],
            *,
            run: int,
        ) -> set[Any]:
            self.append(fingerprint, tried, run=run)
            return set()

        monkeypatch.setattr(Record, "finish", finish)
    else:
        append = Record.append
        monkeypatch.setattr(
            Record,
            "append",
            lambda self, f, facts, *, run: append(
                self, f, [dataclasses.replace(e, asked_radius=math.nan) for e in facts], run=run
            ),
        )
    with pytest.raises(AssertionError):
        test_finds_of_an_interrupted_block_count_until_it_is_done_again(tmp_path)


# ---- the clock
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timed:
    """Proves each point within its time, as the clock will have it: every time it is asked a little
    less.
    """

    seconds: float = 1.0
    asked: ClassVar[list[str]] = []
    fuse: ClassVar[int] = 0

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Yield one claim a point."""
        for i, name in enumerate(problem.names):
            if len(Timed.asked) + 1 == Timed.fuse:
                Timed.fuse = 0
                raise KeyboardInterrupt
            Timed.asked.append(name)
            radius = torch.tensor([0.01 / len(Timed.asked)], dtype=torch.float64)
            none = torch.zeros(1, dtype=torch.long)
            yield Claim(
                torch.tensor([i]),
                radius,
                torch.ones(1, dtype=torch.float64),
                "float64-checked",
                none,
                none,
            )


def test_a_point_whose_time_was_spent_is_not_asked_again() -> None:
    x = torch.full((3, 2), 0.5) - torch.tensor([[0.0], [0.001], [0.002]])
    plan = Plan("one", (Stage(Timed(), "certifier"),))

    def run(ledger: Record) -> calipers.Bracket:
        return calipers.measure(
            Step(),
            x,
            torch.zeros(3, dtype=torch.long),
            calipers.Ball("linf", 0.1),
            plan=plan,
            record=ledger,
        ).bracket

    ledger, Timed.fuse = Record(), 3
    Timed.asked.clear()
    early = run(ledger)
    assert not said(ledger)
    late = run(ledger)
    (told,) = said(ledger)
    assert (
        told
        == "Timed(seconds=1.0) was stopped at work and began its time anew: what it proved may "
        "differ from what a run left alone proves."
    )
    run(ledger)
    assert said(ledger) == [told]
    assert len(Timed.asked) == len(set(Timed.asked)) == 3
    assert (
        early.lower[:2].tolist() == late.lower[:2].tolist() == [0.01, 0.005] and late.lower[2] > 0
    )


def said(ledger: Record) -> list[str]:
    return list(begun_anew(summaries(ledger)[0]))


def test_two_who_finish_the_same_block_keep_the_finds_of_both(tmp_path: Path) -> None:
    """Whoever is through last takes back what it found itself."""
    first, second = Record(tmp_path / "r"), Record(tmp_path / "r")
    first.ask(Question("q", "q"), [Point("p", 0, 1, 0.1, points(1).numpy())])
    near, far = (Evidence("p", "witness", "PGD()", r, asked_radius=0.1) for r in (0.05, 0.08))
    tried = [Evidence("p", "attempt", "PGD()", 0.1)]
    first.append("q", [near])
    second.append("q", [far])
    assert first.finish("q", tried, [near]) == {far.key}
    assert second.finish("q", tried, [far, near]) == set()
    assert {e.radius for e in first.evidence("q") if e.kind == "witness"} == {0.05, 0.08}
    assert not first.trust().altered and not second.trust().altered
