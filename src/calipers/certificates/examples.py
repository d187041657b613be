"""Does a complete search meet an adversarial example on its way? Points near a region are made
admissible, and asked of the model itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.problem.problem import Problem


def judged(problem: Problem, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return points (P, *D), made admissible for the one point of the problem, and their worst
    margins (P,): infinite where a point is not finite.

    What counts as an example is the referee's word. Cost: a forward pass each.
    """
    region = problem.region.take(torch.zeros(len(points), dtype=torch.long, device=points.device))
    inside = region.snap(points.to(problem.x.dtype))
    worst = problem.goal.worst(
        problem.goal.margins(problem.classifier.logits(inside), problem.y.expand(len(points)))
    )
    return inside, torch.where(
        inside.flatten(1).isfinite().all(1), worst, torch.full_like(worst, torch.inf)
    )
