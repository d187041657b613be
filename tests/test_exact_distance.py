"""Do the attacks reach the exact distance where it is known: on linear models, on two ReLUs, and on
small trained networks?
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from beside import DATA, needs
from scipy.optimize import linprog
from test_minimum_norm import Fn, drawn, exact_linear, linear, posed, run
from torch import Tensor, nn

from calipers.attacks import radius_bisection
from calipers.attacks.apgd import APGD
from calipers.attacks.carlini_wagner import CarliniWagner
from calipers.attacks.ddn import DDN
from calipers.attacks.deepfool import DeepFool
from calipers.attacks.engine import minimum_norm
from calipers.attacks.fab import FAB
from calipers.attacks.fgsm import FGSM
from calipers.attacks.fmn import FMN
from calipers.attacks.iterative_tightening import IterativeTightening
from calipers.attacks.pgd import PGD
from calipers.attacks.radius_bisection import RadiusBisection
from calipers.attacks.sigma_zero import SigmaZero
from calipers.attacks.square import Square
from calipers.attacks.warm_start import WarmStarted
from calipers.certificates.attack_starts import RelaxationMinimizers
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.threats.ball import Ball

F64 = torch.float64
WITHIN = 1.01
TOUCH = 1 - 1e-6  # the exact distances here come from solvers of this accuracy

SEEK = [
    (norm, tool)
    for norm in ("linf", "l2", "l1")
    for tool in (FMN(), FMN(targets=3), DeepFool(), FAB(), RadiusBisection(PGD(steps=20)))
]
SEEK += [
    ("l2", DDN()),
    ("l2", CarliniWagner(steps=60, rounds=3)),
    ("l0", FMN()),
    ("l0", DeepFool()),
    ("l0", SigmaZero(steps=100)),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "box": {},
    "mask and weights": {"mask": torch.arange(8) != 3, "weights": drawn(8, seed=7) + 0.5},
    "no box": {"box": None},
}


def cases(pairs: list[tuple[str, Attack]]) -> list[Any]:
    """Return every attack in every setting; a count needs a box."""
    return [
        pytest.param(n, a, s, id=f"{n}-{a}-{s}")
        for n, a in pairs
        for s in SETTINGS
        if not (n == "l0" and s == "no box")
    ]


# ---- linear models
# --------------------------------------------------------------------------------------------------


def on_linear(norm: str, attack: Attack, setting: str) -> None:
    """Assert that the attack is within one per cent of the exact distance at each point that can be
    broken.
    """
    for seed in (0, 5):
        model = linear(seed=seed)
        problem = posed(model, drawn(8, 8, seed=seed + 1), norm, **SETTINGS[setting])
        exact = torch.tensor([exact_linear(model, problem, i) for i in range(8)], dtype=F64)
        ratio = (run(attack, problem)[1] / exact)[exact.isfinite()]
        assert len(ratio) and float(ratio.min()) >= TOUCH and float(ratio.max()) <= WITHIN


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("norm", "attack", "setting"), cases(SEEK))
def test_every_point_of_a_linear_model_within_one_per_cent(
    norm: str, attack: Attack, setting: str
) -> None:
    on_linear(norm, attack, setting)


def test_without_the_polish_some_would_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (minimum_norm, radius_bisection):
        monkeypatch.setattr(module, "polish", lambda problem, points, streams: points)
    with pytest.raises(AssertionError):
        on_linear("l2", CarliniWagner(steps=60, rounds=3), "box")


def test_a_radius_far_too_large_comes_down_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a polish, too: a radius that falls by its share alone stays too large here."""
    monkeypatch.setattr(minimum_norm, "polish", lambda problem, points, streams: points)
    on_linear("l1", FMN(), "box")


RADIUS = [
    *(
        (norm, tool)
        for norm in ("linf", "l2", "l1")
        for tool in (FGSM(targets=3), PGD(steps=100, targets=3), APGD(steps=100, targets=3))
    ),
    ("linf", Square(queries=3000)),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("norm", "attack", "setting"), cases(RADIUS))
def test_verdicts_of_a_linear_model_on_both_sides_of_the_distance(
    norm: str, attack: Attack, setting: str
) -> None:
    model = linear()
    problem = posed(model, drawn(8, 8, seed=1), norm, **SETTINGS[setting])
    exact = torch.tensor([exact_linear(model, problem, i) for i in range(8)], dtype=F64)
    near = problem.take(torch.nonzero(exact.isfinite()).flatten())
    for share, expected in ((0.99, False), (1.01, True)):
        there = near.at(share * exact[exact.isfinite()])
        assert (run(attack, there)[1].isfinite() == expected).all()


# ---- two ReLUs
# --------------------------------------------------------------------------------------------------


def two_relus(
    seed: int, features: int = 3
) -> tuple[Callable[[Tensor], Tensor], tuple[np.ndarray, ...]]:
    """Return a model of three classes on two ReLUs whose kinks pass near the middle of the box, and
    its weights.
    """
    w, b = drawn(2, features, seed=seed, normal=True), 0.3 * drawn(2, seed=seed + 50, normal=True)
    v, c = drawn(3, 2, seed=seed + 90, normal=True), 0.3 * drawn(3, seed=seed + 130, normal=True)
    b = b - w.sum(1) / 2
    return (lambda x: (x @ w.T + b).relu() @ v.T + c), tuple(t.numpy() for t in (w, b, v, c))


def exact_two_relus(norm: str, weights: tuple[np.ndarray, ...], problem: Problem, i: int) -> float:
    """Return the distance of point i: one convex program for each rival and pattern of the two
    units; on and off hold on the kink alike.
    """
    w, b, v, c = weights
    region, x, y = problem.take([i]).region, problem.x[i].numpy(), int(problem.y[i])
    # weighted lengths are plain ones of stretched features
    unit = np.ones(x.size) if region.weight is None else region.weight.numpy()
    low, high = region.low[0].numpy() * unit, region.high[0].numpy() * unit
    best = np.inf
    for j, pattern in itertools.product(
        (j for j in range(3) if j != y), itertools.product((0.0, 1.0), repeat=2)
    ):
        on = np.array(pattern)
        drop = (v[y] - v[j]) * on
        rows = np.vstack([(1 - 2 * on)[:, None] * w, drop @ w])
        best = min(
            best,
            shortest(
                norm,
                rows / unit,
                np.append((2 * on - 1) * b, c[j] - c[y] - drop @ b) - rows @ x,
                low,
                high,
            ),
        )
    return best


def shortest(norm: str, a: np.ndarray, r: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Return the norm of the shortest delta with a delta <= r and low <= delta <= high: linear
    programs; l2 by trying which sides are active.
    """
    d = len(low)
    if norm == "linf":
        ends = np.vstack([np.hstack([s * np.eye(d), -np.ones((d, 1))]) for s in (1, -1)])
        rows, bounds = (
            np.vstack([np.hstack([a, np.zeros((len(a), 1))]), ends]),
            [*zip(low, high, strict=True), (0, None)],
        )
        solved = linprog(
            np.append(np.zeros(d), 1), A_ub=rows, b_ub=np.append(r, np.zeros(2 * d)), bounds=bounds
        )
    elif norm == "l1":
        solved = linprog(
            np.ones(2 * d),
            A_ub=np.hstack([a, -a]),
            b_ub=r,
            bounds=[*((0, h) for h in high), *((0, -b) for b in low)],
        )
    else:
        sides, ends = np.vstack([a, np.eye(d), -np.eye(d)]), np.concatenate([r, high, -low])
        finite = np.isfinite(ends)
        return nearest_of_polyhedron(sides[finite], ends[finite])
    return float(solved.fun) if solved.success else np.inf


def nearest_of_polyhedron(sides: np.ndarray, ends: np.ndarray) -> float:
    d, best = sides.shape[1], np.inf
    for active in (
        list(chosen)
        for k in range(d + 1)
        for chosen in itertools.combinations(range(len(sides)), k)
    ):
        a = sides[active]
        z = a.T @ np.linalg.lstsq(a @ a.T, ends[active], rcond=None)[0] if active else np.zeros(d)
        best = min(best, float(np.linalg.norm(z))) if (sides @ z <= ends + 1e-9).all() else best
    return best


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "threat",
    [
        {"box": (0.0, 1.0)},
        {"box": None},
        {"box": (0.0, 1.0), "weights": torch.tensor([0.5, 1.0, 2.0], dtype=F64)},
    ],
    ids=["box", "no box", "weights"],
)
@pytest.mark.parametrize(("norm", "attack"), [pair for pair in SEEK if pair[0] != "l0"], ids=repr)
def test_two_relus_where_a_gradient_shows_the_way(
    norm: str, attack: Attack, threat: dict[str, Any]
) -> None:
    """Never below; within one per cent at nearly every point found. A start without a gradient, and
    a second local minimum, no descent can see.
    """
    ratios = []
    for seed in range(4):
        function, weights = two_relus(seed)
        x = drawn(6, 3, seed=seed + 7)
        problem = Problem.pose(Fn(function), x, function(x).argmax(1), Ball(norm, 0.1, **threat))
        exact = torch.tensor(
            [exact_two_relus(norm, weights, problem, i) for i in range(6)], dtype=F64
        )
        distance = run(attack, problem)[1]
        assert (distance >= exact * TOUCH - 1e-9).all()
        alive = torch.tensor((x.numpy() @ weights[0].T + weights[1] > 0).all(1))
        ratios.append((distance / exact)[alive & exact.isfinite() & (exact > 1e-9)])
    ratio = torch.cat(ratios)
    assert len(ratio) >= 6 and float((ratio <= WITHIN).double().mean()) >= 0.85


# ---- trained networks
# --------------------------------------------------------------------------------------------------

needs_data = needs(DATA / "truth")
NETWORKS = [
    ("tiny_mlp20", "linf", 0.1, "tiny_mlp20_linf_exact.csv"),
    ("tiny_mlp20", "l1", 5.0, "tiny_mlp20_l1_exact.csv"),
]


def known(norm: str, radius: float, file: str, most: int) -> tuple[Problem, Tensor, Tensor]:
    """Return the small perceptron at digits whose exact distance is published, and the lower and
    upper ends of it.
    """
    with (DATA / "truth" / file).open() as lines:
        rows = [row for row in csv.DictReader(lines) if float(row["lower"]) > 0][:most]
    index = [int(row["mnist_test_index"]) for row in rows]
    with np.load(DATA / "nets" / "mnist_tiny_mlp20.npz") as arrays:
        one, two = nn.Linear(784, 20), nn.Linear(20, 10)
        for layer, k in ((one, 0), (two, 1)):
            layer.load_state_dict(
                {"weight": torch.tensor(arrays[f"w{k}"]), "bias": torch.tensor(arrays[f"b{k}"])}
            )
    with np.load(DATA / "data" / "mnist_test_2k.npz") as arrays:
        x, y = (
            torch.tensor(arrays["x"][index]).float()[:, None] / 255,
            torch.tensor(arrays["y"][index]).long(),
        )
    low, high = (
        torch.tensor([float(row[end]) for row in rows], dtype=F64) for end in ("lower", "upper")
    )
    return (
        Problem.pose(
            nn.Sequential(nn.Flatten(), one, nn.ReLU(), two).eval(), x, y, Ball(norm, radius)
        ),
        low,
        high,
    )


@needs_data
@pytest.mark.parametrize(("net", "norm", "radius", "file"), NETWORKS)
def test_a_single_attack_comes_near_the_exact_distance_and_never_below(
    net: str, norm: str, radius: float, file: str
) -> None:
    problem, low, high = known(norm, radius, file, 10)
    distance = run(DeepFool(), problem)[1]
    assert (distance >= low * TOUCH).all()
    assert float((distance / high).median()) <= 1.01 and float((distance / high).max()) <= 1.07


@needs_data
@pytest.mark.parametrize(("net", "norm", "radius", "file"), NETWORKS)
def test_asking_just_below_the_nearest_reaches_the_exact_distance(
    net: str, norm: str, radius: float, file: str
) -> None:
    problem, low, high = known(norm, radius, file, 100)
    distance = run(
        IterativeTightening(
            FMN(steps=50),
            WarmStarted(
                APGD(steps=20, targets=9, successive_halving=True), RelaxationMinimizers(2)
            ),
        ),
        problem,
    )[1]
    assert (distance >= low * TOUCH).all()
    assert (
        float((distance / high).median()) <= 1.01
        and float((distance / high).quantile(0.95)) <= 1.05
    )


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("net", "norm", "radius", "file"), NETWORKS)
def test_the_guided_search_reaches_the_exact_distance(
    net: str, norm: str, radius: float, file: str
) -> None:
    problem, low, high = known(norm, radius, file, 100)
    distance = run(
        RadiusBisection(
            WarmStarted(
                APGD(steps=50, restarts=4, targets=9, successive_halving=True),
                RelaxationMinimizers(4),
            ),
            rounds=6,
        ),
        problem,
    )[1]
    assert (distance >= low * TOUCH).all()
    assert (
        float((distance / high).median()) <= 1.01
        and float((distance / high).quantile(0.95)) <= 1.05
    )
