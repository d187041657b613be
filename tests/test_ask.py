"""Does every loop that asks a tool let the referee rule? Tools that lie, in each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import calipers
from calipers import Ball
from calipers.api.check import _reprove
from calipers.api.geometry import local_geometry
from calipers.attacks.deepfool import DeepFool
from calipers.errors import Contradiction
from calipers.measurement.exact import close
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import Referee, Ruling
from calipers.measurement.run import run
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.record.evidence import Evidence
from calipers.record.record import Record

pytestmark = pytest.mark.one_in(1)


class Halves(nn.Module):
    """Two classes, told apart by the first feature: at most 0.5 is class 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([1.5 - x[:, 0], 0.5 + x[:, 0]], 1)


def points(wrong: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Two points at 0.4 and two at 0.1 from the boundary; the last one misclassified where
    `wrong`.
    """
    x = torch.tensor([[0.1, 0.5], [0.9, 0.5], [0.4, 0.5], [0.6, 0.5]])
    return x, torch.tensor([0, 1, 0, 0 if wrong else 1])


@dataclass(frozen=True)
class Liar:
    """Claims what it is told to, about every point, and proves nothing; with an example at `meets`
    along the first feature.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier", "certificate at the radius", "claims what it is told to"
    )

    radius: float
    margin: float = 1.0
    meets: float = 0.0

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim | Attempt]:
        n, none = torch.arange(len(problem)), torch.zeros(len(problem), dtype=torch.long)
        if self.meets:
            way = torch.where(problem.y == 0, self.meets, -self.meets)
            yield Attempt(n, problem.x + torch.stack([way, torch.zeros_like(way)], 1), none, none)
        radius, margin = (
            torch.full((len(problem),), v, dtype=torch.float64) for v in (self.radius, self.margin)
        )
        yield Claim(n, radius, margin, "float64-checked", none, none)


@dataclass(frozen=True)
class Silent:
    """Answers nothing."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        yield from ()


def test_an_honest_certifier_passes() -> None:
    x, y = points(wrong=True)
    found = calipers.certify(Halves(), x, y, Ball("linf", 0.05), "CROWN")
    assert found.certified.tolist() == [True, True, True, False]
    assert found.radius.tolist() == [0.05, 0.05, 0.05, 0.0]
    assert torch.allclose(
        found.margin, torch.tensor([0.7, 0.7, 0.1, -0.3], dtype=torch.float64), atol=1e-6
    )


def test_a_claim_about_a_misclassified_point_is_a_contradiction() -> None:
    x, y = points(wrong=True)
    with pytest.raises(Contradiction, match=r"Liar\(radius=0.05, .* certifies 0.05"):
        calipers.certify(Halves(), x, y, Ball("linf", 0.05), Liar(0.05))


def test_a_claim_about_a_point_that_ties_is_not_admitted() -> None:
    x, y = torch.tensor([[0.5, 0.5], [0.1, 0.5]]), torch.tensor([0, 0])
    # wrong by no more than rounding may be: nobody is accused
    found = calipers.certify(Halves(), x, y, Ball("linf", 1e-9), Liar(1e-9))
    assert found.certified.tolist() == [False, True] and found.radius.tolist() == [0.0, 1e-9]
    assert found.margin.tolist() == [-np.inf, 1.0]
    assert calipers.certify(Halves(), x, y, Ball("linf", 0.0), Liar(0.0)).certified.tolist() == [
        False,
        True,
    ]


def test_a_radius_that_reaches_over_the_boundary_is_a_contradiction() -> None:
    with pytest.raises(Contradiction, match="a random point at distance"):
        calipers.certify(Halves(), *points(), Ball("linf", 0.05), Liar(0.45))


def test_a_radius_above_an_example_of_the_same_tool_is_a_contradiction() -> None:
    x, y = (t[:2] for t in points())
    with pytest.raises(
        Contradiction, match=r"certifies 0.401, but the witness of .* stands at 0.4"
    ):
        calipers.certify(Halves(), x, y, Ball("linf", 0.05), Liar(0.401, meets=0.4005))


@pytest.mark.parametrize(
    ("radius", "margin"),
    [(0.05, -1.0), (0.05, 0.0), (0.05, np.nan), (np.nan, 1.0), (np.inf, 1.0), (-0.05, 1.0)],
)
def test_claims_that_say_nothing_prove_nothing(radius: float, margin: float) -> None:
    found = calipers.certify(Halves(), *points(), Ball("linf", 0.05), Liar(radius, margin))
    assert not found.certified.any() and (found.radius == 0).all()
    assert (found.margin <= 0).all()


def test_a_point_that_cannot_be_measured_is_not_certified() -> None:
    x, y = points()
    x[1, 0] = torch.nan
    for tool in (calipers.certificates.CROWN(), Liar(0.05)):
        assert calipers.certify(
            Halves(), x, y, Ball("linf", 0.05, None), tool
        ).certified.tolist() == [
            True,
            False,
            True,
            True,
        ]
    nothing = calipers.certify(Halves(), x[1:2], y[1:2], Ball("linf", 0.05, None), Liar(0.05))
    assert not nothing.certified.any() and nothing.margin.tolist() == [-np.inf]


def test_a_model_without_an_answer_inside_the_ball_is_not_robust_there() -> None:
    class Hole(Halves):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.where(x[:, 1:] == 0.5, 1.0, torch.nan)

    with pytest.raises(Contradiction):
        calipers.certify(Hole(), *points(), Ball("linf", 0.05), Liar(0.05))


# ---- the other loops (verify: tests/test_verify.py)
# --------------------------------------------------------------------------------------------------


def posed() -> Problem:
    return Problem.pose(Halves(), *points(), Ball("linf", 0.05))


def by_measure() -> None:
    run(posed(), Plan("lie", (Stage(Liar(0.45), "certifier", "distance"),)), Record(None))


def by_closing() -> None:
    ledger = Record(None)
    run(posed(), Plan("none", ()), ledger)
    (last,) = ledger.runs(posed().fingerprint())
    close(posed(), Liar(0.45), ledger, run=last.number)


def by_drawing() -> None:
    local_geometry(Halves(), *points(), Ball("linf", 0.05), tools=[Liar(0.45)])


def by_drawing_between() -> None:
    local_geometry(Halves(), *points(), Ball("linf", 0.05), tools=[DeepFool(), Liar(0.1001)])


def by_certifying() -> None:
    calipers.certify(Halves(), *points(), Ball("linf", 0.05), Liar(0.45))


@pytest.mark.parametrize(
    "loop", [by_measure, by_closing, by_drawing, by_drawing_between, by_certifying]
)
def test_no_loop_believes_a_liar(loop: Callable[[], None]) -> None:
    with pytest.raises(Contradiction, match="Liar"):
        loop()


# a drawing holds the liar against the linear regions besides
@pytest.mark.parametrize("loop", [by_measure, by_closing, by_certifying])
def test_a_referee_who_believes_every_word_is_noticed(
    monkeypatch: pytest.MonkeyPatch, loop: Callable[[], None]
) -> None:
    def believe(
        self: Referee, claim: Claim, index: torch.Tensor, tool: str, seconds: float, seed: int
    ) -> Ruling:
        names = [self.problem.names[i] for i in index[claim.index].tolist()]
        return Ruling(
            tuple(
                Evidence(n, "certificate", tool, r)
                for n, r in zip(names, claim.radius.tolist(), strict=True)
            ),
            (),
        )

    monkeypatch.setattr(Referee, "claim", believe)
    with pytest.raises(pytest.fail.Exception):
        test_no_loop_believes_a_liar(loop)


@pytest.mark.parametrize(
    ("tool", "fails"),
    [
        (calipers.certificates.CROWN(), 0),
        (Liar(0.05, -1.0), 4),
        (Liar(0.04), 4),
        (Liar(np.nan), 4),
        (Silent(), 4),
        (Liar(0.45), 5),
    ],
)
def test_a_check_believes_no_liar_either(tool: object, fails: int) -> None:
    problem = posed()
    facts = [Evidence(name, "certificate", "told", 0.05) for name in problem.names]
    place = {name: i for i, name in enumerate(problem.names)}
    assert len(_reprove(problem, place, facts, tool)[1]) == fails


# ---- what an attack found
# --------------------------------------------------------------------------------------------------


def test_where_an_attack_finds_nothing_the_distance_is_infinite() -> None:
    x, y = points()
    found = calipers.attack(Halves(), x, y, Ball("linf", 0.2), "PGD(steps=5)")
    assert found.success.tolist() == [False, False, True, True]
    assert found.distance.isinf().tolist() == [True, True, False, False]
    assert ((found.distance <= 0.2) == found.success).all()
    assert found.margin.gt(0).tolist() == [True, True, False, False] and not torch.equal(
        found.candidates[0], x[0]
    )


def test_an_example_beyond_the_radius_keeps_its_distance() -> None:
    found = calipers.attack(Halves(), *points(), Ball("linf", 0.2), "DeepFool")
    assert found.success.tolist() == [False, False, True, True]
    assert torch.allclose(
        found.distance, torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64), atol=1e-3
    )


def test_a_misclassified_point_is_its_own_example() -> None:
    x, y = points(wrong=True)
    found = calipers.attack(Halves(), x, y, Ball("linf", 0.05), "PGD(steps=5)")
    assert found.success.tolist() == [False, False, False, True]
    assert (
        float(found.distance[3]) == 0
        and torch.equal(found.candidates[3], x[3])
        and float(found.margin[3]) < 0
    )
