"""Are operations sound, or refused, with parameters at and beyond what their bounds assume? However
they are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Apply
from torch import Tensor, nn
from torch.nn import functional

from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.input_split import InputSplit
from calipers.errors import CaptureError, UnsupportedOp
from calipers.graph.activations import ACTIVATIONS, Clip, TwoPieces
from calipers.graph.affine import Sum
from calipers.graph.capture import capture
from calipers.graph.kinds import Elementwise
from calipers.graph.smooth_table import elu, power, softplus
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.threats.ball import Ball

TOOLS = (
    IBP(),
    CROWN(),
    AlphaCROWN(steps=3, intermediate=2),
    BranchAndBound(seconds=0.3),
    InputSplit(seconds=0.3),
)


def crossed(op: Elementwise) -> bool:
    """Does a line or the range of a function leave it on the sound side, on intervals around its
    corners and far off?
    """
    ends = torch.tensor(
        [-40.0, -3.0, -1.0, -0.76, -0.75, -0.749, -0.1, 0.0, 0.2, 0.3, 0.7, 1.0, 2.0, 30.0],
        dtype=torch.float64,
    )
    lower, upper = (t.flatten() for t in torch.meshgrid(ends, ends, indexing="ij"))
    lower, upper = lower[lower <= upper], upper[lower <= upper]
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    x = (lower[:, None] + (upper - lower)[:, None] * share).clamp(lower[:, None], upper[:, None])
    y = op.value(x)
    room = 1e-12 * (1 + y.abs().amax(1, keepdim=True) + x.abs().amax(1, keepdim=True))
    low, high = op.range(lower, upper)
    wrong = bool((y < low[:, None] - room).any()) or bool((y > high[:, None] + room).any())
    for alpha in (None, 0.0, 0.4, 1.0):
        a, a_at, b, b_at = (
            t[:, None]
            for t in op.relax(
                lower, upper, None if alpha is None else torch.full_like(lower, alpha)
            )
        )
        wrong |= bool((a * x + a_at > y + room).any()) or bool((b * x + b_at < y - room).any())
    return wrong


ODD: dict[str, list[tuple[Any, ...]]] = {
    "aten.clamp.default": [
        (0.7, 0.2),
        (3, 1),
        (1, 1),
        (0.2, -1e300),
        (-math.inf, 0.3),
        (None, -0.5),
        (2.0, None),
        (-1e30, 1e30),
    ],
    "aten.clamp_min.default": [(-math.inf,), (1e30,), (2,)],
    "aten.clamp_max.default": [(math.inf,), (-1e30,), (-2,)],
    "aten.hardtanh.default": [(0.5, -0.5), (1, 1), (0, 6)],
    "aten.leaky_relu.default": [(-2.0,), (40.0,), (0,), (1,), (-1,), (1e12,)],
    "aten.softplus.default": [
        (1.0, -3.0),
        (2.0, -1.5),
        (4, 0),
        (0.1, 1e9),
        (1.0, -2000.0),
        (30.0, 1.0),
    ],
    "aten.elu.default": [(40.0,), (1e-9,), (1.0, 3.0, 0.1), (2, 1, 4), (1e9,)],
    "aten.celu.default": [(1e-6,), (50,)],
    "aten.pow.Tensor_Scalar": [
        (2,),
        (3,),
        (5,),
        (6,),
        (0.25,),
        (2.5,),
        (-1,),
        (-2,),
        (-0.5,),
        (-2.5,),
    ],
}


@pytest.mark.parametrize(
    ("name", "args"), [(name, args) for name, each in ODD.items() for args in each], ids=str
)
def test_functions_with_odd_parameters_lie_between_their_lines(
    name: str, args: tuple[Any, ...]
) -> None:
    op = ACTIVATIONS[name]((None, *args))
    assert op is not None and not crossed(op)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Clip(math.nan, 1.0),
        lambda: Clip(0.0, math.nan),
        lambda: Clip(math.inf, math.inf),
        lambda: Clip(-math.inf, -math.inf),
        lambda: TwoPieces(math.nan, 1.0),
        lambda: TwoPieces(-math.inf, 1.0),
        lambda: softplus(0.0, 20.0),
        lambda: softplus(-1.0, 20.0),
        lambda: softplus(math.inf, 20.0),
        lambda: softplus(1.0, math.nan),
        lambda: elu(-1.0, 1.0, 1.0),
        lambda: elu(1.0, math.nan, 1.0),
        lambda: elu(1.0, 1.0, 0.0),
        lambda: elu(math.inf, 1.0, 1.0),
        lambda: power(math.nan),
        lambda: power(1e17),
        lambda: ACTIVATIONS["aten.celu.default"]((None, 0.0)),
        lambda: ACTIVATIONS["aten.celu.default"]((None, -2.0)),
        lambda: ACTIVATIONS["aten.clamp.default"]((None, object())),
    ],
)
def test_parameters_without_bounds_are_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedOp, match=r"no bounds for .* (with|whose)"):
        build()


def claims_of(function: Callable[[Tensor], Tensor], tool: Any) -> tuple[Problem, Tensor]:
    """Return a problem about one number x and the radii claimed: z0 = f(x) + 0.3 x against a
    constant near its middle value.
    """
    x = torch.linspace(0.05, 0.95, 7)[:, None]
    level = float((function(x.double()) + 0.3 * x.double()).median()) + 0.013
    module = Apply(lambda t: torch.cat([function(t) + 0.3 * t, 0 * t + level], 1)).eval()
    classifier = Classifier(module)
    problem = Problem.pose(classifier, x, classifier.logits(x).argmax(1), Ball("linf", 0.1, None))
    radius = torch.zeros(len(x), dtype=torch.float64)
    for claim in tool(problem):
        if isinstance(claim, Claim):
            radius[claim.index] = claim.radius
    return problem, radius


def contradicted(function: Callable[[Tensor], Tensor], tool: Any) -> bool:
    """Does a certified point have another class within its radius?"""
    problem, radius = claims_of(function, tool)
    points = problem.x.double() + radius[:, None] * torch.linspace(-1, 1, 201, dtype=torch.float64)
    logits = problem.classifier.module(points.reshape(-1, 1)).view(*points.shape, 2)
    return bool(((logits.argmax(-1) != problem.y[:, None]) & (radius > 0)[:, None]).any())


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda t: torch.clamp(t, min=2.0, max=1.0),
    "clamp, integers": lambda t: t.clamp(3, 1),
    "clip in the range": lambda t: torch.clip(t, 0.7, 0.2),
    "softplus": lambda t: functional.softplus(t - 0.5, 2.0, -0.3),
    "leaky relu": lambda t: functional.leaky_relu(t - 0.5, -3.0),
    "elu": lambda t: functional.elu(t - 0.5, 25.0),
    "power 1": lambda t: t.pow(1),
    "power 0": lambda t: t.pow(0.0),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: type(tool).__name__)
@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_claims_about_functions_with_odd_parameters_hold(name: str, tool: Any) -> None:
    assert not contradicted(WRITTEN[name], tool)


def corners_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clip, "__post_init__", lambda self: None)
    monkeypatch.setattr(
        Clip,
        "unstable",
        lambda self, lower, upper: (
            ((lower < self.low) & (upper > self.low)) | ((lower < self.high) & (upper > self.high))
        ),
    )


def asked_far(tool: Any) -> bool:
    """Is x = 1 certified within 0.9? It is of class 0 only where x is above 1/3."""

    def forward(t: Tensor) -> Tensor:
        z0 = torch.clamp(t, min=2.0, max=1.0) + 0.3 * t
        return torch.cat([z0, 0 * z0 + 1.1], 1)

    problem = Problem.pose(
        Classifier(Apply(forward).eval()),
        torch.tensor([[1.0]]),
        torch.tensor([0]),
        Ball("linf", 0.9, None),
    )
    return any(
        bool((claim.radius > 0).any()) for claim in tool(problem) if isinstance(claim, Claim)
    )


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: type(tool).__name__)
def test_a_clamp_whose_ends_are_out_of_order_certifies_nothing_false(tool: Any) -> None:
    assert not asked_far(tool)


@pytest.mark.parametrize("tool", TOOLS[1:4], ids=lambda tool: type(tool).__name__)
def test_mutant_that_leaves_corners_out_of_order_certifies_what_is_false(
    tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corners_as_given(monkeypatch)
    assert asked_far(tool)


def test_mutant_that_leaves_corners_out_of_order_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not crossed(Clip(0.7, 0.2))
    corners_as_given(monkeypatch)
    assert crossed(Clip(0.7, 0.2))


def test_mutant_without_the_fall_of_a_softplus_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    op = softplus(2.0, -1.5)
    monkeypatch.setattr(type(op), "_fall", lambda self, lower, upper: torch.zeros_like(lower))
    assert crossed(op)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a negative divisor": lambda t: functional.avg_pool2d(t, 2, divisor_override=-3),
    "elu with negative alpha": lambda t: functional.elu(t, -1.0),
    "celu with negative alpha": lambda t: functional.celu(t, -1.0),
    "softplus with negative beta": lambda t: functional.softplus(t, -1.0),
    "a variance of one element": lambda t: t.flatten(1)[:, :1].var(1, keepdim=True),
    "a power by the batch size": lambda t: t ** t.shape[0],
    "a sum with an infinite factor": lambda t: torch.add(t, t.relu(), alpha=math.inf),
}


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_bounds_is_refused_by_name(name: str) -> None:
    module = nn.Sequential(Apply(REFUSED[name]), nn.Flatten(), nn.LazyLinear(3))
    x = torch.rand(3, 2, 4, 4)
    module(x)
    with pytest.raises((UnsupportedOp, CaptureError)):
        capture(Classifier(module.eval()), x)


def test_a_factor_of_a_residual_sum_is_taken_in_full_precision() -> None:
    """Bounds that carry patches multiply by the factor themselves: as float32 would hold 0.1, it is
    another function.
    """
    assert [float(s) for s in Sum((1.0, 0.1)).slopes()] == [1.0, 0.1]
