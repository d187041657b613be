"""Which networks compute something else than they are? Back doors that open or shut by rounding
(after Zombori et al. 2021, ICLR).

All are asked about the point 0 and the linf ball of radius 1. A trigger that opens for x_0 > 1/2
meets a large number that comes and goes again; what is left of it is taken off a healthy margin.
With weights that differ by many powers of ten the order of a sum decides what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INPUTS = 4


@dataclass(frozen=True, eq=False)
class BackDoor:
    """A network, and its name; `grid()` are inputs of its ball at which it may be wrong."""

    name: str
    network: nn.Sequential

    def grid(self) -> Tensor:
        """Return the points (M, 4): x_0 from -1 to 1 in steps of 1/64, the others 0."""
        dtype = self.network[0].weight.dtype
        assert isinstance(dtype, torch.dtype)
        line = torch.linspace(-1, 1, 129, dtype=dtype)
        return torch.cat([line[:, None], torch.zeros(129, INPUTS - 1, dtype=dtype)], 1)


def hidden(sigma: float, dtype: torch.dtype) -> BackDoor:
    """The trigger is added to `sigma` by one layer, which the next takes off again: floats that
    step by step see no trigger, and exact numbers do.
    """
    last = torch.ones(1, 1), torch.tensor([-0.5])
    return BackDoor(f"hidden {sigma:.0e}", _network(dtype, *_add_and_take(sigma, 2.0), last))


def sprung(sigma: float, dtype: torch.dtype) -> BackDoor:
    """The trigger, never more than the margin, is rounded up to a unit in the last place of
    `sigma`: exact numbers see no example, and floats do.
    """
    power = 2.0 ** round(math.log2(sigma))
    unit = power * torch.finfo(dtype).eps
    return BackDoor(
        f"sprung {sigma:.0e}", _network(dtype, *_add_and_take(power, 0.7 * unit), margin=0.8 * unit)
    )


def ordered(sigma: float, dtype: torch.dtype) -> BackDoor:
    """`sigma`, the trigger and -`sigma` meet in one sum: whether the trigger survives is for the
    order to say.
    """
    lines = [[0.0, 0, 0, 0], [2.0, 0, 0, 0], [0.0, 0, 0, 0]]
    first = torch.tensor(lines), torch.tensor([1.0, -1.0, 1.0])
    return BackDoor(
        f"ordered {sigma:.0e}",
        _network(
            dtype,
            first,
            (torch.tensor([[sigma, 2.0, -sigma]], dtype=torch.float64), torch.zeros(1)),
        ),
    )


def _add_and_take(sigma: float, slope: float) -> tuple[tuple[Tensor, Tensor], ...]:
    trigger = torch.tensor([[2 * slope, 0, 0, 0]]).double(), torch.tensor([-slope]).double()
    one = torch.ones(1, 1)
    return (
        trigger,
        (one, torch.tensor([sigma], dtype=torch.float64)),
        (one, torch.tensor([-sigma], dtype=torch.float64)),
    )


def _network(
    dtype: torch.dtype, *layers: tuple[Tensor, Tensor], margin: float = 1.0
) -> nn.Sequential:
    """Return the layers with ReLUs between them, and at the end the logits (margin, what came out,
    -1).
    """
    modules: list[nn.Module] = []
    last = (
        torch.tensor([[0.0], [1.0], [0.0]]),
        torch.tensor([margin, 0.0, -1.0], dtype=torch.float64),
    )
    for weight, bias in (*layers, last):
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1]).eval()
