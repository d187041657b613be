"""What does a solver that is wrong do to a claim? Nothing: its numbers are only used after they
have been proved again.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from clocks import AMPLE
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from test_milp import ACTIVATIONS, Exact, asked, by_enumeration, exact, perceptron, small
from torch import nn

from calipers.bounds.rounding import CHECKED
from calipers.certificates import milp as milp_module
from calipers.certificates.exact import lp, tree
from calipers.certificates.exact.model import Ends, MIPModel, ends_of
from calipers.certificates.milp import MILP, _PointSearch
from calipers.errors import Contradiction
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball
from calipers.threats.region import Region

Lie = Callable[[lp.Answer], lp.Answer | None]
LIES: dict[str, Lie] = {
    "everything is infeasible": lambda a: a._replace(
        goal=None, value=np.inf, delta=None, columns=None
    ),
    "nothing is known": lambda a: None,
    "a value far too high": lambda a: a._replace(value=1e6),
    "multipliers a thousand times as large": lambda a: a._replace(multipliers=1e3 * a.multipliers),
    "multipliers of the wrong sign": lambda a: a._replace(multipliers=-a.multipliers),
    "multipliers that are no numbers": lambda a: a._replace(
        multipliers=np.full_like(a.multipliers, np.nan)
    ),
    "a point elsewhere": lambda a: (
        a
        if a.delta is None
        else a._replace(delta=-a.delta, columns=None if a.columns is None else -a.columns)
    ),
}


@cache
def exact_ends(norm: str) -> list[Exact]:
    """Return the ends of a small problem's points that an honest solver gives."""
    return exact(small(norm=norm))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("name", LIES)
def test_a_lying_solver_cannot_make_a_claim_wrong(
    name: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, real = exact_ends(norm), lp.BallPrograms.solve

    def lying(self: lp.BallPrograms, *args: object, **more: object) -> lp.Answer | None:
        answer = real(self, *args, **more)  # type: ignore[arg-type]
        return None if answer is None else LIES[name](answer)

    monkeypatch.setattr(lp.BallPrograms, "solve", lying)
    for told, right in zip(exact(small(norm=norm), MILP(seconds=1)), truth, strict=True):
        assert (
            told.lower <= right.lower * (1 + 1e-6)
            if right.upper == np.inf
            else told.lower < right.upper
        )
        assert told.upper >= right.lower


def test_a_solver_that_was_believed_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above: bounds that take the solver's value for theirs, and a solver
    that says it is high.
    """
    real = lp.BallPrograms.solve
    monkeypatch.setattr(
        lp.BallPrograms,
        "solve",
        lambda self, *args, **more: (
            None if (a := real(self, *args, **more)) is None else a._replace(value=1e6)
        ),  # type: ignore[arg-type]
    )
    believed = tree.bound_of

    def credulous(model: object, answer: lp.Answer, *args: object) -> tree.MultiplierBound:
        bound = believed(model, answer, *args)  # type: ignore[arg-type]
        return tree.MultiplierBound(answer.value, 0 * bound.slope, bound.region, 0.0)

    monkeypatch.setattr(tree, "bound_of", credulous)
    problem = small()
    claimed = [float(r.radius[0]) for r in MILP(seconds=AMPLE)(problem) if hasattr(r, "radius")]
    monkeypatch.undo()
    assert any(c > e.upper for c, e in zip(claimed, exact(problem), strict=True))


def big_m(model: nn.Sequential, problem: Problem, m: float) -> float:
    """Return what a mixed-integer solver says the linf distance of the only point is, with one
    constant for all units: a textbook program.
    """
    (w, b), (v, c) = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in model
        if isinstance(layer, nn.Linear)
    ]
    x, y = problem.x[0].numpy(), int(problem.y[0])
    d, n, best = len(x), len(b), np.inf
    size = d + 2 * n + 1  # delta, y, a, e
    for j in (j for j in range(len(c)) if j != y):
        rows, high = [], []

        def add(
            limit: float,
            *parts: tuple[int, np.ndarray],
            rows: list[np.ndarray] = rows,
            high: list[float] = high,
        ) -> None:
            row = np.zeros(size)
            for at, values in parts:
                row[at : at + len(values)] = values
            rows.append(row)
            high.append(limit)

        one = np.ones(1)
        for i in range(n):
            z = w[i] @ x + b[i]
            add(-z, (0, w[i]), (d + i, -one))  # y >= z
            add(z + m, (0, -w[i]), (d + i, one), (d + n + i, m * one))  # y <= z + M (1 - a)
            add(0.0, (d + i, one), (d + n + i, -m * one))  # y <= M a
        for i in range(d):
            add(0.0, (i, one), (size - 1, -one))
            add(0.0, (i, -one), (size - 1, -one))
        add(c[j] - c[y], (d, v[y] - v[j]))
        low = np.concatenate([-x, np.zeros(2 * n + 1)])
        top = np.concatenate([1 - x, np.full(n, np.inf), np.ones(n), [1.0]])
        whole = np.concatenate([np.zeros(d + n), np.ones(n), [0.0]])
        solved = milp(
            np.eye(size)[-1],
            constraints=LinearConstraint(np.array(rows), ub=np.array(high)),
            bounds=Bounds(low, top),
            integrality=whole,
            options={"presolve": False},
        )
        best = min(best, float(solved.fun)) if solved.success else best
    return best


def test_a_loose_constant_makes_a_solver_lie_and_no_claim_wrong() -> None:
    """With M = 1e7 the solver's own tolerance of integers lets a unit be on and off at once, or
    cuts off what is there: what it calls optimal is far from it. The same points with both of our
    ends around the distance that enumeration finds.
    """
    lies = 0
    for seed in range(12):
        activation, pieces = ACTIVATIONS["relu"]
        model = perceptron(seed, activation, (3, 5, 3))
        problem = asked(model, seed, 3, "linf")
        truth, (ends,) = by_enumeration(model, pieces, problem), exact(problem)
        said = big_m(model, problem, 1e7)
        lies += abs(said - truth) > 1e-3 * truth
        assert ends.lower <= truth * (1 + 1e-9) and (
            truth > 1 or truth * (1 - 1e-6) <= ends.lower <= truth <= ends.upper * (1 + 1e-9)
        )
    assert lies >= 1


def test_a_proof_beyond_an_example_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milp_module.Tree, "proved", property(lambda self: 10.0))
    with pytest.raises(Contradiction, match="nothing lies within 10, but an example stands at"):
        list(MILP(seconds=5)(small()))


def _searched(problem: Problem) -> _PointSearch:
    search = _PointSearch(MILP(seconds=5), problem, torch.tensor([0]))
    search.run()
    return search


def test_any_multipliers_prove_less_than_the_truth() -> None:
    """Bounds from random multipliers are below the margins of sampled points, within every radius,
    under every choice that holds at them.
    """
    search = next(
        s
        for seed in range(9)
        if (s := _searched(small(seed=seed).take([0]))).tree is not None and s.tree.model.choices
    )
    problem = search.problem
    model, region, state = (
        search.examples.model,
        search.examples.state.region,
        search.examples.state,
    )
    generator = np.random.default_rng(0)
    checked = 0
    for _ in range(200):
        radius = float(generator.uniform(0.2, 1.0)) * float(region.radius[0])
        delta = np.clip(
            generator.uniform(-radius, radius, model.inputs.shape[1]),
            region.low[0].numpy(),
            region.high[0].numpy(),
        )
        values = state.graph.values(region.center + torch.from_numpy(delta).view_as(region.center))
        made = dict(enumerate(model.pattern(model.of_values(values))))
        kept = {i: made[i] for i in made if generator.random() < 0.5}
        margins = problem.margins(values[-1])[0].numpy()
        for case, goal in model.goals.items():
            y = generator.normal(size=len(model.low_row)) * generator.random()
            answer = lp.Answer(goal, 0.0, y, None, None)
            bound = tree.bound_of(model, answer, ends_of(model, kept), region, CHECKED)
            assert bound.at(np.array([radius]))[0] <= margins[case]
            checked += bool(np.isfinite(bound.constant))
    assert checked > 50


def exactly(model: MIPModel, y: np.ndarray, ends: Ends, slope: np.ndarray) -> Fraction:
    """Return the most that the constant of a bound may be, for multipliers y and the slope that it
    states, in rational numbers.
    """

    def of(values: np.ndarray) -> list[Fraction]:
        return [Fraction(float(v)) for v in values]

    multipliers, a, b = (
        of(y),
        [of(row) for row in model.inputs.toarray()],
        [of(row) for row in model.columns.toarray()],
    )
    low_row, high_row, low, high, reach = (
        of(v) for v in (ends.low_row, ends.high_row, ends.low, ends.high, model.reach)
    )
    total = sum(
        (min(m * low_row[i], m * high_row[i]) for i, m in enumerate(multipliers)), Fraction(0)
    )
    for j in range(len(low)):
        left = Fraction(int(j == 0)) - sum(
            m * row[j] for m, row in zip(multipliers, b, strict=True)
        )
        total += min(left * low[j], left * high[j])
    for j in range(len(reach)):
        missed = -sum(m * row[j] for m, row in zip(multipliers, a, strict=True)) - Fraction(
            float(slope[j])
        )
        total -= abs(missed) * reach[j]
    return total


@cache
def some_graph() -> Graph:
    return graph_of(Classifier(nn.Linear(3, 2)), torch.zeros(1, 3))


def stated(seed: int) -> tuple[MIPModel, np.ndarray, Ends, Region]:
    """Return a model of random rows of which pairs nearly repeat each other, and multipliers that
    nearly cancel: only rounding is left.
    """
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(6, 3)), draw.normal(size=(6, 4))
    a[3:], b[3:] = a[:3] * (1 + 1e-13), b[:3] * (1 + 1e-13)
    y = 1e6 * draw.normal(size=6)
    y[3:] = -y[:3]
    ends = Ends(np.zeros(6), np.zeros(6), -draw.random(4), draw.random(4))
    radius = 0.5
    model = MIPModel(
        some_graph(),
        sparse.csr_matrix(a),
        sparse.csr_matrix(b),
        *ends,
        np.full(3, radius),
        {0: 0},
        (),
        {},
        np.array([0]),
        len(a),
    )
    return model, y, ends, Ball("linf", radius).region(torch.zeros(1, 3, dtype=torch.float64))


def too_high(seed: int) -> bool:
    model, y, ends, region = stated(seed)
    bound = tree.bound_of(model, lp.Answer(0, 0.0, y, None, None), ends, region, CHECKED)
    return Fraction(bound.constant) > exactly(model, y, ends, bound.slope)


def test_rounding_is_taken_off_what_multipliers_prove() -> None:
    assert not any(too_high(seed) for seed in range(200))


def test_mutant_without_the_allowance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken off for the coefficients that multipliers leave over, where large ones
    cancel.
    """
    real = MIPModel.sizes.func  # type: ignore[attr-defined]
    monkeypatch.setattr(MIPModel, "sizes", property(lambda self: tuple(0 * t for t in real(self))))
    assert any(too_high(seed) for seed in range(200))


def last_sums_too_high(seed: int) -> bool:
    """Is a bound above what its constant and a slope that is nearly lost in it come to, in rational
    numbers?
    """
    draw = np.random.default_rng(seed)
    constant, slope, radius = (
        float(draw.uniform(-2, 2)),
        1e-17 * draw.normal(size=3),
        float(draw.uniform(0.1, 0.5)),
    )
    bound = tree.MultiplierBound(
        constant,
        slope,
        Ball("linf", 0.5, box=None).region(torch.zeros(1, 3, dtype=torch.float64)),
        1e-15,
    )
    return Fraction(bound.below(radius)) > Fraction(constant) - Fraction(radius) * sum(
        abs(Fraction(s)) for s in slope.tolist()
    )


def test_a_bound_that_is_read_as_a_number_has_room_for_its_last_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not any(last_sums_too_high(seed) for seed in range(50))
    monkeypatch.setattr(tree, "_LAST", 0)
    assert any(last_sums_too_high(seed) for seed in range(50))
