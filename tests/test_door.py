"""What people hand over at the door: models, data and arguments of every kind, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers import Ball
from calipers.errors import BadInput

BALL = Ball("linf", 0.05)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def points(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def labels(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.mark.parametrize("call", [calipers.attack, calipers.certify])
@pytest.mark.parametrize("tool", ["PGD", calipers.PGD(), calipers.CROWN()])
def test_a_tool_given_first_is_told_the_order(call: Any, tool: Any) -> None:
    model, x = net(), points()
    with pytest.raises(BadInput, match=r"the order is \(model, x, y, threat\).*after the threat"):
        call(tool, model, x, labels(model, x), BALL)


def test_a_tool_may_be_left_out_or_named() -> None:
    model, x = net(), points()
    y = labels(model, x)
    usual, named = (
        calipers.certify(model, x, y, BALL),
        calipers.certify(model, x, y, BALL, tool="CROWN"),
    )
    assert torch.equal(usual.margin, named.margin)
    found = calipers.attack(model, x, y, BALL)
    assert bool(found.forwards.any())
    assert torch.equal(
        found.distance, calipers.attack(model, x, y, BALL, "PGD(steps=100, restarts=20)").distance
    )
