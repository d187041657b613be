"""Do families of attacks stand side by side as the plan says: the quickest first, on all that is
left where they are of use, and told where they are not?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from clocks import Clock
from torch import Tensor, nn

import calipers
from calipers.measurement import portfolio, run
from calipers.measurement.plan import Plan, Stage
from calipers.presets import PLANS, plan_for
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.record.estimates import most_missed
from calipers.report import caveats

POINTS = 60


class Sign(nn.Module):
    """Class 1 where the first feature is above a half; the second feature is a point's number, out
    of the model's sight.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2) -> (N, 2)."""
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], 1)


@dataclass(frozen=True)
class Known:
    """An attack that breaks the points of certain numbers, `first` and every `every`-th after it,
    and takes `cost` seconds a point.
    """

    name: str
    first: int
    every: int
    cost: float
    clock: Clock = field(repr=False)
    asked: list[list[int]] = field(repr=False)
    # at which calls, counted over all attacks, the user presses Ctrl-C
    stop: list[int] = field(repr=False, default_factory=list)

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield all points."""
        number = (problem.x[:, 1] * 1000).round().long()
        self.asked.append(number.tolist())
        if self.stop and self.stop.pop():
            raise KeyboardInterrupt
        self.clock.now += self.cost * len(number)
        good = (number >= self.first) & ((number - self.first) % self.every == 0)
        candidate = problem.x.clone()
        candidate[:, 0] = torch.where(good, 0.4, candidate[:, 0])
        none = torch.zeros_like(number)
        yield Attempt(torch.arange(len(number)), candidate, none, none)


NEVER = 10_000
Settings = dict[str, tuple[int, int, float]]
"""name -> first number broken, every how manieth after it, seconds a point."""


def plan_with(
    settings: Settings, clock: Clock, stop: list[int] | None = None, audit: int | None = 16
) -> tuple[Plan, dict[str, list[list[int]]]]:
    """Return a plan of families of one stage each (of several where names share a first letter),
    and what each will be asked.
    """
    asked: dict[str, list[list[int]]] = {name: [] for name in settings}
    tools = {
        name: Known(name, *values, clock, asked[name], stop if stop is not None else [])
        for name, values in settings.items()
    }
    return Plan(
        "families",
        tuple(
            Stage(tool, "attack", pilot=audit, family=name[0], waits=name[0] == "w")
            for name, tool in tools.items()
        ),
    ), asked


def measured(plan: Plan, record: Path | None = None, count: int = POINTS) -> calipers.Result:
    """Run the plan on points of class 1 at 0.6, numbered by their second feature."""
    x = torch.stack([torch.full((count,), 0.6), torch.arange(count) / 1000], 1)
    return calipers.measure(
        Sign(),
        x,
        torch.ones(count, dtype=torch.long),
        calipers.Ball("linf", 0.25),
        plan=plan,
        record=record,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock of our own in the place of the processor's."""
    own = Clock()
    monkeypatch.setattr(
        portfolio,
        "Portfolio",
        lambda table, stages, clock, real=portfolio.Portfolio: real(table, stages, own),
    )
    return own


def numbers(asked: list[list[int]]) -> list[int]:
    """Return every number that an attack was asked, each as often as it was."""
    return sorted(number for block in asked for number in block)


def test_the_quickest_goes_first_and_the_others_see_what_it_left(clock: Clock) -> None:
    plan, asked = plan_with({"slow": (0, 1, 1.0), "quick": (0, 2, 0.01)}, clock)
    result = measured(plan)
    assert numbers(asked["quick"]) == list(range(POINTS)), "of use, so run on all"
    first = asked["quick"][0]
    assert len(first) == 8 and asked["slow"][0] == first, (
        "both are tried on the same points for their places"
    )
    assert set(numbers(asked["slow"])) == {n for n in range(POINTS) if n % 2} | set(first)
    assert result.robust_accuracy.attacked.count == 0 and "audits" not in result.summary.facts


def test_no_point_is_tried_twice(clock: Clock) -> None:
    plan, asked = plan_with(
        {"a": (1, 3, 1.0), "b": (0, 3, 0.1), "c": (2, 6, 0.5), "w": (0, NEVER, 5.0)}, clock
    )
    measured(plan)
    for name, blocks in asked.items():
        assert len(numbers(blocks)) == len(set(numbers(blocks))), name


def test_what_breaks_nothing_is_left_out_and_what_it_may_have_missed_is_said(clock: Clock) -> None:
    plan, asked = plan_with({"useful": (0, 4, 1.0), "none": (NEVER, 1, 1.0)}, clock)
    result = measured(plan)
    left = sum(n % 4 > 0 for n in range(POINTS))
    (audit,) = result.summary.facts["audits"].values()
    assert audit == {"kind": "attack", "open": left, "tried": 16, "near": 8}
    assert len({n for n in numbers(asked["none"]) if n % 4}) == 24
    (line,) = (said for said in caveats.limits(result.summary) if said.startswith("Known was"))
    assert (
        f"16 random points of the {left} that were open before it and on the 8 that came nearest"
        in line
    )
    assert f"at most {most_missed(16, left)} of them" in line and line in str(result)


def test_a_stage_without_an_audit_is_run_on_all_whatever_the_sample_says(clock: Clock) -> None:
    plan, asked = plan_with({"none": (NEVER, 1, 1.0)}, clock, audit=None)
    measured(plan)
    assert numbers(asked["none"]) == list(range(POINTS))


def test_later_stages_of_a_family_follow_where_it_was_of_use(clock: Clock) -> None:
    plan, asked = plan_with(
        {
            "f1": (0, 2, 1.0),
            "f2": (1, 2, 1.0),
            "g1": (NEVER, 1, 1.0),
            "g2": (1, 2, 1.0),
            "w": (NEVER, 1, 1.0),
        },
        clock,
    )
    measured(plan)
    assert (
        set(numbers(asked["f2"])) == {n for n in range(POINTS) if n % 2}
        and asked["g2"] == []
        and asked["w"] == []
    )


def test_what_waits_is_not_asked_for_its_place(clock: Clock) -> None:
    plan, asked = plan_with({"w": (0, 1, 0.001), "f": (0, 2, 1.0)}, clock)
    measured(plan)
    assert numbers(asked["f"]) == list(range(POINTS)) and all(n % 2 for n in numbers(asked["w"]))


def test_a_few_points_are_tried_in_the_plans_order(clock: Clock) -> None:
    plan, asked = plan_with({"slow": (0, 2, 1.0), "quick": (1, 2, 0.01)}, clock)
    measured(plan, count=20)
    assert asked["slow"] == [list(range(20))] and asked["quick"] == [
        [n for n in range(20) if n % 2]
    ]


def resumed(
    folder: Path, clock: Clock, at: int
) -> tuple[list[tuple[str, list[int]]], calipers.Result]:
    """Interrupt a run at that call, take it up again with all costs turned round, and return who
    was asked what, in order, each once, and the result.
    """
    record, order, seen = (
        folder / f"{at}.calipers",
        list[tuple[str, list[int]]](),
        set[tuple[str, str]](),
    )
    for part, swap in enumerate((False, True)):
        costs = (5.0, 0.01) if swap and at else (0.01, 5.0)
        settings = {
            "a": (0, 2, 0.2),
            "b": (1, 4, costs[1]),
            "c": (3, 8, costs[0]),
            "w": (NEVER, 1, 1.0),
        }
        plan, asked = plan_with(
            settings, clock, [0] * (30 - at) + [1] + [0] * at if at and not part else []
        )
        plan = Plan(
            "families",
            tuple(
                Stage(Unpriced(s.tool), "attack", pilot=16, family=s.family, waits=s.waits)
                for s in plan.stages
            ),
        )
        result = measured(plan, record)
        for name, blocks in asked.items():
            for block in blocks:
                if (name, str(block)) not in seen:
                    seen.add((name, str(block)))
                    order.append((name, block))
        if not at:
            break
    return sorted(order), result


@dataclass(frozen=True)
class Unpriced:
    """The same attack by a name that does not tell its cost, which a record would take for another
    one.
    """

    tool: Known

    def __repr__(self) -> str:
        return f"Unpriced({self.tool.name})"

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield what the attack yields."""
        yield from self.tool(problem, seed=seed)


@pytest.mark.parametrize("at", range(5, 9))
def test_a_resumed_run_repeats_order_and_samples(tmp_path: Path, clock: Clock, at: int) -> None:
    whole, one = resumed(tmp_path, clock, 0)
    again, two = resumed(tmp_path, clock, at)
    assert again == whole
    np.testing.assert_array_equal(one.bracket.upper, two.bracket.upper)
    assert one.summary.facts.get("audits") == two.summary.facts.get("audits")


def test_an_order_that_is_measured_again_would_be_noticed(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted mistake: the seconds are not kept in the record."""
    whole, _ = resumed(tmp_path, clock, 0)
    monkeypatch.setattr(run._Session, "decide", lambda self, key, make: make())
    assert any(resumed(tmp_path, clock, at)[0] != whole for at in range(5, 9))


def test_named_plans_ask_what_fits_the_norm() -> None:
    tools = {
        norm: {type(s.tool).__name__ for s in plan_for(calipers.Ball(norm, 1.0), "standard").stages}
        for norm in ("linf", "l2", "l1", "l0")
    }
    everywhere = {"APGD", "WarmStarted", "FMN"}
    assert all(everywhere <= names for names in tools.values())
    assert [norm for norm, names in tools.items() if "DDN" in names] == ["l2"]
    assert [norm for norm, names in tools.items() if "SigmaZero" in names] == ["l0"]
    assert [norm for norm, names in tools.items() if {"FAB", "Square"} <= names] == [
        "linf",
        "l2",
        "l1",
    ]


def test_at_many_radii_each_family_tries_all_with_its_first_stage() -> None:
    stages = portfolio.in_turn(plan_for(calipers.Ball("l1", 1.0), "standard").stages)
    names = [type(s.tool).__name__ for s in stages if s.kind == "attack"]
    assert names == ["PGD", "APGD", "WarmStarted", "FMN", "FAB"]
    assert not any(s.family or s.pilot for s in stages)


def test_families_stand_together_in_the_plan() -> None:
    for plan in PLANS.values():
        parts = portfolio.parts(plan.stages)
        assert [k for part in parts for k in part] == list(range(len(plan.stages)))
        assert sum(len(part) > 1 for part in parts) <= 1


@dataclass(frozen=True)
class Nearing:
    """A search that comes to that share of the distance asked about, for points of a number
    divisible by `every`.
    """

    share: float
    every: int
    asked: list[int] = field(repr=False)

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield all points."""
        number = (problem.x[:, 1] * 1000).round().long()
        self.asked.extend(number.tolist())
        candidate = problem.x.clone()
        moved = 0.6 - problem.threat.radii(len(problem)).float() * self.share
        candidate[:, 0] = torch.where(number % self.every == 0, moved, candidate[:, 0])
        none = torch.zeros_like(number)
        yield Attempt(torch.arange(len(number)), candidate, none, none)


@pytest.mark.parametrize(
    ("share", "every", "runs"),
    [(0.9, 4, True), (0.999, 1, False), (0.9, 997, False), (0.9, 1, True)],
)
def test_a_search_for_the_nearest_is_run_on_all_where_a_sample_gains(
    share: float, every: int, runs: bool
) -> None:
    first, then = list[int](), list[int]()
    stages = (
        Stage(Nearing(0.8, 1, first), "attack", "distance"),
        Stage(Nearing(share, every, then), "attack", "distance", pilot=16),
    )
    result = measured(Plan("nearer", stages))
    assert len(first) == POINTS and len(then) == (POINTS if runs else 16)
    said = [line for line in caveats.limits(result.summary) if "came hardly nearer" in line]
    assert len(said) == (not runs) and ("audits" in result.summary.facts) == (not runs)


@dataclass(frozen=True)
class Close:
    """An attack that comes close to breaking some points, and breaks none."""

    chosen: tuple[int, ...]

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield all points."""
        near = torch.isin((problem.x[:, 1] * 1000).round().long(), torch.tensor(self.chosen))
        candidate, none = problem.x.clone(), torch.zeros(len(problem), dtype=torch.long)
        candidate[:, 0] = torch.where(near, 0.501, candidate[:, 0])
        yield Attempt(torch.arange(len(problem)), candidate, none, none)


def test_points_that_came_nearest_to_falling_call_a_family_too(clock: Clock) -> None:
    """None of the random sample falls, all of the near ones would: the family is run on all."""
    settings = {"others": (NEVER, 1, 1.0)}
    plan, asked = plan_with(settings, clock)
    measured(plan)
    drawn = set(asked["others"][0] + asked["others"][1][:16])
    unseen = tuple(
        n for n in range(POINTS) if n not in {m for block in asked["others"] for m in block}
    )[:8]
    assert not drawn & set(unseen)
    tool = Known("others", unseen[0], unseen[1] - unseen[0], 1.0, clock, [])
    met = tuple(n for n in range(unseen[0], POINTS, unseen[1] - unseen[0]))
    chosen = tuple(n for n in met if n not in drawn)[:2]
    picky = dataclasses.replace(tool, first=chosen[0], every=NEVER)
    stages = (Stage(Close(chosen), "attack"), Stage(picky, "attack", pilot=16, family="p"))
    result = measured(Plan("near", stages))
    assert "audits" not in result.summary.facts
    assert numbers(picky.asked) == list(range(POINTS))
    assert [row.verdict for row in result.points].count("broken") == 1


@dataclass(frozen=True)
class Beyond:
    """An attack that comes to an example beyond the radius: by a tenth for numbers divisible by 3,
    by two thirds for the others.
    """

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield all points."""
        number = (problem.x[:, 1] * 1000).round().long()
        candidate, none = problem.x.clone(), torch.zeros_like(number)
        candidate[:, 0] = 0.6 - 0.25 * torch.where(number % 3 == 0, 1.1, 1.67)
        yield Attempt(torch.arange(len(number)), candidate, none, none)


def looked_at(deep: Known, audit: int, near: float) -> tuple[list[list[int]], dict[str, object]]:
    """Return what a deep search is asked where examples beyond the radius are known, and what the
    record says of audits.
    """
    family = Stage(deep, "attack", pilot=audit, family="deep", waits=True, near=near)
    return deep.asked, measured(
        Plan("near", (Stage(Beyond(), "attack"), family))
    ).summary.facts.get("audits", {})  # type: ignore[return-value]


@dataclass(frozen=True)
class Slow:
    """A deep search of many steps, a thousand seconds each, that breaks number 0 at the first
    one.
    """

    clock: Clock = field(repr=False)
    steps: list[int] = field(repr=False, default_factory=list)

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield number 0, and the others at the end."""
        number = (problem.x[:, 1] * 1000).round().long()
        order, none = number.argsort(), torch.zeros_like(number)
        candidate = problem.x.clone()
        candidate[:, 0] = torch.where(number == 0, 0.4, candidate[:, 0])
        yield Attempt(order[:1], candidate[order[:1]], none[:1], none[:1])
        for step in range(100):
            self.steps.append(step)
            self.clock.now += 1000.0
            give_way()
        yield Attempt(order[1:], candidate[order[1:]], none[1:], none[1:])


@pytest.mark.parametrize("audit", [0, 16])
def test_a_further_look_takes_no_longer_than_all_before_it(
    clock: Clock, tmp_path: Path, audit: int
) -> None:
    """It ends within its own point, keeps what it found, and is not taken up again."""
    deep, record = Slow(clock), tmp_path / "record.calipers"
    before = Stage(
        Known("before", NEVER, 1, 50.0, clock, []), "attack", pilot=None, family="deep", waits=True
    )
    family = dataclasses.replace(before, tool=deep, pilot=audit, near=0.15)
    for _ in range(2):
        result = measured(
            Plan("near", (Stage(Beyond(), "attack"), before, family)), record, count=20
        )
        assert len(deep.steps) == 1, (
            "the first family took 20 x 50 s, so one step of 1000 s is all that this one has"
        )
        assert [row.verdict for row in result.points].count("broken") == 1


NEAR = [n for n in range(POINTS) if n % 3 == 0]


def test_near_misses_are_all_looked_at_again_where_that_breaks_a_few_of_them(clock: Clock) -> None:
    asked, audits = looked_at(Known("deep", 0, 3, 1.0, clock, []), 0, 0.15)
    assert len(asked[0]) == 8 and numbers(asked) == NEAR and not audits


def test_near_misses_are_left_alone_where_the_nearest_withstand(clock: Clock) -> None:
    """No random point was tried, so nothing can be said of the others."""
    asked, audits = looked_at(Known("deep", 1, 3, 1.0, clock, []), 0, 0.15)
    assert len(asked) == 1 and len(asked[0]) == 8 and set(asked[0]) <= set(NEAR) and not audits


def test_points_whose_nearest_example_nobody_looked_for_count_as_near(clock: Clock) -> None:
    deep = Known("deep", 1, 3, 1.0, clock, [])
    measured(
        Plan(
            "near",
            (
                Stage(Known("none", NEVER, 1, 1.0, clock, []), "attack"),
                Stage(deep, "attack", pilot=0, family="deep", waits=True, near=0.15),
            ),
        )
    )
    assert numbers(deep.asked) == list(range(POINTS))


def test_a_deep_search_keeps_to_points_with_a_near_example_where_it_breaks_no_others(
    clock: Clock,
) -> None:
    asked, audits = looked_at(Known("deep", 0, 3, 1.0, clock, []), 16, 0.3)
    (audit,), far = audits.values(), [n for n in numbers(asked) if n % 3]
    assert set(NEAR) <= set(numbers(asked)) and len(far) <= 16
    assert audit == {"kind": "attack", "open": POINTS - len(NEAR), "tried": len(far), "near": 0}


def test_a_deep_search_is_run_on_all_where_it_breaks_a_far_point(clock: Clock) -> None:
    asked, audits = looked_at(Known("deep", 1, 3, 1.0, clock, []), 16, 0.3)
    assert numbers(asked) == list(range(POINTS)) and not audits
