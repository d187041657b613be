"""Losses that attacks climb, larger where the model is nearer to failing.

All are functions of the margins, which are the logits up to a shift: the true class (or the target)
stands at 0 beside the others, so every loss of logit differences can be written in them. "dlr" and
"scaled" do not change when all logits are multiplied by a number: a defence that only scales them
gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.goals import Goal, Targeted

Objective = Callable[[Tensor, Goal], Tensor]
"""(margins (B, S), goal) -> (B,)."""

LossName = Literal["alternate", "cross_entropy", "dlr", "margin", "scaled"]

# least divisor of a loss as a share of the largest margin, so that the loss stays finite where
# logits are equal
_LEAST = 1e-6
_SHARE = 1 / 8


def margin(margins: Tensor, goal: Goal) -> Tensor:
    """Return minus the worst margin, (B,).

    It is piecewise linear in the logits, does not vanish however confident the model is, and works
    for two classes.
    """
    return -goal.worst(margins)


def cross_entropy(margins: Tensor, goal: Goal) -> Tensor:
    """Return the log odds of failure, (B,).

    For an untargeted goal this is log(sum_j exp(-m_j)). It rises with the cross-entropy
    softplus(.), and its gradient has the same direction, but does not underflow however confident
    the model is.
    """
    return -goal.smooth(margins)


def dlr(margins: Tensor, goal: Goal) -> Tensor:
    """Return the difference of logits ratio, (B,).

    It is minus the worst margin over the gap z_(1) - z_(3) of the logits in falling order (Croce
    and Hein 2020, eq. 6).

    Two classes have no third, and the ratio would be a constant: there the margin itself is
    climbed, whose direction no scale changes. The same holds for goals with a target: the paper's
    ratio for them (eq. 7) holds the target in the gap too where it ranks third or fourth, and may
    then push it down (of 200 digits, 20 steps of PGD drove 75 to a class named beforehand, with the
    margin 108). Differs from the paper: nothing is added to the gap, which would make the loss
    depend on the scale; a gap of zero counts as a millionth of the largest margin.
    """
    if margins.shape[1] < 2 or isinstance(goal, Targeted):
        return margin(margins, goal)
    logits = torch.cat([torch.zeros_like(margins[:, :1]), -margins], 1)
    top = logits.topk(3, 1).values
    return -margins.amin(1) / torch.maximum(top[:, 0] - top[:, 2], _least(margins))


def scaled(margins: Tensor, goal: Goal) -> Tensor:
    """Return the cross-entropy's log odds of rescaled logits, (B,).

    The logits are divided by an eighth of the mean absolute margin, which carries no gradient
    (after MIFPE, Yu and Xu 2023).

    At logits times 10,000 the cross-entropy only sees the nearest class, at logits over 10,000 it
    sees all classes alike; this loss weighs them by their distance. Differs from the paper, which
    divides by the gap of the two largest logits: that scale vanishes at the boundary, and losses of
    different steps cannot be compared (APGD of 20 steps then broke 37 of 300 digits, with the mean
    45; any share of the mean from an eighth to a 32nd did the same).
    """
    size = torch.maximum(margins.detach().abs().mean(1) * _SHARE, _least(margins))
    return cross_entropy(margins / size[:, None], goal)


def _least(margins: Tensor) -> Tensor:
    """Return the least divisor of each point, (B,), without gradient.

    It is in proportion to the point's largest margin, and 1 where all margins are zero.
    """
    largest = margins.detach().abs().amax(1)
    return torch.where(largest > 0, _LEAST * largest, 1.0)


def toward(margins: Tensor, target: Tensor) -> Tensor:
    """Return minus the margin to one chosen class, (B,), by its column."""
    return -margins.gather(1, target[:, None])[:, 0]


OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "dlr": dlr,
    "margin": margin,
    "scaled": scaled,
}


def check_loss(name: str) -> None:
    """Raise `BadInput` for a loss that does not exist."""
    if name not in (known := ("alternate", *OBJECTIVES)):
        raise BadInput(f"unknown loss {name!r}; choose one of {', '.join(map(repr, known))}")


def climbed(name: LossName, margins: Tensor, goal: Goal, restart: Tensor) -> Tensor:
    """Return the named loss of each job, (B,).

    "alternate" takes cross-entropy and margin in turn over the restarts (B,), as neither is
    stronger on all models.
    """
    if name != "alternate":
        return OBJECTIVES[name](margins, goal)
    return torch.where(restart % 2 == 0, cross_entropy(margins, goal), margin(margins, goal))
