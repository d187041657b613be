"""Which other classes are worth attacking one by one? Those that are nearest by a linear model of their margins."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.attacks.batches import BATCH, input_gradient
from calipers.problem.goals import Untargeted
from calipers.problem.problem import Problem


def rivals(problem: Problem, targets: int) -> int:
    """Return how many rivals can be attacked one by one: none where all of them have to be beaten at once."""
    return min(targets, problem.classes - 1) if isinstance(problem.goal, Untargeted) else 0


def rank_rivals(problem: Problem, count: int, batch: int = BATCH) -> Tensor:
    """Return the margin columns (N, count) most worth attacking: smallest margin over the dual norm of its gradient first.

    That quotient is the exact distance to the rival for a linear model. Cost: one forward, and one backward pass for each rival.
    """
    parts = torch.arange(len(problem), device=problem.x.device).split(batch)  # the graphs of all points at once would not fit
    return torch.cat([_ranked(problem.take(part), count) for part in parts])


def _ranked(problem: Problem, count: int) -> Tensor:
    x = problem.x.clone().requires_grad_()
    with problem.classifier.frozen():
        margins = problem.margins(problem.classifier.network(x))
        columns = range(margins.shape[1])
        slopes = [input_gradient(margins[:, s], x, keep=True).flatten(1) for s in columns]
    norm, weight = problem.region.norm, problem.region.weight
    length = torch.stack([norm.dual(g if weight is None else g / weight) for g in slopes], 1)
    score = (margins.detach() / length.clamp_min(torch.finfo(x.dtype).tiny)).nan_to_num(nan=torch.inf)
    return score.argsort(1)[:, torch.arange(count, device=x.device).clamp(max=margins.shape[1] - 1)]
