"""What does an attack climb? Losses made of margins, larger where the model is nearer to failing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.goals import Goal

Objective = Callable[[Tensor, Goal], Tensor]
"""(margins (B, S), goal) -> (B,)."""

LossName = Literal["alternate", "cross_entropy", "margin"]


def margin(margins: Tensor, goal: Goal) -> Tensor:
    """Return minus the worst margin: piecewise linear, does not vanish however confident the model is; safe for two classes."""
    return -goal.worst(margins)


def cross_entropy(margins: Tensor, goal: Goal) -> Tensor:
    """Return log(sum_j exp(-m_j)) for an untargeted goal, the log odds of failure: it rises with the cross-entropy softplus(.), and its gradient has the
    same direction, but does not underflow however confident the model is."""
    return -goal.smooth(margins)


def toward(margins: Tensor, rival: Tensor) -> Tensor:
    """Return minus the margin to one chosen rival column (B,)."""
    return -margins.gather(1, rival[:, None])[:, 0]


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "margin": margin}


def check_loss(name: str) -> None:
    """Raise `BadInput` for a loss that does not exist."""
    if name not in (known := ("alternate", *OBJECTIVES)):
        raise BadInput(f"unknown loss {name!r}; choose one of {', '.join(map(repr, known))}")


def climbed(name: LossName, margins: Tensor, goal: Goal, restart: Tensor) -> Tensor:
    """Return the loss of each job (B,); "alternate" takes cross-entropy and margin by turns over the restarts (B,), as neither is stronger on all models."""
    if name != "alternate":
        return OBJECTIVES[name](margins, goal)
    return torch.where(restart % 2 == 0, cross_entropy(margins, goal), margin(margins, goal))
