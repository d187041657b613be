"""How far may one operation's execution be from what it computes? Asked of operations alone, where whole networks seldom go.

Each test stands for a term of the allowance: without the term it fails.
"""

from __future__ import annotations

import pytest
import torch
from test_executed import refused
from torch import Tensor, nn

from calipers.bounds import float32_execution
from calipers.bounds.backward import _known
from calipers.bounds.interval import Box
from calipers.bounds.rounding import EXECUTED
from calipers.graph.activations import ACTIVATIONS
from calipers.graph.affine import Linear
from calipers.graph.capture import graph_of
from calipers.graph.kinds import Op
from calipers.models.classifier import Classifier

DOUBLE = torch.float64


def allowed(op: Op, x: Tensor) -> Tensor:
    """Return how far the execution at x (N, *D) may be off."""
    return float32_execution.departure(op, [Box(x.double(), x.double())], EXECUTED)


@pytest.mark.parametrize(("size", "out"), [(2, 6), (2, 14), (2, 30)])
def test_a_neighbour_of_weight_zero_gets_a_little(size: int, out: int) -> None:
    """Weights of linear interpolation are computed from places: what is 0 in one precision is not in the other."""
    resize = nn.Upsample(size=out, mode="linear", align_corners=False)
    x = torch.eye(size)[:, None]
    op = graph_of(Classifier(nn.Sequential(resize, nn.Flatten())), x).nodes[0].op
    apart = (resize(x).double() - resize(x.double())).abs()
    assert bool((apart[resize(x.double()) == 0] > 0).any())  # it does happen
    assert bool((apart <= allowed(op, x)).all())


def test_an_image_whose_nearest_pixels_differ_is_refused() -> None:
    resize = nn.Upsample(size=82, mode="nearest")
    x = torch.tensor([[[0.0, 1.0]]])
    assert not torch.equal(resize(x).double(), resize(x.double()))
    refused(nn.Sequential(resize, nn.Flatten(), nn.Linear(82, 3)), "resized", torch.rand(3, 1, 2))


@pytest.mark.parametrize("name", ["aten.sqrt.default", "aten.rsqrt.default", "aten.log.default"])
def test_an_argument_below_the_normal_numbers_may_be_taken_for_zero(name: str) -> None:
    op = ACTIVATIONS[name]((None,))
    assert op is not None
    x = torch.tensor([[1e-40, 1e-39]])
    gone = (op.value(torch.zeros_like(x, dtype=DOUBLE)) - op.value(x.double())).abs()
    assert bool((gone <= allowed(op, x)).all())


def test_a_weight_below_the_normal_numbers_may_be_taken_for_zero() -> None:
    weight, x = torch.tensor([[1e-39]]), torch.tensor([[1000.0]])
    room = allowed(Linear(weight.double(), None), x)
    assert bool(((weight.double() * x.double()).abs() <= room).all())


@pytest.mark.parametrize(("name", "args"), [
    ("aten.softplus.default", (None, 1e-40)), ("aten.elu.default", (None, 1e-42)), ("aten.leaky_relu.default", (None, 1e-42)),
])  # fmt: skip
def test_nothing_is_known_of_functions_with_numbers_that_float32_loses(
    name: str, args: tuple[object, ...]
) -> None:
    op = ACTIVATIONS[name](args)
    assert op is not None and bool(allowed(op, torch.tensor([[0.5, -0.5]])).isinf().all())


def test_ends_that_have_overflown_bound_nothing() -> None:
    endless = torch.tensor([torch.inf, torch.nan, 1.0], dtype=DOUBLE)
    assert _known(endless).tolist() == [-torch.inf, -torch.inf, 1.0]
    box = Box(endless, -endless).mended()
    assert box.lower.tolist() == [-torch.inf, -torch.inf, 1.0] and box.upper.tolist() == [
        torch.inf,
        torch.inf,
        -1.0,
    ]
