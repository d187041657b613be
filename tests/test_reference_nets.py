"""Do certifiers and attacks keep to the exact distances of the trained networks that come with the
tests?
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import TRAINING, Known, known, network
from test_certificates import claims
from torch import Tensor

from calipers.attacks.deepfool import DeepFool
from calipers.attacks.pgd import PGD
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.radius import CertifiedRadius
from calipers.graph.activations import TwoPieces
from calipers.graph.relaxations import Lines
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

ASKED = [("small", "linf"), ("small", "l2"), ("small", "l1")]
TIGHT = AlphaCROWN(steps=10, intermediate=0)
ABOVE = 1e-6  # of a distance, which is known to 2e-7


def within(case: Known, share: float) -> Problem:
    """Ask for that share of each point's own distance."""
    return case.problem.at(case.upper * share)


def false(tool: Any, name: str, norm: str) -> Tensor:
    """Return the points for which a tool claims a radius at which an example is known."""
    case = known(name, norm)
    return torch.nonzero(claims(tool, within(case, 1 + ABOVE))[0] > 0).flatten()


@pytest.mark.parametrize(("name", "norm"), ASKED)
def test_nothing_is_certified_at_the_distance_of_an_example(name: str, norm: str) -> None:
    assert not any(len(false(tool, name, norm)) for tool in (IBP(), CROWN(), TIGHT))


def test_a_chord_that_lies_a_little_too_low_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above."""
    sound = TwoPieces.relax

    def relax(self: TwoPieces, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        lines = sound(self, lower, upper, alpha)
        return lines._replace(upper_intercept=lines.upper_intercept * 0.5)

    monkeypatch.setattr(TwoPieces, "relax", relax)
    assert any(len(false(TIGHT, name, norm)) for name, norm in ASKED)


@pytest.mark.parametrize(("name", "norm"), ASKED)
def test_certified_radii_lie_below_the_exact_distances(name: str, norm: str) -> None:
    case = known(name, norm)
    radii, _ = claims(CertifiedRadius(CROWN()), within(case, 1.5))
    assert (radii <= case.upper * (1 + ABOVE)).all()
    assert float((radii / case.upper).median()) > 0.3


def test_what_is_trained_on_intervals_is_certified_by_intervals() -> None:
    _, _, x, y = TRAINING.points("provable")
    radii, _ = claims(IBP(), Problem.pose(network("provable"), x, y, Ball("linf", 0.1)))
    assert int((radii > 0).sum()) >= 55


@pytest.mark.parametrize(("name", "norm"), ASKED)
def test_no_attack_finds_an_example_nearer_than_the_nearest(name: str, norm: str) -> None:
    """And one that finds nearly all just beyond it, where the distance is that of linf."""
    case = known(name, norm)
    tools = [PGD(steps=20, restarts=2), DeepFool()] if norm != "l1" else [DeepFool()]
    for tool in tools:
        assert not fallen(tool, within(case, 0.999)).any(), tool
        assert float(fallen(tool, within(case, 1.1)).double().mean()) > 0.5, tool


def fallen(tool: Any, problem: Problem) -> Tensor:
    """Return which points (N,) a tool's candidates break within the region."""
    point = problem.x.clone()
    for attempt in tool(problem):
        point[attempt.index] = attempt.candidate
    margin = problem.goal.worst(problem.margins(problem.classifier.logits64(point)))
    return problem.region.contains(point) & is_adversarial(margin)


@pytest.mark.parametrize("seed", range(2))
def test_bounds_of_a_trained_tanh_network_hold_at_points_of_the_ball(seed: int) -> None:
    _, _, x, y = TRAINING.points("tanh")
    problem = Problem.pose(network("tanh"), x, y, Ball("linf", 0.02))
    generator = torch.Generator().manual_seed(seed)
    corner = torch.where(torch.rand(x.shape, generator=generator) < 0.5, -0.02, 0.02)
    margin = problem.goal.worst(
        problem.margins(problem.classifier.logits64((x + corner).clamp(0, 1)))
    )
    for tool in (IBP(), CROWN(), TIGHT):
        _, bound = claims(tool, problem)
        assert (bound <= margin).all()
    assert int((bound > 0).sum()) > 40


def test_the_stored_networks_are_those_of_the_script() -> None:
    for name in TRAINING.NETS:
        model, (_, _, x, y) = network(name), TRAINING.points(name)
        right = float((model(x).argmax(1) == y).double().mean())
        assert right > 0.7, f"{name}: {right}"
