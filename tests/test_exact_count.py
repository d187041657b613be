"""Is the fewest number of changed features found? Two ReLUs: every support and every pattern of the
units is enumerated, one linear program for each.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_exact_distance import two_relus
from test_minimum_norm import Fn, drawn, run
from torch import Tensor

from calipers.attacks.fmn import FMN
from calipers.attacks.sigma_zero import SigmaZero
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.threats.ball import Ball

F64 = torch.float64
TIE = 1e-9


def fewest(weights: tuple[np.ndarray, ...], x: np.ndarray, y: int, mask: np.ndarray) -> float:
    """Return the least number of features whose change inside the unit box breaks the point;
    infinite where all of them do not.
    """
    free = np.flatnonzero(mask)
    for count in range(1, len(free) + 1):
        for support in itertools.combinations(free, count):
            moves = np.isin(np.arange(len(x)), support)
            if lowest(weights, y, np.where(moves, 0.0, x), np.where(moves, 1.0, x)) <= TIE:
                return float(count)
    return np.inf


def lowest(weights: tuple[np.ndarray, ...], y: int, low: np.ndarray, high: np.ndarray) -> float:
    """Return the smallest margin in a box, exactly: linear where each unit stays on its side."""
    w, b, v, c = weights
    found = np.inf
    for j, pattern in itertools.product(
        (j for j in range(len(c)) if j != y), itertools.product((0.0, 1.0), repeat=2)
    ):
        on = np.array(pattern)
        slope = ((v[y] - v[j]) * on) @ w
        rest = ((v[y] - v[j]) * on) @ b + c[y] - c[j]
        solved = linprog(
            slope,
            A_ub=(1 - 2 * on)[:, None] * w,
            b_ub=(2 * on - 1) * b,
            bounds=list(zip(low, high, strict=True)),
        )
        found = min(found, float(solved.fun) + rest) if solved.success else found
    return found


def ratios(attack: Attack, d: int, masked: bool) -> Tensor:
    """Return found over exact where the model has a slope and the point can be broken; assert that
    nothing is found below, or where nothing is.
    """
    collected = []
    for seed in range(4):
        function, weights = two_relus(seed, d)
        x = drawn(6, d, seed=seed + 7)
        mask = torch.arange(d) != 1 if masked else torch.ones(d, dtype=torch.bool)
        problem = Problem.pose(
            Fn(function), x, function(x).argmax(1), Ball("l0", 1, mask=mask if masked else None)
        )
        rows = zip(x.numpy(), problem.y.tolist(), strict=True)
        exact = torch.tensor([fewest(weights, row, y, mask.numpy()) for row, y in rows], dtype=F64)
        distance = run(attack, problem)[1]
        assert (distance >= exact).all(), (distance, exact)
        alive = torch.tensor((x.numpy() @ weights[0].T + weights[1] > 0).any(1))
        collected.append((distance / exact)[alive & exact.isfinite()])
    return torch.cat(collected)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [4, 5])
@pytest.mark.parametrize("attack", [SigmaZero(targets=2), FMN(targets=2)], ids=repr)
def test_counts_on_two_relus(attack: Attack, d: int, masked: bool) -> None:
    """Never below the least count, and equal to it at nearly every point from which a slope leads
    anywhere.
    """
    ratio = ratios(attack, d, masked)
    assert len(ratio) >= 8 and float((ratio == 1).double().mean()) >= 0.85, ratio


def test_a_search_of_two_steps_would_not_pass() -> None:
    assert float((ratios(SigmaZero(steps=2), 5, False) == 1).double().mean()) < 0.85
