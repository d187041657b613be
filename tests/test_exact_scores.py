"""Do the attacks that see only scores give the exact verdict on both sides of the distance of a
linear model?
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_minimum_norm import drawn, exact_linear, linear, posed, run
from torch import Tensor

from calipers.attacks.engine import local_moves
from calipers.attacks.finite_differences import FiniteDifferences
from calipers.attacks.spsa import SPSA, _Estimate
from calipers.attacks.square import Square
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack

F64 = torch.float64
SETTINGS: dict[str, dict[str, Any]] = {
    "box": {},
    "mask and weights": {"mask": torch.arange(8) != 3, "weights": drawn(8, seed=7) + 0.5},
    "no box": {"box": None},
}


def at_share(
    norm: str, share: float, d: int = 8, classes: int = 4, seed: int = 0, **ball: Any
) -> Problem:
    """Return the points of a linear model that can be broken, each at a share of its exact
    distance.
    """
    model = linear(d, classes, seed)
    problem = posed(model, drawn(8, d, seed=seed + 1), norm, **ball)
    exact = torch.tensor([exact_linear(model, problem, i) for i in range(8)], dtype=F64)
    return problem.take(torch.nonzero(exact.isfinite()).flatten()).at(
        share * exact[exact.isfinite()]
    )


def verdicts(attack: Attack, problem: Problem) -> Tensor:
    return run(attack, problem)[1].isfinite()


# ---- random search
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(9)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("norm", "queries"), [("linf", 1000), ("l2", 1500), ("l1", 1500)])
def test_random_search_on_both_sides_of_the_distance(
    norm: str, queries: int, setting: str, classes: int
) -> None:
    ball = SETTINGS[setting]
    assert verdicts(Square(queries), at_share(norm, 1.01, classes=classes, **ball)).all()
    assert not verdicts(Square(200), at_share(norm, 0.99, classes=classes, **ball)).any()


def test_random_search_in_more_features() -> None:
    assert verdicts(Square(2000), at_share("l2", 1.01, d=24)).all()


@pytest.mark.slow
def test_windows_alone_never_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that was here: every proposal takes the whole budget of a second window, and no share
    of it.
    """
    monkeypatch.setattr(
        local_moves,
        "is_small",
        lambda region, query, queries: torch.zeros_like(query, dtype=torch.bool),
    )
    assert not verdicts(Square(1500), at_share("l2", 1.01)).any()


@pytest.mark.slow
def test_a_bump_of_fixed_size_does_not_settle_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_moves, "_GROWTH", 1.0)
    assert not verdicts(Square(1500), at_share("l2", 1.01)).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_small_moves_stay_inside(norm: str) -> None:
    """Whatever is handed on: no longer than the radius, inside box and mask, and what stands
    opposite to the pattern is taken back first.
    """
    problem = at_share(norm, 1.5, weights=drawn(8, seed=7) + 0.5, mask=torch.arange(8) != 3)
    region, n = problem.region, len(problem)
    weight = region.weight
    assert weight is not None
    for seed in range(20):
        start = region.sample(problem.streams(seed))
        own = (start - region.center) * weight
        pattern = (
            drawn(n, 8, seed=seed, normal=True)
            * (drawn(n, 8, seed=seed + 50) < 0.4)
            * (region.high > region.low)
        )
        giver = drawn(n, 8, seed=seed + 90) < 0.5
        delta = local_moves.moved(
            region, own, pattern, giver, torch.full((n,), 0.3, dtype=F64), drawn(n, seed=seed + 130)
        )
        assert (region.norm.of(delta) <= region.radius * (1 + 1e-9)).all()
        assert (delta / weight <= region.high + 1e-12).all() and (
            delta / weight >= region.low - 1e-12
        ).all()
        assert norm == "l2" or torch.equal(
            delta[~giver & (pattern == 0)], own[~giver & (pattern == 0)]
        )


# ---- estimated slopes
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("directions", ["signs", "normal"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_estimated_slopes_on_both_sides_of_the_distance(
    norm: str, directions: Any, setting: str
) -> None:
    """Two classes: with more, the other class that wins at first may not be the one that falls, and
    nothing here aims at each.
    """
    attack = SPSA(steps=60, pairs=128, directions=directions)
    found = verdicts(attack, at_share(norm, 1.02, classes=2, **SETTINGS[setting]))
    # Where half the features stand at the ends of the box, probes are short there and the steps of
    # constant length stay beside the corner.
    assert int((~found).sum()) <= (1 if (norm, setting) == ("l2", "mask and weights") else 0)
    assert not verdicts(attack, at_share(norm, 0.99, classes=2, **SETTINGS[setting])).any()


def test_weights_that_the_estimate_forgets_cost_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that was here: probes are shorter where weights are larger, so the sum of moves is the
    slope times their square.
    """
    problem = at_share("l1", 1.1, classes=2, seed=5, **SETTINGS["mask and weights"])
    assert verdicts(SPSA(), problem).all()
    weight = problem.region.weight
    assert weight is not None
    true = _Estimate._estimate
    monkeypatch.setattr(
        _Estimate,
        "_estimate",
        lambda self, moves, falls: true(self, moves, falls) / weight.square(),
    )
    assert not verdicts(SPSA(), problem).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_differences_on_both_sides_of_the_distance(norm: str, setting: str) -> None:
    attack = FiniteDifferences(queries=1500, search=100, features=8)
    found = verdicts(attack, at_share(norm, 1.01, classes=2, **SETTINGS[setting]))
    # a projection in l1 ends beside the corner
    assert int((~found).sum()) <= (1 if (norm, setting) == ("l1", "mask and weights") else 0)
    assert not verdicts(attack, at_share(norm, 0.99, classes=2, **SETTINGS[setting])).any()
