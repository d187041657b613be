"""Do both jaws close on the exact distance where it is known? Logistic regression on scikit-learn's
digits, every norm, with and without box.
"""

import numpy as np
import pytest
import torch
from torch import nn

import calipers
from calipers.attacks.fgsm import FGSM
from calipers.attacks.radius_bisection import RadiusBisection
from calipers.certificates.radius import CertifiedRadius
from calipers.measurement.plan import Plan, Stage

TOLERANCE = 1e-5
POINTS = 200


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A logistic regression of 10 classes on 64 features in [0, 1], float64, and 200 points it was
    not trained on.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    fitted = LogisticRegression(max_iter=2000, C=1.0).fit(images[POINTS:], labels[POINTS:])
    model = nn.Linear(64, 10, dtype=torch.float64)
    model.load_state_dict(
        {"weight": torch.tensor(fitted.coef_), "bias": torch.tensor(fitted.intercept_)}
    )
    return model.eval(), torch.tensor(images[:POINTS]), torch.tensor(labels[:POINTS])


def measured(
    digits: tuple[nn.Linear, torch.Tensor, torch.Tensor], norm: str, box: tuple[float, float] | None
) -> calipers.Bracket:
    """Run an attack that is exact on linear models, and the certificate, both as searches for the
    distance.
    """
    model, x, y = digits
    plan = Plan(
        "exact",
        (
            Stage(
                RadiusBisection(FGSM(targets=9), rounds=40, tolerance=1e-7), "attack", "distance"
            ),
            Stage(
                CertifiedRadius(calipers.certificates.CROWN(), rounds=40, tolerance=2e-6),
                "certifier",
                "distance",
            ),
        ),
    )
    start = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
    return calipers.measure(model, x, y, calipers.Ball(norm, start, box), plan=plan).bracket


def test_brackets_close_without_a_box(digits: tuple[nn.Linear, torch.Tensor, torch.Tensor]) -> None:
    """The exact distance is the smallest margin over the dual norm of its gradient."""
    model, x, y = digits
    for norm in ("linf", "l2", "l1"):
        exact = np.array(
            [min(_rival_distances(model, x[i], int(y[i]), norm)) for i in range(POINTS)]
        )
        _closed(measured(digits, norm, None), np.maximum(exact, 0))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_brackets_close_inside_a_box(
    digits: tuple[nn.Linear, torch.Tensor, torch.Tensor], norm: str
) -> None:
    """The exact distance is that of the nearest point of [0, 1]^64 where some rival ties: a linear
    program, or for l2 a quadratic one.
    """
    model, x, y = digits
    bracket = measured(digits, norm, (0.0, 1.0))
    gaps = (bracket.upper - bracket.lower) <= TOLERANCE * bracket.upper
    assert gaps.all(), (
        f"{(~gaps).sum()} brackets stay open, the widest at {np.flatnonzero(~gaps)[:5]}"
    )
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    for i in range(0, POINTS, 10):
        if bracket.upper[i] == 0:
            continue
        exact = min(
            _boxed_distance(weight, bias, x[i].numpy(), int(y[i]), j, norm)
            for j in range(10)
            if j != int(y[i])
        )
        assert bracket.lower[i] <= exact * (1 + 1e-7), (
            f"point {i}: certified {bracket.lower[i]} above the exact {exact}"
        )
        assert bracket.upper[i] >= exact * (1 - 1e-6), (
            f"point {i}: a witness at {bracket.upper[i]} below the exact {exact}"
        )


def _closed(bracket: calipers.Bracket, exact: np.ndarray) -> None:
    wrong = exact == 0
    assert (bracket.upper[wrong] == 0).all()
    right = ~wrong
    assert (bracket.lower[right] <= exact[right]).all(), "a certificate above the exact distance"
    assert (bracket.upper[right] >= exact[right] * (1 - 1e-12)).all(), (
        "a witness below the exact distance"
    )
    gap = (bracket.upper - bracket.lower)[right] / bracket.upper[right]
    assert gap.max() <= TOLERANCE, f"widest relative gap {gap.max():.3g}"


def _rival_distances(model: nn.Linear, x: torch.Tensor, label: int, norm: str) -> list[float]:
    order = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    margins = (model(x)[label] - model(x)).detach().numpy()
    rows = (model.weight[label] - model.weight).detach().numpy()
    return [margins[j] / np.linalg.norm(rows[j], order) for j in range(10) if j != label]


def _boxed_distance(
    weight: np.ndarray, bias: np.ndarray, x: np.ndarray, label: int, target: int, norm: str
) -> float:
    """Return the exact distance to one rival inside [0, 1]^d, infinite if the box holds no tie."""
    from scipy.optimize import linprog

    a, d = weight[label] - weight[target], len(x)
    margin = a @ x + bias[label] - bias[target]
    if norm == "l2":
        return _quadratic(a, margin, x)
    # delta = up - down with up, down >= 0; l1 minimises their sum, linf a bound on each.
    if norm == "l1":
        cost, rows, right = np.ones(2 * d), np.concatenate([a, -a])[None], np.array([-margin])
        bounds = [(0, 1 - v) for v in x] + [(0, v) for v in x]
    else:
        cost = np.r_[np.zeros(d), 1.0]
        rows = np.block(
            [
                [a[None], np.zeros((1, 1))],
                [np.eye(d), -np.ones((d, 1))],
                [-np.eye(d), -np.ones((d, 1))],
            ]
        )
        right = np.r_[-margin, np.zeros(2 * d)]
        bounds = [(-v, 1 - v) for v in x] + [(0, None)]
    solved = linprog(cost, A_ub=rows, b_ub=right, bounds=bounds, method="highs")
    return float(solved.fun) if solved.status == 0 else np.inf


def _quadratic(a: np.ndarray, margin: float, x: np.ndarray) -> float:
    """Project x onto {<a, delta> <= -margin} within the box: delta = clip(-t a), with the one
    multiplier t that meets the plane (bisection; the left side is monotone).
    """
    low, high = -x, 1 - x
    reach = np.where(a > 0, low, high)
    if a @ reach > -margin:
        return np.inf
    small, large = 0.0, 1e9
    for _ in range(200):
        middle = (small + large) / 2
        small, large = (
            (middle, large) if a @ np.clip(-middle * a, low, high) > -margin else (small, middle)
        )
    return float(np.linalg.norm(np.clip(-large * a, low, high)))
