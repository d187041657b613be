"""Are ascents before linear programs, and projections instead of them, sound and exact? Against
enumeration, with every choice left to them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_milp import (
    ACTIVATIONS,
    SETTINGS,
    against_enumeration,
    asked,
    by_enumeration,
    exact,
    perceptron,
    wrong_somewhere,
)

from calipers.bounds.rounding import CHECKED
from calipers.certificates import branch_search
from calipers.certificates.alpha_crown import Start
from calipers.certificates.branch_search import BranchSearch
from calipers.certificates.exact import beta_bounds, projection
from calipers.certificates.exact.beta_bounds import Until, ascended
from calipers.certificates.exact.encoding import encoded
from calipers.certificates.exact.model import MIPModel
from calipers.certificates.exact.projection import projected
from calipers.certificates.milp import MILP
from calipers.certificates.subproblems import Branches
from calipers.problem.problem import Problem


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ascents come before any program."""
    monkeypatch.setattr(
        MILP.__init__,
        "__defaults__",
        tuple(0 if d == 600 else d for d in MILP.__init__.__defaults__ or ()),
    )
    assert MILP().lp_budget == 0


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name not in ("relu", "clip") else [])
        for name in ACTIVATIONS
    ],
)
def test_enumeration_after_ascents(norm: str, name: str) -> None:
    for seed in (6, 8):
        against_enumeration(norm, name, seed, widths=(3, 3, 3) if name == "clip" else (3, 3, 2, 3))


def within_constraints(seed: int) -> bool:
    a, b = SETTINGS["constraints"]["constraints"]  # type: ignore[misc]
    x = torch.rand(1, 3, generator=torch.Generator().manual_seed(seed + 90), dtype=torch.float64)
    return bool((x @ a.T <= b).all())


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("constraints", "no box", "mask") else []
        )
        for name in SETTINGS
    ],
)
@pytest.mark.parametrize("norm", [pytest.param("linf", marks=[pytest.mark.slow]), "l2"])
def test_enumeration_after_ascents_in_every_setting(norm: str, setting: str) -> None:
    for seed in (3, 6) if setting != "constraints" else range(3):
        if setting != "constraints" or within_constraints(seed):
            against_enumeration(norm, "relu", seed, setting)


def test_a_square_distance_of_a_small_polyhedron() -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        matrix, square = draw.normal(size=(4, 6)), draw.random(6) + 0.5
        inside = draw.uniform(-0.8, 0.8, 6)
        ends, low, high = matrix @ inside + 0.1 * draw.random(4), np.full(6, -1.0), np.full(6, 1.0)
        found = projected(matrix, ends, square, low, high, 1e9)
        best = minimize(
            lambda d, s=square: (s * d**2).sum() / 2,
            inside,
            jac=lambda d, s=square: s * d,
            bounds=list(zip(low, high, strict=True)),
            constraints={
                "type": "ineq",
                "fun": lambda d, m=matrix, e=ends: e - m @ d,
                "jac": lambda d, m=matrix: -m,
            },
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert (
            found is not None and (matrix @ found[0] <= ends + 1e-8).all() and (found[1] >= 0).all()
        )
        assert abs((square * found[0] ** 2).sum() / 2 - best.fun) <= 1e-6 * (1 + best.fun)


def test_rows_that_contradict_each_other_are_told_by_a_large_dual_value() -> None:
    matrix, ends = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([-0.5, -0.5])
    found = projected(matrix, ends, np.ones(2), -np.ones(2), np.ones(2), 9.0)
    assert found is not None
    delta, weights = found
    assert delta @ delta / 2 + weights @ (matrix @ delta - ends) > 4.5


def around(seed: int, norm: str) -> tuple[Problem, Start, MIPModel, float, list[int]]:
    """Return a small network's question within a little more than its distance, its relaxation and
    rows, that distance, and the pieces that the nearest example is in.
    """
    activation, pieces = ACTIVATIONS["relu"]
    model = perceptron(seed, activation, (3, 3, 2, 3))
    problem = asked(model, seed, 3, norm)
    truth = by_enumeration(model, pieces, problem)
    (ends,) = exact(problem)
    with torch.no_grad():
        part = problem.at(truth * 1.01)
        start = Start.tightened(part, CHECKED, steps=2, intermediate=0)
        assert start.root is not None and ends.point is not None
        cases = {
            case: [case] for case in torch.nonzero(~(start.case_bounds[0] > 0)).flatten().tolist()
        }
        rows = encoded(start.root.state, start.spec[0], start.offsets[0], cases)
        return (
            part,
            start,
            rows,
            truth,
            rows.pattern(rows.of_values(start.state.graph.values(ends.point))),
        )


def left_of(
    seed: int, share: float, norm: str = "linf"
) -> tuple[beta_bounds.Left, float, list[int]]:
    """Return what ascents leave of a small network's branches within a share of its distance, that
    distance, and the pieces that the nearest example is in.
    """
    part, start, rows, truth, pattern = around(seed, norm)
    with torch.no_grad():
        return ascended(part, start, rows, truth * share, Until()), truth, pattern


def check_what_is_left(norm: str, seed: int) -> None:
    """Beyond the distance some branch holds the nearest example, and no more is proved than the
    distance; nothing is lost below it.
    """
    left, truth, pattern = left_of(seed, 1.005, norm)
    assert any(
        all(pattern[place] == which for place, which in made.items())
        for _, made, _ in left.branches
    )
    assert all(0 < proved <= truth for _, _, proved in left.branches)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples met on the way are overlooked, so that all branches come to their end."""
    monkeypatch.setattr(
        branch_search, "is_adversarial", lambda worst: torch.zeros_like(worst, dtype=torch.bool)
    )


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "seed", [8, *(pytest.param(k, marks=[pytest.mark.slow]) for k in (6, 9, 10))]
)
def test_what_ascents_leave_holds_the_nearest_example(norm: str, seed: int) -> None:
    check_what_is_left(norm, seed)
    below, truth, _ = left_of(seed, 0.98, norm)
    assert all(0 < proved <= truth * 0.98 for _, _, proved in below.branches)


def test_an_example_is_met() -> None:
    left, _, _ = left_of(8, 1.005)
    assert left.example is not None


def test_without_time_everything_is_left_and_proved_up_to_a_smaller_radius(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = beta_bounds.ascended
    monkeypatch.setitem(globals(), "ascended", lambda *args: real(*args[:-1], Until(-np.inf)))
    left, truth, _ = left_of(8, 0.98)
    assert left.branches and all(
        not made and 0 < proved < truth for _, made, proved in left.branches
    )


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "branches are lost": lambda m: m.setattr(
        BranchSearch, "left", lambda self: self.open.take(self.open.rows[:0])
    ),
    "options of the other side": lambda m: m.setattr(
        beta_bounds, "_choices", _turned(beta_bounds._choices)
    ),
    "the whole radius is proved": lambda m: m.setattr(
        beta_bounds,
        "_reach",
        lambda problem, start, branches, target: torch.full_like(branches.bound, target * 1.01),
    ),
    "near branches are closed": lambda m: m.setattr(
        BranchSearch, "_hand", lambda self, branches: None
    ),
}


def _turned(
    choices: Callable[..., list[tuple[int, dict[int, int]]]],
) -> Callable[..., list[tuple[int, dict[int, int]]]]:
    """Every choice is made the other way round."""
    return lambda model, root, branches: [
        (
            case,
            {place: len(model.choices[place].options) - 1 - which for place, which in made.items()},
        )
        for case, made in choices(model, root, branches)
    ]


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_what_is_handed_over_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[name](monkeypatch)
    assert any(
        wrong_somewhere(lambda s=seed: check_what_is_left("l2", s)) for seed in (6, 8, 9, 10)
    )  # type: ignore[misc]


def from_branches(seed: int) -> None:
    """What ascents leave of the branches of one choice holds the nearest example; on its other side
    no example is.
    """
    part, start, rows, truth, pattern = around(seed, "linf")
    for choice, which in enumerate(pattern):
        halves = [
            [(case, {choice: option}) for case in rows.goals] for option in (which, 1 - which)
        ]
        with torch.no_grad():
            there, beyond = (
                ascended(part, start, rows, truth * 1.005, Until(), branches=half)
                for half in halves
            )
        held = [
            any(
                all(pattern[place] == o for place, o in made.items())
                for _, made, _ in left.branches
            )
            for left in (there, beyond)
        ]
        assert held == [True, False]
        assert all(0 < proved <= truth for _, _, proved in there.branches)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("seed", [6, 8])
def test_ascents_go_on_from_branches(seed: int) -> None:
    from_branches(seed)


FORGETTING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the wrong half": lambda m: m.setattr(beta_bounds, "_cut", _other_half(beta_bounds._cut)),
    "no cuts": lambda m: m.setattr(
        beta_bounds, "_cut", lambda model, search, branches: search.open
    ),
    "branches that enter and are lost": lambda m: m.setattr(
        BranchSearch,
        "enter",
        lambda self, ends: setattr(self, "open", self.open.take(self.open.rows[:0])),
    ),
}


def _other_half(cut: Callable[..., Branches]) -> Callable[..., Branches]:
    return lambda model, search, branches: cut(
        model, search, [(case, {c: 1 - o for c, o in made.items()}) for case, made in branches]
    )


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("name", FORGETTING)
def test_a_mistake_in_where_ascents_begin_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FORGETTING[name](monkeypatch)
    assert any(wrong_somewhere(lambda s=seed: from_branches(s)) for seed in (6, 8))  # type: ignore[misc]


def test_multipliers_of_a_projection_are_proved_like_any_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a projection claims, the claim stays below the distance."""
    real = projection.LinearPiece.nearest

    def boasting(self: projection.LinearPiece, *args: object) -> object:
        found = real(self, *args)  # type: ignore[arg-type]
        return (
            None
            if found is None
            else found._replace(multipliers=found.multipliers * 1.3, price=found.price * 0.7)
        )

    monkeypatch.setattr(projection.LinearPiece, "nearest", boasting)
    activation, pieces = ACTIVATIONS["relu"]
    for seed in (6, 8):
        model = perceptron(seed, activation, (3, 3, 2, 3))
        problem = asked(model, seed, 3, "l2")
        (ends,) = exact(problem, MILP(seconds=1))
        assert ends.lower <= by_enumeration(model, pieces, problem) * (1 + 1e-6)
