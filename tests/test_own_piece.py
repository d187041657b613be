"""Do brackets close where the nearest example lies in the point's own linear region, though other
regions reach into its ball?
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from clocks import AMPLE
from torch import Tensor, nn

import calipers
from calipers import Ball, Plan, Problem, Stage
from calipers.certificates import CROWN, MILP, LinearRegion, OwnPiece, own_piece
from calipers.problem.protocols import Attempt, Claim, Forecast

NORMS = ("linf", "l2", "l1")
EXACT = MILP(seconds=AMPLE)
MEETS = 2e-6  # of a distance: what the programs' last bounds stop short


def small(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network of two hidden layers, whose boundaries are near, and 6 points with their
    labels.
    """
    torch.manual_seed(seed)
    net = (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        .double()
        .eval()
    )
    x = torch.rand(6, 5, dtype=torch.float64)
    with torch.no_grad():
        net[4].bias -= net(x).mean(0)
    return net, x, net(x).argmax(1)


def measured(seed: int, norm: str, *tools: LinearRegion | OwnPiece) -> calipers.Bracket:
    """Return the brackets that tools come to."""
    net, x, y = small(seed)
    plan = Plan("regions", tuple(Stage(tool, "certifier", "distance") for tool in tools))
    return calipers.measure(net, x, y, Ball(norm, 0.1), plan=plan).bracket


def exact(seed: int, norm: str) -> calipers.Bracket:
    """Return the exact distances."""
    net, x, y = small(seed)
    return calipers.measure(
        net, x, y, Ball(norm, 1.0), plan=Plan("exact", (Stage(EXACT, "certifier"),))
    ).bracket


def gap(bracket: calipers.Bracket) -> np.ndarray:
    """Return how far apart the ends are, as a share of the upper one; 1 where no example is
    known.
    """
    return np.where(
        np.isfinite(bracket.upper),
        1 - bracket.lower / np.where(np.isfinite(bracket.upper), bracket.upper, 1.0),
        1.0,
    )


@pytest.mark.parametrize("norm", NORMS)
def test_what_a_bound_leaves_open_is_closed(norm: str) -> None:
    more = 0
    for seed in range(2):
        bounded, both = (
            measured(seed, norm, LinearRegion(CROWN())),
            measured(seed, norm, LinearRegion(CROWN()), OwnPiece(EXACT)),
        )
        truth = exact(seed, norm)
        near = np.isfinite(bounded.upper) & (bounded.upper <= truth.upper * (1 + MEETS))
        assert (gap(both)[near] <= MEETS).all(), (
            "an example in the own region that is the nearest of all"
        )
        assert (both.lower <= truth.upper).all() and (both.upper >= truth.lower).all()
        assert (np.isfinite(both.upper) == np.isfinite(bounded.upper)).all(), (
            "nothing is asked about points without one"
        )
        more += int(((gap(both) <= MEETS) & (gap(bounded) > 1e-3)).sum())
    assert more > 0


def test_a_ball_that_does_not_hold_the_example_closes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_piece, "_ROOM", 0.9)
    with pytest.raises(AssertionError, match="own region"):
        test_what_a_bound_leaves_open_is_closed("l2")


def test_every_point_is_mentioned_by_one_claim() -> None:
    net, x, y = small(0)
    told = [
        a.index.tolist()
        for a in OwnPiece(EXACT)(Problem.pose(net, x, y, Ball("l1", 0.1)))
        if isinstance(a, Claim)
    ]
    assert sorted(place for places in told for place in places) == list(range(len(x)))


@pytest.mark.parametrize(
    ("last", "norm"),
    [(nn.Tanh(), "l2"), (nn.ReLU(), "l0")],
    ids=["a smooth network", "counted features"],
)
def test_questions_without_linear_regions_are_left_to_others(last: nn.Module, norm: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 6), last, nn.Linear(6, 3)).eval(), torch.rand(4, 5)
    answers = list(OwnPiece(EXACT)(Problem.pose(net, x, net(x).argmax(1), Ball(norm, 1.0))))
    assert not any(isinstance(a, Attempt) for a in answers)
    assert sum(len(a.index) for a in answers) == len(x) and all(
        bool((a.radius == 0).all()) for a in answers if isinstance(a, Claim)
    )


def test_a_run_by_the_clock_is_resumed(tmp_path: Path) -> None:
    net, x, y = small(1)
    plan, record = (
        Plan("regions", (Stage(OwnPiece(EXACT), "certifier", "distance"),)),
        tmp_path / "record.calipers",
    )
    first, again = (
        calipers.measure(net, x, y, Ball("l2", 0.1), plan=plan, record=record).bracket
        for _ in range(2)
    )
    assert Stage(OwnPiece(EXACT), "certifier").by_the_clock
    assert (first.lower == again.lower).all() and (first.upper == again.upper).all()


def test_a_search_whose_bounds_alone_take_longer_than_it_may_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a large network it would not come back: linear programs and their rows ask no clock."""
    net, x, y = small(1)
    monkeypatch.setattr(
        own_piece,
        "sweeps_forecast",
        lambda problem, arithmetic, refine: Forecast(EXACT.seconds + 1),
    )
    monkeypatch.setattr(MILP, "__call__", lambda self, problem: pytest.fail("begun"))
    answers = list(OwnPiece(EXACT)(Problem.pose(net, x, y, Ball("l2", 0.1))))
    claims = [a for a in answers if isinstance(a, Claim)]
    assert any(isinstance(a, Attempt) for a in answers) and sum(
        len(a.index) for a in claims
    ) == len(x)
    assert all(bool((a.radius == 0).all()) for a in claims)
