"""Checks whether points met by a complete search are adversarial.

They are made admissible and evaluated by the model itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.problem.problem import Problem


def judged(problem: Problem, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return points (P, *D) made admissible, and their worst margins (P,).

    For the one point of the problem. The margin is infinite where a point is not finite. Whether a
    point counts as an adversarial example is decided by the referee, not here. Cost: a forward pass
    each.
    """
    region = problem.region.take(torch.zeros(len(points), dtype=torch.long, device=points.device))
    inside = region.snap(points.to(problem.x.dtype))
    worst = problem.goal.worst(
        problem.goal.margins(problem.classifier.logits(inside), problem.y.expand(len(points)))
    )
    return inside, torch.where(
        inside.flatten(1).isfinite().all(1), worst, torch.full_like(worst, torch.inf)
    )
