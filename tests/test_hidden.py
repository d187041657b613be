"""Do certifiers ever claim a radius within which an example is planted? Networks that are right
nearly everywhere around their points, but not there.

`hidden.npz` is made by scripts/plant_examples.py: attacks miss most of what is planted, so nothing
else would notice an unsound certifier.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.enumeration import Enumeration
from calipers.certificates.input_split import InputSplit
from calipers.certificates.radius import CertifiedRadius
from calipers.graph.activations import TwoPieces
from calipers.graph.relaxations import Lines
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.threats.ball import Ball
from calipers.threats.substitutions import Substitutions, one_hot_groups

pytestmark = pytest.mark.slow  # minutes; part of the slow shelf

ROOT = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location(
    "plant_examples", ROOT.parent / "scripts" / "plant_examples.py"
)
assert _SPEC is not None and _SPEC.loader is not None
PLANTING = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(PLANTING)
NAMES = sorted(PLANTING.NETS)
SECONDS = 0.3


class Bed(NamedTuple):
    """A network, its points with the distance (N,) to what is planted near each, and the planted
    inputs (N, d).
    """

    classifier: Classifier
    x: Tensor
    y: Tensor
    bad: Tensor
    distance: Tensor

    def problem(self, share: float = 1.0) -> Problem:
        """Ask for that share of the distances; at 1 the ball is closed and holds what is
        planted.
        """
        return Problem.pose(
            self.classifier, self.x, self.y, Ball("linf", self.distance * share, None)
        )


@cache
def bed(name: str) -> Bed:
    """Return a stored network."""
    with np.load(ROOT / "hidden.npz") as arrays:
        held = {
            k.partition("/")[2]: torch.tensor(v)
            for k, v in arrays.items()
            if k.startswith(f"{name}/")
        }
    network: nn.Module = PLANTING.NETS[name]().eval()
    network.load_state_dict(
        {k.removeprefix("net."): v for k, v in held.items() if k.startswith("net.")}
    )
    classifier, x, y = Classifier(network), held["x"], held["y"]
    bad = nearest(classifier, x, y, held["bad"])
    return Bed(classifier, x, y, bad, (bad.double() - x.double()).abs().amax(1))


def nearest(classifier: Classifier, x: Tensor, y: Tensor, bad: Tensor) -> Tensor:
    """Walk from the planted inputs towards the points for as long as the model stays wrong: what is
    left is wrong by next to nothing.
    """
    problem = Problem.pose(classifier, x, y, Ball("linf", 1.0, None))
    low, high, wrong = torch.zeros(len(x), 1), torch.ones(len(x), 1), bad
    for _ in range(30):
        middle = (low + high) / 2
        point = x + middle * (bad - x)
        broken = (problem.goal.worst(problem.margins(classifier.logits(point))) <= 0)[:, None]
        low, high, wrong = (
            torch.where(broken, low, middle),
            torch.where(broken, middle, high),
            torch.where(broken, point, wrong),
        )
    return wrong


def radii(tool: Any, problem: Problem) -> Tensor:
    """Return what the tool claims, (N,)."""
    radius = torch.zeros(len(problem), dtype=torch.float64)
    for claim in tool(problem):
        if isinstance(claim, Claim):
            radius[claim.index] = claim.radius.double()
    return radius


def false(tool: Any, name: str) -> list[str]:
    """Name every point of a network for which the tool claims the planted distance or more."""
    here = bed(name)
    claimed = radii(tool, here.problem())
    return [
        f"{name}: point {i} at {float(claimed[i])}"
        for i in torch.nonzero(claimed >= here.distance).flatten().tolist()
    ]


def tools(**settings: Any) -> Iterator[Any]:
    """Yield every certifier of a ball, the complete ones with little time."""
    crown = CROWN(**settings)
    yield from (
        IBP(**settings),
        crown,
        AlphaCROWN(steps=10, intermediate=5, **settings),
        CertifiedRadius(crown),
        CertifiedRadius(AlphaCROWN(steps=5, intermediate=0, **settings), 4),
    )
    yield from (
        BranchAndBound(seconds=SECONDS, **settings),
        InputSplit(seconds=SECONDS, **settings),
    )


def test_at_least_a_hundred_examples_are_planted_and_all_are_examples() -> None:
    count = 0
    for name in NAMES:
        here = bed(name)
        problem = here.problem()
        assert bool(problem.region.contains(here.bad).all())
        assert bool(
            (problem.goal.worst(problem.margins(here.classifier.logits(here.bad))) <= 0).all()
        )
        assert bool((problem.goal.worst(problem.margins(here.classifier.logits(here.x))) > 0).all())
        count += len(here.x)
    assert count >= 100


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "tool", [*tools(), *tools(guarantee="float32-executed")], ids=lambda t: repr(t)[:60]
)
def test_no_certifier_claims_a_planted_distance(tool: Any, name: str) -> None:
    assert not false(tool, name)


@pytest.mark.parametrize("name", NAMES)
def test_much_can_be_proved_nearby(name: str) -> None:
    """Only a tool that claims something can claim too much."""
    assert (
        float((radii(BranchAndBound(seconds=SECONDS), bed(name).problem(0.3)) > 0).double().mean())
        > 0.5
    )


# ---- words
# --------------------------------------------------------------------------------------------------

LENGTH, KINDS = 6, 3


def words(seed: int) -> tuple[Problem, Tensor]:
    """Return a problem about one word, with a ball that just holds the one word that the network
    gets wrong: that many substitutions away.
    """
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(KINDS, (LENGTH,), generator=generator)
    k = 1 + seed % 3
    planted = own.clone()
    planted[:k] = (own[:k] + 1) % KINDS
    x, bad = (nn.functional.one_hot(w, KINDS).flatten()[None].float() for w in (own, planted))
    first, last = nn.Linear(LENGTH * KINDS, 12), nn.Linear(12, 2)
    with torch.no_grad():
        first.weight.copy_(torch.randn(12, LENGTH * KINDS, generator=generator) * 0.1)
        # 1/2 at the planted word, 0 at all others
        first.weight[-1], first.bias[-1] = bad[0], 0.5 - LENGTH
        last.weight.copy_(torch.randn(2, 12, generator=generator) * 0.1)
        last.weight[:, -1] = 0
        last.bias.copy_(torch.tensor([1.0, 0.0]))
        network = nn.Sequential(first, nn.ReLU(), last).eval()
        margin = network(bad)[0] @ torch.tensor([1.0, -1.0])
        last.weight[1, -1] = 2 * margin + 1e-3
    return Problem.pose(
        Classifier(network),
        x,
        torch.zeros(1, dtype=torch.long),
        Substitutions(one_hot_groups(LENGTH, KINDS), k),
    ), bad


def test_no_certifier_claims_a_planted_word() -> None:
    for seed in range(30):
        problem, bad = words(seed)
        k = problem.threat.radii(1)
        assert bool(problem.region.contains(bad).all()) and bool(
            (problem.goal.worst(problem.margins(problem.classifier.logits(bad))) <= 0).all()
        )
        assert radii(Enumeration(), problem) == k - 1, f"seed {seed}: all nearer words resist"
        for tool in (
            IBP(),
            CROWN(),
            IBP(guarantee="float32-executed"),
            CROWN(guarantee="float32-executed"),
        ):
            assert radii(tool, problem) < k, f"seed {seed}, {tool}"


# ---- mutants
# --------------------------------------------------------------------------------------------------


def lowered(share: float) -> Any:
    """Return a `relax` whose chord lies lower than it may, by that share of its intercept."""
    sound = TwoPieces.relax

    def relax(self: TwoPieces, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        lines = sound(self, lower, upper, alpha)
        return lines._replace(upper_intercept=lines.upper_intercept * (1 - share))

    return relax


@pytest.mark.parametrize("tool", list(tools())[1:], ids=lambda t: repr(t)[:60])
def test_mutant_whose_chord_lies_a_tenth_too_low_is_caught(
    monkeypatch: pytest.MonkeyPatch, tool: Any
) -> None:
    monkeypatch.setattr(TwoPieces, "relax", lowered(0.1))
    assert any(false(tool, name) for name in NAMES)


def test_mutant_whose_chord_lies_two_hundredths_too_low_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TwoPieces, "relax", lowered(0.02))
    assert any(false(BranchAndBound(seconds=SECONDS), name) for name in NAMES)
