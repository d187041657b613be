"""Does an operation of two variables that nobody foresaw need more than its own class and one entry
in a table? Here is one, hypot(x, y), added as a user would: all methods bound it soundly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import nets
import pytest
import torch
from test_soundness import violations
from torch import Tensor, nn

from calipers.bounds.backward import relax
from calipers.bounds.dual_bound import Dual, Root
from calipers.bounds.forward import forward
from calipers.bounds.interval import input_box
from calipers.bounds.optimise import Ascent
from calipers.bounds.rounding import CHECKED, SEARCH
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.input_split import InputSplit
from calipers.graph.capture import capture
from calipers.graph.compositions import COMPOSITIONS
from calipers.graph.kinds import Op
from calipers.graph.relaxations import Ends, Parametrised, Relaxation, Saddle, Tilt
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.threats.ball import Ball

F64 = torch.float64


# ---- the operation: all that whoever adds one has to write
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hypot(Op):
    """sqrt(x^2 + y^2), convex: above its tangents through the origin, below a plane that clears the
    corners. alpha weighs two tangents.
    """

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Element by element."""
        return torch.hypot(x, y)

    def interval(self, x: Ends, y: Ends) -> Ends:
        """It grows with both magnitudes."""
        near, far = (
            self.value(*(f(low, high) for low, high in (x, y)))
            for f in (
                lambda low, high: torch.maximum(low, -high).clamp(min=0),
                lambda low, high: torch.maximum(low.abs(), high.abs()),
            )
        )
        room = 16 * torch.finfo(far.dtype).eps * far + torch.finfo(far.dtype).tiny
        return near - room, far + room

    def relaxation(self, x: Ends, y: Ends, alpha: Tensor | None = None) -> Saddle:
        """Any mean of two pairs of planes is one."""
        first, last = (self._planes(x, y, share) for share in (0.25, 0.75))
        weight = torch.full_like(x[0], 0.5) if alpha is None else alpha
        return Saddle(*(a + weight * (b - a) for a, b in zip(first, last, strict=True)))

    def _planes(self, x: Ends, y: Ends, share: float) -> Saddle:
        at = [low + share * (high - low) for low, high in (x, y)]
        norm = self.value(*at)
        slopes = [torch.where(norm > 0, p / norm, torch.zeros_like(p)) for p in at]
        corners = torch.stack(
            [self.value(p, q) - slopes[0] * p - slopes[1] * q for p in x for q in y]
        )
        far = self.interval(x, y)[1]
        room = 32 * torch.finfo(far.dtype).eps * far + torch.finfo(far.dtype).tiny
        return Saddle(*slopes, -room, *slopes, corners.amax(0) + room)

    def parametrised(self, held: Relaxation, *ends: Ends) -> Parametrised:
        """Planes are straight functions of alpha."""
        x, y = ends
        return Tilt(*(self.relaxation(x, y, torch.full_like(x[0], a)) for a in (0.0, 1.0)))


BUILDERS: dict[str, Callable[..., Any]] = {
    "aten.hypot.default": lambda w, x, y: w.write(Hypot(), *w.broadcast(x, y))
}


# ---- it lies between its planes
# --------------------------------------------------------------------------------------------------


def escapes(op: Hypot, seed: int) -> bool:
    """Does a value of the true operation leave the interval or the planes, over random boxes?"""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=F64)

    scale = 10 ** (8 * draw(500) - 4)
    centre, radius = (2 * draw(2, 500) - 1) * scale, draw(2, 500) * scale
    radius[:, ::7] = 0
    centre[:, ::11] = 0
    x, y = ((c - r, c + r) for c, r in zip(centre, radius, strict=True))
    low, high = op.interval(x, y)
    for alpha in (None, draw(500), torch.zeros(500, dtype=F64), torch.ones(500, dtype=F64)):
        planes = op.relaxation(x, y, alpha)
        for share in [*draw(20, 2, 500), *draw(20, 2, 500).round()]:
            p, q = (
                torch.minimum(a + s * (b - a), b) for s, (a, b) in zip(share, (x, y), strict=True)
            )
            value, sign = Hypot().value(p, q), torch.ones_like(p)
            below, above = planes.at(sign, p, q), planes.at(-sign, p, q)
            room = 1e-15 * planes.size(p.abs(), q.abs())  # the planes are evaluated here
            if not bool(((value >= low) & (value <= high)).all()) or not bool(
                ((below - room <= value) & (value <= above + room)).all()
            ):
                return True
    return False


def changed(**changes: Callable[[Saddle], Tensor]) -> Hypot:
    """Return the operation with a mistake in its planes."""

    class Mutant(Hypot):
        """Planes of another function."""

        def relaxation(self, x: Ends, y: Ends, alpha: Tensor | None = None) -> Saddle:
            """With the mistake."""
            planes = super().relaxation(x, y, alpha)
            return planes._replace(**{k: f(planes) for k, f in changes.items()})

    return Mutant()


MUTANTS = {
    "upper plane through the tangent": {"upper_intercept": lambda t: t.lower_intercept},
    "lower slope too steep": {"lower_x": lambda t: 1.05 * t.lower_x},
    "upper slopes exchanged": {"upper_x": lambda t: t.upper_y, "upper_y": lambda t: t.upper_x},
}


@pytest.mark.parametrize("seed", range(3))
def test_the_new_operation_lies_between_its_planes(seed: int) -> None:
    assert not escapes(Hypot(), seed)


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_judge_catches_a_false_plane(mistake: str) -> None:
    assert escapes(changed(**MUTANTS[mistake]), 0)


# ---- every method bounds a network with it
# --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers around hypot, one of its arguments broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, 6), nn.Linear(3, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3) -> (N, 3)."""
        return self.out(torch.relu(torch.hypot(self.first(x), self.second(x)) - 0.6))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, build in BUILDERS.items():
        monkeypatch.setitem(COMPOSITIONS, name, build)


def model() -> Net:
    torch.manual_seed(3)
    return Net().double().eval()


@pytest.fixture
def case(registered: None) -> nets.Case:
    graph = capture(Classifier(model()), torch.rand(2, 3, dtype=F64))
    assert sum(isinstance(node.op, Hypot) for node in graph.nodes) == 1
    return nets.case_of(graph, 1, ball=Ball("linf", 0.2, box=None))


def test_intervals_and_sweeps_hold(case: nets.Case) -> None:
    assert not violations(case, nets.attacked(case, 1, steps=10))


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_false_plane_is_caught_in_a_network(case: nets.Case, mistake: str) -> None:
    def spoiled() -> Iterator[nets.Case]:
        for radius in (0.1, 0.3, 1.0):
            nodes = tuple(
                replace(n, op=changed(**MUTANTS[mistake])) if isinstance(n.op, Hypot) else n
                for n in case.graph.nodes
            )
            graph = replace(case.graph, nodes=nodes, apart=None)
            yield nets.case_of(graph, 1, ball=Ball("linf", radius, box=None))

    assert any(violations(bad, nets.attacked(bad, 2, steps=20)) for bad in spoiled())


def test_forward_forms_hold(case: nets.Case) -> None:
    region, points = case.ball.region(case.x), nets.attacked(case, 2, steps=10)
    box = input_box(region, CHECKED)
    boxes, _ = forward(case.graph, box.lower, box.upper, CHECKED)
    values = case.graph.values(points.flatten(0, 1))
    for number, value in enumerate(values):
        each = value.view(len(points), len(case.x), *value.shape[1:])
        assert bool(((each >= boxes[number].lower) & (each <= boxes[number].upper)).all())


def test_the_search_moves_the_new_planes(case: nets.Case) -> None:
    state = relax(case.graph, case.ball.region(case.x, outward=True), CHECKED)
    root = Root.of(state, SEARCH.dtype, case.ball.region(case.x.float()))
    spec = torch.eye(3, dtype=torch.float32).repeat(len(case.x), 1)[:, None]
    rows = torch.arange(len(case.x)).repeat_interleave(3)
    dual = Dual(root, rows, len(case.graph.nodes), spec)
    number = next(k for k, n in enumerate(case.graph.nodes, 1) if isinstance(n.op, Hypot))
    best, free = Ascent(10, 0.3, enough=torch.inf)(dual, dual.guess())
    assert bool((best >= dual.see(dual.guess()).bound).all())
    assert bool((free.alpha[number] != 0.5).any())


TOOLS = (IBP(), CROWN(), AlphaCROWN(), BranchAndBound(seconds=2, steps=4), InputSplit(seconds=2))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: type(tool).__name__)
def test_no_claim_is_contradicted(registered: None, tool: Any) -> None:
    classifier = Classifier(model())
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    y = classifier.logits64(x).argmax(1)
    problem = Problem.pose(classifier, x, y, Ball("linf", 0.05, box=None))
    claimed = 0
    for claim in (c for c in tool(problem) if isinstance(c, Claim)):
        noise = torch.rand(400, *x.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
        offsets = (0.05 * (2 * noise - 1)).index_put(
            (torch.arange(200),), 0.05 * torch.sign(noise[:200] - 0.5)
        )
        margins = torch.stack(
            [
                problem.goal.worst(problem.goal.margins(classifier.logits64(x + d), y))
                for d in offsets
            ]
        ).amin(0)[claim.index]
        assert bool((claim.margin <= margins + 1e-12).all())
        claimed += int((claim.radius >= 0.05).sum())
    assert claimed
