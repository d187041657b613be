"""What does an attack climb? Losses made of margins, larger where the model is nearer to failing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.goals import Goal

Objective = Callable[[Tensor, Goal], Tensor]
"""(margins (B, S), goal) -> (B,)."""

LossName = Literal["margin", "cross_entropy"]


def margin(margins: Tensor, goal: Goal) -> Tensor:
    """Return minus the worst margin: piecewise linear, does not vanish however confident the model is; safe for two classes."""
    return -goal.worst(margins)


def cross_entropy(margins: Tensor, goal: Goal) -> Tensor:
    """Return the cross-entropy, -log softmax(z)_y for an untargeted goal; its gradient underflows in float32 beyond margins of about 100."""
    return -goal.smooth(margins)


def toward(margins: Tensor, rival: Tensor) -> Tensor:
    """Return minus the margin to one chosen rival column (B,)."""
    return -margins.gather(1, rival[:, None])[:, 0]


OBJECTIVES: dict[str, Objective] = {"margin": margin, "cross_entropy": cross_entropy}


def objective_named(name: str) -> Objective:
    """Return the loss of that name."""
    if name not in OBJECTIVES:
        raise BadInput(f"unknown loss {name!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
    return OBJECTIVES[name]
