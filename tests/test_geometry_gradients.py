"""Are gradients and polynomial bounds measured right? Against closed forms, finite differences and
exhaustive corners; and are wrong rules caught?
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calipers.bounds.interval import Box
from calipers.errors import BadInput
from calipers.geometry import gradients, lipschitz
from calipers.geometry.gradients import linear_score_change, sensitivity
from calipers.geometry.linear_pieces import line
from calipers.geometry.lipschitz import local_slopes
from calipers.geometry.polynomials import Polynomial, largest_gradient, largest_value
from calipers.graph.kinds import Elementwise
from calipers.problem.goals import Targeted
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

# ---- gradients
# --------------------------------------------------------------------------------------------------


def linear(classes: int = 3) -> tuple[nn.Linear, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(5, classes).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(classes, 5, generator=g, dtype=torch.float64))
        net.bias.copy_(torch.randn(classes, generator=g, dtype=torch.float64))
    x = torch.rand(7, 5, generator=g, dtype=torch.float64)
    return net.eval(), x, net(x).argmax(1)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1.0), ("l2", 2.0), ("l1", float("inf"))])
def test_a_linear_models_estimate_is_its_distance(norm: str, dual: float) -> None:
    net, x, y = linear()
    found = sensitivity(Problem.pose(net, x, y, Ball(norm, 0.1, box=None)))
    w, z = net.weight.detach(), net(x).detach()
    for i, label in enumerate(y.tolist()):
        others = [j for j in range(3) if j != label]
        each = [
            float((z[i, label] - z[i, j]) / torch.linalg.vector_norm(w[label] - w[j], dual))
            for j in others
        ]
        assert float(found.estimate[i]) == pytest.approx(min(each), rel=1e-12)
        worst = min(others, key=lambda j: float(z[i, label] - z[i, j]))
        torch.testing.assert_close(found.gradient[i], w[label] - w[worst])
        assert float(found.dual[i]) == pytest.approx(
            float(torch.linalg.vector_norm(w[label] - w[worst], dual))
        )


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_linear_score_changes_by_more_and_one_point_changes_by_as_much(norm: str) -> None:
    net, x, y = linear()
    problem = Problem.pose(net, x, y, Ball(norm, 0.25, box=None))
    w = net.weight.detach()[0]
    change = float(linear_score_change(w, 0.25, norm))
    best, delta = problem.region.offset_support(w.expand(len(x), -1))
    assert float((delta @ w).max()) == pytest.approx(change) and float(best[0]) == pytest.approx(
        change
    )
    moved = problem.region.sample(problem.streams(0))
    assert bool((((moved - x) @ w).abs() <= change * (1 + 1e-12)).all())


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    x, h = torch.rand(4, 5, dtype=torch.float64), 1e-6
    y = net(x).argmax(1)
    problem = Problem.pose(net, x, y, Ball("l2", 0.1, box=None))
    for of, value in (
        ("margin", lambda z: problem.goal.worst(problem.margins(z))),
        ("loss", lambda z: torch.nn.functional.cross_entropy(z, y, reduction="none")),
    ):
        found = sensitivity(problem, of)  # type: ignore[arg-type]
        for i in range(5):
            step = torch.zeros(5, dtype=torch.float64)
            step[i] = h
            difference = (value(net(x + step)) - value(net(x - step))) / (2 * h)
            torch.testing.assert_close(
                found.gradient[:, i], difference.detach(), atol=1e-7, rtol=1e-6
            )


def counted(norm: str, shape: tuple[int, ...]) -> None:
    """Compare with every set of changes of a linear model, each to its best corner of the box."""
    g = torch.Generator().manual_seed(3)
    channels, d = (shape[0] if norm == "pixels" else 1), math.prod(shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, 3)).double().eval()
    x = torch.rand(6, *shape, generator=g, dtype=torch.float64)
    y, ball = net(x).argmax(1), Ball(norm, 1, box=(0.0, 1.2))
    found = sensitivity(Problem.pose(net, x, y, ball))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.2], dtype=torch.float64)] * d)
    for i in range(len(x)):
        least, most = math.inf, 0.0
        for chosen in itertools.product([False, True], repeat=d // channels):
            moved = torch.tensor(chosen).repeat(channels).expand_as(corners)
            points = torch.where(moved, corners, x[i].flatten())
            z = net(points.view(-1, *shape))
            margins = z[:, y[i]] - z.masked_fill(torch.arange(3) == y[i], -torch.inf).amax(1)
            if bool((margins <= 0).any()):
                least = min(least, sum(chosen))
            if sum(chosen) == 1:
                gain = ((points - x[i].flatten()) @ found.gradient[i].flatten()).abs().max()
                most = max(most, float(gain))
        assert float(found.estimate[i]) == least
        assert math.isclose(float(found.dual[i]), most, rel_tol=1e-9)


@pytest.mark.parametrize(("norm", "shape"), [("l0", (6,)), ("pixels", (2, 3, 1))])
def test_a_linear_models_count_is_its_distance(norm: str, shape: tuple[int, ...]) -> None:
    counted(norm, shape)


@pytest.mark.parametrize(("norm", "shape"), [("l0", (6,)), ("pixels", (2, 3, 1))])
def test_a_ratio_of_margin_and_slope_is_no_count(
    norm: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "_first_order", lambda r, g, m: m / r.norm.dual(g.flatten(1)))
    with pytest.raises(AssertionError):
        counted(norm, shape)


def test_masks_and_weights_enter_the_dual_norm() -> None:
    net, x, y = linear()
    mask, weights = (
        torch.tensor([True, False, True, True, True]),
        torch.tensor([1.0, 1, 2, 4, 0.5], dtype=torch.float64),
    )
    found = sensitivity(
        Problem.pose(net, x, y, Ball("linf", 0.1, box=None, mask=mask, weights=weights))
    )
    expected = (found.gradient.abs() / weights * mask).sum(1)
    torch.testing.assert_close(found.dual, expected)
    torch.testing.assert_close(found.norms["l1"], found.gradient.abs().sum(1))


def test_what_is_wrong_or_cut_is_told() -> None:
    net, x, y = linear()
    wrong = sensitivity(Problem.pose(net, x, (y + 1) % 3, Ball("l2", 0.1, box=None)))
    assert not bool(wrong.estimate.any())

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.detach())

    cut = sensitivity(Problem.pose(Cut().eval(), x, y, Ball("l2", 0.1, box=None)))
    assert not bool(cut.norms["l2"].any()) and bool(cut.estimate.isinf().all())
    with pytest.raises(BadInput, match="loss"):
        sensitivity(Problem.pose(net, x, y, Ball("l2", 0.1, box=None)), "logit")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="counts features"):
        linear_score_change(torch.ones(3), 1.0, "l0")


def test_a_target_is_as_far_as_the_farthest_margin() -> None:
    net, x, y = linear(4)
    untargeted = sensitivity(Problem.pose(net, x, y, Ball("l2", 0.1, box=None)))
    targeted = sensitivity(
        Problem.pose(net, x, y, Ball("l2", 0.1, box=None), Targeted((y + 1) % 4))
    )
    assert bool((targeted.estimate >= untargeted.estimate).all())


# ---- polynomials
# --------------------------------------------------------------------------------------------------

terms = st.dictionaries(
    st.tuples(*[st.integers(0, 4)] * 3),
    st.floats(-5, 5, allow_subnormal=False),
    min_size=1,
    max_size=7,
)


@given(terms, st.floats(0.01, 4), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_the_bound_holds_for_random_polynomials(
    named: dict[tuple[int, ...], float], reach: float, seed: int
) -> None:
    z = Polynomial.of(named)
    rng = np.random.default_rng(seed)
    inside = rng.uniform(-reach, reach, (200, 3))
    corners = reach * np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
    steepest = np.abs(z.gradient(np.concatenate([inside, corners]))).sum(1).max()
    assert steepest <= z.gradient_bound(reach) * (1 + 1e-12) + 1e-300


@given(terms, st.floats(0.01, 1), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_no_score_changes_by_more_than_the_bound(
    named: dict[tuple[int, ...], float], radius: float, seed: int
) -> None:
    z, rng = Polynomial.of(named), np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (20, 3))
    moved = x + rng.uniform(-radius, radius, x.shape)
    room = 1e-12 * (1 + np.abs(z.value(x)) + np.abs(z.value(moved)))
    steepest = np.array([z.gradient_bound(float(r)) for r in np.abs(x).max(axis=1) + radius])
    assert (np.abs(z.value(moved) - z.value(x)) <= radius * steepest + room).all()


@given(terms, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_enclosures_hold_what_they_enclose(named: dict[tuple[int, ...], float], seed: int) -> None:
    z, rng = Polynomial.of(named), np.random.default_rng(seed)
    low = rng.uniform(-2, 1, (10, 3))
    high = low + rng.uniform(0, 2, low.shape)
    floor, ceiling = z.enclosure(low, high)
    for _ in range(20):
        value = z.value(low + (high - low) * rng.random(low.shape))
        assert (floor <= value).all() and (value <= ceiling).all()


def test_multilinear_maxima_are_at_a_corner() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = Polynomial(rng.integers(0, 2, (6, 4)), rng.normal(size=6))
        low, high = -rng.random(4), rng.random(4)
        corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
        found = largest_value(z, low, high)
        best = z.value(corners).max()
        assert found.lower <= best + 1e-9 <= found.upper + 2e-9 and found.upper == pytest.approx(
            best, rel=1e-5, abs=1e-9
        )


def test_interior_maxima_are_found() -> None:
    z = Polynomial.of({(2,): -1.0, (1,): 1.0, (0,): 2.0})  # 2 + x - x^2, largest at 1/2
    found = largest_value(z, np.array([-3.0]), np.array([3.0]))
    assert found.lower == pytest.approx(
        2.25, rel=1e-5
    ) and found.lower <= 2.25 <= found.upper <= 2.25 * (1 + 2e-6)


def test_the_gradient_bound_lies_above_the_true_maximum() -> None:
    rng = np.random.default_rng(1)
    attained = 0
    for _ in range(15):
        z = Polynomial(rng.integers(0, 4, (4, 2)), rng.normal(size=4))
        found = largest_gradient(z, np.full(2, -1.3), np.full(2, 1.3), tolerance=1e-3)
        assert found.lower <= found.upper and found.lower <= z.gradient_bound(1.3) * (1 + 1e-12)
        attained += found.upper >= 0.99 * z.gradient_bound(1.3)
    assert attained  # the bound is not idle: some polynomials reach it


def test_a_search_that_runs_out_of_boxes_still_bounds() -> None:
    z = Polynomial.of({(2, 2): 1.0, (1, 0): -1.0, (0, 3): 0.5})
    hasty = largest_value(z, np.full(2, -1.0), np.full(2, 1.0), tolerance=1e-9, most=1)
    patient = largest_value(z, np.full(2, -1.0), np.full(2, 1.0), tolerance=1e-9)
    assert hasty.upper >= patient.upper >= patient.lower >= hasty.lower


def test_the_euclidean_form_is_caught() -> None:
    """Mutant: s_k as the Euclidean length of the weights. Random polynomials refute it."""
    rng, refuted = np.random.default_rng(2), 0
    for _ in range(50):
        z = Polynomial(rng.integers(0, 3, (5, 2)), rng.normal(size=5))
        degree = z.exponents.sum(1)
        euclidean = sum(
            k * np.sqrt((z.weights[degree == k] ** 2).sum()) * 1.5 ** (k - 1)
            for k in range(1, int(degree.max()) + 1)
        )
        corners = 1.5 * np.array(list(itertools.product((-1.0, 1.0), repeat=2)))
        steepest = np.linalg.norm(z.gradient(corners), axis=1).max()
        refuted += steepest > euclidean * (1 + 1e-9)
        assert steepest <= z.gradient_bound(1.5) * (1 + 1e-12)
    assert refuted


def test_wrong_descriptions_are_refused() -> None:
    for exponents, weights in (
        (np.array([1, 2]), np.array([1.0])),
        (np.array([[-1]]), np.array([1.0])),
        (np.array([[1]]), np.array([np.nan])),
    ):
        with pytest.raises(BadInput):
            Polynomial(exponents, weights)
    with pytest.raises(BadInput, match="finite number"):
        Polynomial.of({(1,): 1.0}).gradient_bound(float("inf"))
    with pytest.raises(BadInput, match="low <= high"):
        largest_value(Polynomial.of({(1,): 1.0}), np.array([1.0]), np.array([0.0]))


# ---- slopes around a point
# --------------------------------------------------------------------------------------------------


def nets() -> list[tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(3)
    conv = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    dense = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Hardtanh(-0.5, 0.5), nn.Linear(6, 3)
    )
    return [(conv.double().eval(), (1, 6, 6)), (dense.double().eval(), (5,))]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_margin_falls_faster_than_the_bound(norm: str) -> None:
    for net, shape in nets():
        x = torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        problem = Problem.pose(net, x, net(x).argmax(1), Ball(norm, 0.2))
        found = local_slopes(problem, samples=8)
        assert bool((found.estimate <= found.bound * (1 + 1e-9)).all()) and bool(
            (found.estimate > 0).all()
        )
        margins = problem.margins(problem.classifier.logits64(x))
        for k in range(50):
            moved = problem.region.sample(problem.streams(k))
            fallen = margins - problem.margins(problem.classifier.logits64(moved))
            assert bool(
                (fallen <= found.bound * problem.region.distance(moved)[:, None] * (1 + 1e-9)).all()
            )


def test_the_bound_is_the_gradient_where_nothing_bends() -> None:
    for net, shape in nets():
        x = torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        problem = Problem.pose(net, x, net(x).argmax(1), Ball("linf", 1e-7))
        found = local_slopes(problem, samples=1)
        torch.testing.assert_close(found.bound, found.estimate, rtol=1e-6, atol=1e-9)


def test_slopes_of_one_piece_only_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the slope at the centre for the whole region. Sampled gradients are longer than that
    bound.
    """
    net, shape = nets()[1]
    x = torch.rand(20, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem.pose(net, x, net(x).argmax(1), Ball("linf", 0.5))

    def at_the_centre(op: Elementwise, box: Box) -> tuple[Tensor, Tensor]:
        slope = line(op, (box.lower + box.upper) / 2)[0]
        return slope, slope

    monkeypatch.setattr(lipschitz, "_slopes", at_the_centre)
    found = local_slopes(problem, samples=32)
    assert bool((found.estimate > found.bound * (1 + 1e-6)).any())


def test_curved_networks_have_an_estimate_and_no_bound() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double().eval()
    x = torch.rand(2, 5, dtype=torch.float64)
    found = local_slopes(Problem.pose(net, x, net(x).argmax(1), Ball("l2", 0.1)), samples=4)
    assert bool(found.bound.isinf().all()) and bool(found.estimate.isfinite().all())
