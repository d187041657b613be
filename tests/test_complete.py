"""Do complete tools decide, and never wrongly? Random networks against attacks and enumeration, and
mutants that prove too much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nets
import pytest
import torch
from clocks import AMPLE
from nets import Case, attacked, random_case
from torch import Tensor, nn

from calipers.attacks.apgd import APGD
from calipers.certificates import branch_search, input_split
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN
from calipers.certificates.input_split import InputSplit
from calipers.certificates.radius import CertifiedRadius
from calipers.certificates.subproblems import Branches, Split
from calipers.errors import BadInput
from calipers.graph.capture import capture
from calipers.measurement.referee import Referee
from calipers.models.classifier import Classifier
from calipers.problem.goals import Targeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.problem.specification import Specification
from calipers.threats.ball import Ball

RELU = "aten.relu.default"


def posed(case: Case) -> Problem:
    """Return the case as a problem."""
    return Problem.pose(nets.Carrier(case).eval(), case.x, case.y, case.ball, case.goal)


def answers(tool: Any, problem: Problem) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the radii claimed (N,), and the counterexamples met, by point; every point is
    mentioned.
    """
    radius, found = torch.full((len(problem),), -1.0, dtype=torch.float64), {}
    for result in tool(problem):
        if isinstance(result, Attempt):
            found.update(
                {int(i): point for i, point in zip(result.index, result.candidate, strict=True)}
            )
        else:
            radius[result.index] = result.radius.double()
    assert bool((radius >= 0).all())
    return radius, found


def wrong(tool: Any, case: Case, seed: int) -> list[str]:
    """Name every point that is claimed though an attack breaks it, and every counterexample that
    the referee does not admit.
    """
    problem = posed(case)
    radius, found = answers(tool, problem)
    points = attacked(case, seed, steps=4)
    broken = (
        case.worst(case.graph.values(points.flatten(0, 1))[-1], len(points)).view(len(points), -1)
        <= 0
    ).any(0)
    said = [
        f"point {i} is broken and proved"
        for i in torch.nonzero((radius > 0) & broken).flatten().tolist()
    ]
    for i, point in found.items():
        here = torch.tensor([i])
        one = Attempt(
            here, point[None], torch.ones(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
        )
        witnesses = [
            e
            for e in Referee(problem).attempt(one, torch.arange(len(problem)), "t", 0.0).evidence
            if e.kind == "witness"
        ]
        inside = bool(problem.region.take(here).contains(point[None]))
        said += [] if witnesses and inside else [f"point {i}: a counterexample that is none"]
        said += [f"point {i} is proved and has a counterexample"] if radius[i] > 0 else []
    return said


TREE = BranchAndBound(seconds=2.0, steps=6, intermediate=3, batch=16)
HALVES = InputSplit(seconds=2.0, batch=64)


def tree_cases(first: int, count: int) -> Iterator[tuple[int, Case]]:
    """Random networks, half of them of ReLUs; radii beyond the box, which a problem refuses, are
    halved.
    """
    for seed in range(first, first + count):
        case = random_case(seed, RELU if seed % 2 else None)
        while True:
            try:
                posed(case)
                break
            except BadInput:
                case = case.at(case.ball.radii(len(case.x)) / 2)
        yield seed, case


def flat_cases(first: int, count: int) -> Iterator[tuple[int, Case]]:
    """Random networks over boxes in which few features move."""
    for seed in range(first, first + count):
        graph = random_case(seed, RELU if seed % 2 else None).graph
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(graph.input_shape).flatten()
        mask[torch.randperm(len(mask), generator=generator)[:3]] = 1
        ball = Ball(
            "linf",
            float(torch.rand((), generator=generator)),
            (0.0, 1.0),
            mask.bool().view(graph.input_shape),
        )
        yield seed, nets.case_of(graph, seed, ball=ball)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("block", range(4))
def test_branch_and_bound_is_never_wrong(block: int) -> None:
    for seed, case in tree_cases(block * 6, 6):
        assert not wrong(TREE, case, seed), f"seed {seed}"


def test_halving_is_never_wrong() -> None:
    for seed, case in flat_cases(0, 16):
        assert not wrong(HALVES, case, seed), f"seed {seed}"


def test_alpha_crown_is_never_wrong_and_never_proves_less_than_crown() -> None:
    more = 0
    for seed, case in tree_cases(100, 24):
        assert not wrong(AlphaCROWN(steps=8, intermediate=4), case, seed), f"seed {seed}"
        better, plain = (
            answers(tool, posed(case))[0] for tool in (AlphaCROWN(steps=8, intermediate=4), CROWN())
        )
        assert bool(((better > 0) | (plain <= 0)).all()), f"seed {seed}"
        more += int(((better > 0) & (plain <= 0)).sum())
    assert more > 0


def small(seed: int, hidden: int = 6, inputs: int = 2) -> Case:
    """Return a question about a network so small that a grid shows the truth."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 3),
    ).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    graph = capture(Classifier(module.eval()), torch.rand(3, inputs, dtype=torch.float64))
    return nets.case_of(
        graph,
        seed,
        ball=Ball("linf", 0.05 + 0.3 * float(torch.rand((), generator=generator)), (0.0, 1.0)),
    )


def least_on_a_grid(case: Case, steps: int = 60) -> Tensor:
    """Return the smallest worst margin of each point over a grid of its box, (N,)."""
    low, high = case.ball.region(case.x).outer_box()
    axis = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    points = low + grid[:, None] * (high - low)
    return (
        case.worst(case.graph.values(points.flatten(0, 1))[-1], len(points))
        .view(len(points), -1)
        .amin(0)
    )


DECIDERS = [
    BranchAndBound(seconds=AMPLE, batch=32, attack=APGD(steps=10)),
    InputSplit(seconds=AMPLE),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tool", DECIDERS, ids=["branches", "halves"])
def test_every_small_question_is_decided_as_a_grid_shows(tool: Any) -> None:
    proved = broken = 0
    for seed in range(20):
        case = small(seed)
        least = least_on_a_grid(case)
        radius, found = answers(tool, posed(case))
        for i, m in enumerate(least.tolist()):
            if m <= 0:
                assert radius[i] == 0 and (i in found), f"seed {seed}"
                broken += 1
            elif m > 0.05:
                assert radius[i] > 0 and i not in found, f"seed {seed}"
                proved += 1
    assert proved >= 10 and broken >= 10


@pytest.mark.parametrize("tool", DECIDERS, ids=["branches", "halves"])
def test_targets_and_specifications_are_decided(tool: Any) -> None:
    generator, decided = torch.Generator().manual_seed(0), 0
    for seed in range(12):
        case = small(seed)
        matrix, shifts = (
            torch.randn(4, 3, generator=generator, dtype=torch.float64),
            torch.randn(4, generator=generator, dtype=torch.float64),
        )
        for goal in (
            Targeted((case.y + 1) % 3),
            Specification(matrix, shifts, torch.tensor([0, 0, 1, 1])),
            Specification(matrix, shifts, torch.tensor([1, 0, 0, 0])),
        ):
            asked = nets.replace(case, goal=goal)
            logits = case.graph.values(case.x)[-1]
            asked = asked.take(
                torch.nonzero(goal.worst(goal.margins(logits, case.y)) > 0).flatten()
            )
            if not len(asked.x):
                continue
            low, high = asked.ball.region(asked.x).outer_box()
            axis = torch.linspace(0, 1, 60, dtype=torch.float64)
            grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
            points = (low + grid[:, None] * (high - low)).flatten(0, 1)
            every = (
                asked.goal
                if isinstance(goal, Specification)
                else Targeted(asked.goal.target.repeat(len(grid)))
            )  # type: ignore[attr-defined]
            least = (
                every.worst(every.margins(case.graph.values(points)[-1], asked.y.repeat(len(grid))))
                .view(len(grid), -1)
                .amin(0)
            )
            radius, found = answers(tool, posed(asked))
            for i, m in enumerate(least.tolist()):
                assert not (m <= 0 and radius[i] > 0) and not (
                    m > 0 and radius[i] == 0 and i not in found and m > 0.1
                ), f"seed {seed}"
                decided += int(radius[i] > 0 or i in found)
    assert decided > 20


def test_a_handed_in_attack_is_asked_from_the_minimisers() -> None:
    class Spy:
        calls = 0

        def __call__(
            self, problem: Problem, *, seed: int = 0, starts: Tensor | None = None
        ) -> Iterator[Attempt]:
            assert starts is not None and bool(
                problem.region.contains(problem.region.snap(starts[:, 0, 0])).all()
            )
            Spy.calls += 1
            return APGD(steps=3)(problem, seed=seed, starts=starts)

    for seed in range(6):
        assert not wrong(
            BranchAndBound(seconds=2, batch=2, steps=2, intermediate=0, attack=Spy()),
            small(seed, hidden=12),
            seed,
        )
    assert Spy.calls


@pytest.mark.slow
def test_the_largest_radius_of_optimised_slopes_is_no_smaller() -> None:
    gains = []
    for seed in range(6):
        case = nets.replace(small(seed, hidden=16, inputs=6), ball=Ball("l2", 0.2, None))
        plain, better = (
            answers(CertifiedRadius(tool, rounds=20), posed(case))[0]
            for tool in (CROWN(), AlphaCROWN())
        )
        gains += (better / plain).tolist()
    assert min(gains) > 0.995 and max(gains) > 1.01


def test_many_free_features_and_other_norms_are_left_to_others() -> None:
    case = nets.replace(small(0), ball=Ball("l2", 0.1, (0.0, 1.0)))
    radius, found = answers(InputSplit(), posed(case))
    assert not bool(radius.any()) and not found
    assert not answers(InputSplit(features=1), posed(small(0)))[1]


@pytest.mark.parametrize(
    "settings", [{"seconds": 0}, {"steps": 0}, {"look": 0}, {"intermediate": -1}, {"batch": 0}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="BranchAndBound takes"):
        BranchAndBound(**settings)


def test_a_budget_that_runs_out_proves_nothing_and_ends_in_time() -> None:
    import time

    begun = time.process_time()
    for _, result in enumerate(
        BranchAndBound(seconds=1e-3, steps=1, intermediate=0)(posed(small(1, hidden=30, inputs=6)))
    ):
        assert isinstance(result, (Claim, Attempt))
    assert time.process_time() - begun < 20


# ---- mutants
# --------------------------------------------------------------------------------------------------


def caught(
    monkeypatch: pytest.MonkeyPatch, tool: Any, cases: Iterator[tuple[int, Case]], *mutation: Any
) -> bool:
    """Is one of the cases decided wrongly with the mutation, and not without?"""
    for seed, case in cases:
        with monkeypatch.context() as mutated:
            mutated.setattr(*mutation)
            said = wrong(tool, case, seed)
        if said:
            assert not wrong(tool, case, seed)
            return True
    return False


def asked(seeds: range) -> Iterator[tuple[int, Case]]:
    """Small questions."""
    return ((seed, small(seed)) for seed in seeds)


def test_mutant_that_forgets_one_half_of_a_split_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Split.children

    def forgets(self: Split, parents: Branches) -> Branches:
        children = sound(self, parents)
        half = torch.arange(len(parents)).repeat(2)
        return children.take(half)

    quiet = BranchAndBound(seconds=2, batch=32, steps=8)
    monkeypatch.setattr(branch_search.BranchSearch, "_counterexample", lambda self, points: None)
    assert caught(monkeypatch, quiet, asked(range(60)), Split, "children", forgets)


def test_mutant_that_closes_branches_unconfirmed_bounds_of_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(branch_search.BranchSearch, "_counterexample", lambda self, points: None)
    monkeypatch.setattr(
        branch_search, "judged", lambda problem, points: (points, torch.ones(len(points)))
    )
    hopeful = lambda dual, free, spec, offsets: torch.ones(len(spec))  # noqa: E731
    monkeypatch.setattr(
        branch_search.Ascent,
        "__call__",
        lambda self, dual, free, watch=None: (torch.ones(len(dual.rows)), free),
    )
    assert caught(
        monkeypatch,
        BranchAndBound(seconds=2, intermediate=0),
        asked(range(20)),
        branch_search,
        "confirmed",
        hopeful,
    )


def test_mutant_that_drops_one_half_of_the_input_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = input_split._BoxSearch._halve

    def forgets(self: Any, low: Tensor, high: Tensor, *rest: Tensor) -> None:
        before = len(self.low)
        sound(self, low, high, *rest)
        self.low, self.high = self.low[: before + len(low)], self.high[: before + len(low)]
        self.near = self.near[: before + len(low)]

    monkeypatch.setattr(
        input_split._BoxSearch,
        "_counterexample",
        lambda self, low, *rest: (None, torch.zeros(len(low))),
    )
    assert caught(
        monkeypatch,
        InputSplit(seconds=2),
        asked(range(60)),
        input_split._BoxSearch,
        "_halve",
        forgets,
    )
