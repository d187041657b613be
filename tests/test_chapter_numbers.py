"""Do the numbers of the textbook chapter come out? Its worked examples on linear and polynomial
scores, linear regions, exact and certified distances.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from clocks import AMPLE
from torch import Tensor, nn

from calipers.api.ask import certify
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.radius import CertifiedRadius
from calipers.geometry.gradients import linear_score_change
from calipers.geometry.hyperplanes import free_distance
from calipers.geometry.polynomials import Polynomial, largest_gradient
from calipers.geometry.regions import activation_pattern, regions_of
from calipers.geometry.segments import exit_distance, steps_to_leave
from calipers.graph.activations import TwoPieces
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

pytestmark = pytest.mark.one_in(1)


def first_layer() -> nn.Sequential:
    """Three ReLUs of two inputs, as in the chapter; what follows them has its decision boundary far
    away.
    """
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        net[0].bias.copy_(torch.tensor([-1.0, -2, 1]))
        net[2].weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
        net[2].bias.copy_(torch.tensor([100.0, 0]))
    return net.eval()


def at_half(norm: str) -> Problem:
    return Problem.pose(
        first_layer(),
        torch.full((1, 2), 0.5, dtype=torch.float64),
        torch.tensor([0]),
        Ball(norm, 0.1, box=None),
    )


# ---- polynomial scores
# --------------------------------------------------------------------------------------------------


def test_polynomial_bound_of_the_chapter() -> None:
    z = Polynomial.of({(1, 1): 3.0, (3, 0): 2.0})  # 3 x1 x2 + 2 x1^3
    assert z.degrees.tolist() == [0, 0, 3, 2]
    assert z.gradient_bound(2.0) == 36
    corner = z.gradient(np.array([[2.0, 2.0]]))[0]
    assert corner.tolist() == [30, 6] and abs(corner).sum() == 36  # attained
    assert np.hypot(*corner) == pytest.approx(30.594, abs=5e-4)
    x = np.random.default_rng(0).uniform(-2, 2, (10_000, 2))
    assert (np.abs(z.gradient(x)).sum(1) <= 36).all()


def test_polynomial_bound_is_attained_and_proved_from_above() -> None:
    z = Polynomial.of({(1, 1): 3.0, (3, 0): 2.0})
    true = largest_gradient(z, np.full(2, -2.0), np.full(2, 2.0))
    assert true.lower == 36 and 36 <= true.upper <= 36 * (1 + 2e-6)


def test_euclidean_aggregation_is_no_bound() -> None:
    z = Polynomial.of({(2, 0): 1.0, (1, 1): 1.0})  # x1^2 + x1 x2
    R = 1.7
    gradient = z.gradient(np.array([[R, R]]))[0]
    euclidean = math.sqrt(2) * 2 * R  # k s_k R^(k-1) with s_2 the Euclidean length of the weights
    assert np.hypot(*gradient) == pytest.approx(3.1623 * R, rel=1e-4)
    assert np.hypot(*gradient) > euclidean
    assert z.gradient_bound(R) >= 4 * R >= np.abs(gradient).sum() * (1 - 1e-12)


def test_linear_score_changes_by_epsilon_times_the_l1_norm() -> None:
    w = torch.randn(784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = 0.1
    assert float(linear_score_change(w, eps, "linf")) == pytest.approx(
        float(w @ (eps * w.sign())), rel=1e-12
    )
    for norm, gain in (("linf", 7.0), ("l2", 5.0), ("l1", 4.0)):
        assert float(linear_score_change(torch.tensor([3.0, -4.0]), 1.0, norm)) == pytest.approx(
            gain
        )


# ---- linear regions
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "each"),
    [("linf", (0.5, 1.5, 1.0)), ("l2", (0.5, 1.5, 1.4142)), ("l1", (0.5, 1.5, 2.0))],
)
def test_distances_of_the_three_walls(norm: str, each: tuple[float, ...]) -> None:
    problem = at_half(norm)
    normals = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64)
    gaps = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64)
    region = problem.region.take(torch.zeros(3, dtype=torch.long))
    assert free_distance(region, normals, gaps).tolist() == pytest.approx(each, abs=5e-5)
    found = regions_of(problem)
    assert float(found.border) == pytest.approx(0.5) and int(found.element) == 0
    assert 0.5 * (1 - 1e-6) <= float(found.proved_border) <= 0.5


def test_gradient_is_the_same_everywhere_inside() -> None:
    problem, net = at_half("linf"), first_layer()
    inside = 0.5 + 0.499 * (
        2 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    )
    gradients = []
    for point in (problem.x[0], *inside):
        x = point.clone()[None].requires_grad_()
        gradients.append(torch.autograd.grad(net(x)[0, 0], x)[0])
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def steps_by_walking(problem: Problem, u: Tensor, eta: float) -> int:
    """Walk, and count the steps until another pattern is met; a point on the border has not
    left.
    """
    steps, here = 0, problem.x.clone()
    before = activation_pattern(problem)
    while steps < 10_000:
        steps += 1
        here = problem.x + steps * eta * u * (1 - 1e-12)
        if not torch.equal(
            activation_pattern(Problem.pose(problem.classifier, here, problem.y, problem.threat)),
            before,
        ):
            return steps
    return steps


@pytest.mark.parametrize(
    ("norm", "u", "t", "eta", "steps"),
    [
        ("l2", (0.5**0.5, 0.5**0.5), 0.70711, 0.1, 8),
        ("l2", (0.5**0.5, 0.5**0.5), 0.70711, 0.08, 9),
        ("linf", (1.0, 1.0), 0.5, 0.08, 7),
        ("linf", (1.0, 1.0), 0.5, 0.1, 6),  # the fifth step ends on the border
    ],
)
def test_steps_to_leave_the_region(
    norm: str, u: tuple[float, float], t: float, eta: float, steps: int
) -> None:
    problem, direction = at_half(norm), torch.tensor([u], dtype=torch.float64)
    distance = exit_distance(problem, direction)
    assert float(distance) == pytest.approx(t, abs=5e-6)
    assert int(steps_to_leave(distance, eta)) == steps == steps_by_walking(problem, direction, eta)


def test_whole_numbers_of_steps_survive_rounding() -> None:
    assert 0.3 / 0.1 < 3  # what floating point makes of it
    assert int(steps_to_leave(torch.tensor([0.3], dtype=torch.float64), 0.1)) == 4
    assert float(steps_to_leave(torch.tensor([torch.inf]), 0.1)) == torch.inf


# ---- exact and certified distances
# --------------------------------------------------------------------------------------------------


def tent() -> nn.Sequential:
    """Logits (z, 0) with z = 1 - relu(x) - relu(-x) = 1 - |x|."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))
        net[2].bias.copy_(torch.tensor([1.0, 0.0]))
    return net.eval()


def test_certified_distances_of_the_tent() -> None:
    x, y, threat = (
        torch.tensor([[0.3]], dtype=torch.float64),
        torch.tensor([0]),
        Ball("linf", 0.3, box=None),
    )
    interval = certify(tent(), x, y, threat, CertifiedRadius(IBP(), rounds=40, tolerance=1e-6))
    crown = certify(tent(), x, y, threat, CertifiedRadius(CROWN(), rounds=40, tolerance=1e-6))
    assert float(interval.radius) == pytest.approx(0.5, abs=1e-4) and float(interval.radius) <= 0.5
    assert float(crown.radius) == pytest.approx(0.7, abs=1e-4) and float(crown.radius) <= 0.7
    exact = Ball("linf", 0.7 - 1e-9, box=None)
    assert bool(certify(tent(), x, y, exact, BranchAndBound(seconds=AMPLE)).certified)
    assert float((1 - x.abs() - 0.7).abs()) < 1e-12  # and 0.7 away, at 1, the margin is 0


def test_the_region_of_the_tent_ends_before_its_decision_does() -> None:
    problem = Problem.pose(
        tent(),
        torch.tensor([[0.3], [0.6]], dtype=torch.float64),
        torch.tensor([0, 0]),
        Ball("linf", 0.3, box=None),
    )
    found = regions_of(problem)
    assert found.border.tolist() == pytest.approx(
        [0.3, 0.6]
    ) and found.decision.tolist() == pytest.approx([0.7, 0.4])
    assert found.exact.tolist() == [False, True]
    assert found.lower.tolist() == pytest.approx([0.3, 0.4], rel=1e-6)


def test_the_upper_line_of_a_relu() -> None:
    g = torch.Generator().manual_seed(0)
    low, high = (
        -5 * torch.rand(10_000, generator=g, dtype=torch.float64) - 1e-3,
        5 * torch.rand(10_000, generator=g, dtype=torch.float64) + 1e-3,
    )
    lines = TwoPieces(0.0, 1.0).relax(low, high)
    torch.testing.assert_close(lines.upper_slope, high / (high - low))
    torch.testing.assert_close(
        lines.upper_slope * low + lines.upper_intercept, torch.zeros_like(low), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(lines.upper_slope * high + lines.upper_intercept, high)
    x = low + (high - low) * torch.rand(10_000, generator=g, dtype=torch.float64)
    assert bool((lines.upper_slope * x + lines.upper_intercept >= x.clamp(min=0)).all())
