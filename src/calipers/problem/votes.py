"""Verdicts on random models, by the votes of many draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calipers.models.stochastic import drawn
from calipers.problem.goals import Goal, Untargeted, is_adversarial


def judged(
    model: nn.Module, points: Tensor, y: Tensor, draws: int, seed: int, goal: Goal | None = None
) -> Tensor:
    """Return the fraction of fresh draws that are fooled, (N,) float64.

    At each point. Use a seed that no attack has seen.
    """
    goal = goal or Untargeted()
    fooled = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    with torch.no_grad():
        for z in drawn(model, points, draws, seed):
            fooled += is_adversarial(goal.worst(goal.margins(z, y)))
    return fooled / draws


def median_worst(answers: Tensor, y: Tensor, goal: Goal) -> Tensor:
    """Return the lower median over the draws of the worst margin, (N,).

    It is not positive where at least half of the draws are fooled; a NaN stays a NaN.
    """
    return torch.stack([goal.worst(goal.margins(z, y)) for z in answers]).median(0).values
