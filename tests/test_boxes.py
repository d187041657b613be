"""Properties of many boxes: are they decided together as each is alone, and soundly?"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calipers.certificates.crown import CROWN, IBP
from calipers.errors import BadInput
from calipers.measurement.plan import Plan
from calipers.measurement.verify import verify
from calipers.models.classifier import Classifier
from calipers.presets import VERIFY, VERIFY_TOGETHER
from calipers.problem.io_property import Inequality, Query, posed_together
from calipers.problem.specification import Specification
from calipers.random_streams import Streams
from calipers.threats.boxes import Boxes

pytestmark = pytest.mark.one_in(1)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> Classifier:
    """Return a small random network of three inputs and two outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2)).to(dtype)
    return Classifier(made.eval())


def boxes(count: int, bound: float, seed: int = 0) -> list[Query]:
    """Return questions whether output 0 falls below a bound of the box's own, or output 1 below
    output 0.
    """
    draw = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 3, generator=draw, dtype=torch.float64)
    side = torch.rand(count, 3, generator=draw, dtype=torch.float64) * 0.2
    side[::5, 1] = 0  # a fixed input

    def exact(row: Tensor) -> tuple[Fraction, ...]:
        return tuple(Fraction(v) for v in row.tolist())

    return [
        Query(
            exact(a), exact(a + s), 2,
            (
                (Inequality(((0, Fraction(1)),), Fraction(bound) + Fraction(k, 50)),),
                (Inequality(((1, Fraction(1)), (0, Fraction(-1))), Fraction(3)),),
            ),
        )
        for k, (a, s) in enumerate(zip(low, side, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize("bound", [0.2, -0.3])
def test_many_boxes_are_decided_as_each_is_alone(bound: float) -> None:
    classifier, asked = network(), boxes(12, bound)
    plan = Plan("verify", VERIFY[:4])
    alone = [verify(classifier, [q], (3,), plan).answer for q in asked]
    found = verify(classifier, asked, (3,), plan, VERIFY_TOGETHER)
    assert found.answer == ("sat" if "sat" in alone else "unsat") and "unknown" not in alone
    assert alone.count("unsat") >= 2


def wrong(classifier: Classifier, asked: list[Query], tool: Any) -> bool:
    """Is a box proved, among many, in which a corner or a random point is unsafe?"""
    for places, problem in posed_together(asked, classifier, (3,)):
        for claim in tool(problem):
            for place in claim.index[claim.radius > 0].tolist():
                query = asked[places[place]]
                low, high = (torch.tensor([float(v) for v in e]) for e in (query.low, query.high))
                share = torch.rand(40, 3, generator=torch.Generator().manual_seed(place))
                share[:8] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
                points = (low + share * (high - low)).double()
                if any(query.unsafe(z) for z in classifier.logits64(points)):
                    return True
    return False


@pytest.mark.parametrize("tool", [IBP(), CROWN()], ids=["IBP", "CROWN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_box_is_proved_that_holds_an_unsafe_point(tool: Any, dtype: torch.dtype) -> None:
    for seed in range(4):
        assert not wrong(network(seed, dtype), boxes(80, -1.0, seed), tool)


def shrunk(x: Tensor, low: Tensor, high: Tensor) -> Boxes:
    """Return boxes that hold nothing but their points."""
    return Boxes("linf", 1.0, None, floors=x.double(), ceilings=x.double())


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "boxes too small": (Boxes, "around", shrunk),
    "bounds of other boxes": (
        Specification,
        "take",
        lambda goal, index: Specification(goal.matrix, goal.offset[-len(index) :], goal.case_of),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    assert any(wrong(network(seed), boxes(100, -1.0, seed), IBP()) for seed in range(4))


def test_each_point_keeps_its_own_box() -> None:
    x = torch.rand(5, 2, 2)
    low, high = (x - 0.1).double(), (x + torch.rand(5, 2, 2)).double()
    threat = Boxes.around(x, low, high)
    threat.check(x)
    with pytest.raises(BadInput, match="do not lie in boxes"):
        threat.check(x - 1)
    picked = torch.tensor([3, 0, 3])
    for region in (threat.region(x).take(picked), threat.take(picked).region(x[picked])):
        for point in (low[picked], high[picked]):
            inside = region.snap(point.to(x.dtype))
            assert bool(region.contains(inside).all())
            assert float((inside - point).abs().max()) < 1e-6
        assert not bool(region.contains(high[picked].float() + 0.1).any())
        sample = region.snap(region.sample(Streams.of(0, ["a", "b", "c"], x.device)))
        assert bool(region.contains(sample).all())
    lower, upper = threat.region(x.double(), outward=True).outer_box()
    assert bool(((lower <= low) & (upper >= high)).all())


def test_a_specification_may_have_shifts_of_each_point() -> None:
    shifts = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    goal = Specification(torch.eye(2), shifts, torch.tensor([0, 1]))
    y = torch.zeros(3, dtype=torch.long)
    assert torch.equal(goal.margins(torch.zeros(3, 2), y), shifts)
    assert torch.equal(goal.take(torch.tensor([2, 0])).offsets(y[:2], 2), shifts[[2, 0]])
    with pytest.raises(BadInput, match="shifts of 3 points"):
        goal.check(y[:2], 2)
    same = dataclasses.replace(goal, offset=shifts[0])
    assert same.take(torch.tensor([1])) is same
