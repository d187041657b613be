"""Target classes worth attacking one by one.

They are those that are nearest by a linear model of their margins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.attacks.engine.batches import BATCH, in_flight, input_gradient
from calipers.problem.goals import Untargeted
from calipers.problem.problem import Problem


def target_count(problem: Problem, targets: int) -> int:
    """Return how many other classes can be attacked one by one.

    None where all of them have to be beaten at once.
    """
    return min(targets, problem.classes - 1) if isinstance(problem.goal, Untargeted) else 0


# classes whose gradients are examined: so many, or so many times those that are wanted
_NEAR, _TIMES = 32, 4


def looked_at(problem: Problem, count: int) -> int:
    """Return how many classes are examined to find the `count` nearest.

    All of them where there are few, of many those of smallest margin.
    """
    return min(problem.classes - 1, max(_NEAR, _TIMES * count))


def rank_targets(problem: Problem, count: int, batch: int = BATCH) -> Tensor:
    """Return the margin columns (N, count) most worth attacking.

    Smallest margin over the dual norm of its gradient first; for a linear model that quotient is
    the exact distance to the class. Cost: one forward pass, and one backward pass for each class
    that is `looked_at`.
    """
    # the autograd graphs of all points at once would not fit into memory
    parts = torch.arange(len(problem), device=problem.x.device).split(in_flight(problem, batch))
    return torch.cat([_ranked(problem.take(part), count) for part in parts])


def _ranked(problem: Problem, count: int) -> Tensor:
    x = problem.x.clone().requires_grad_()
    with problem.classifier.frozen():
        margins = problem.margins(problem.classifier.network(x))
        problem.classifier.passes.add(len(x), len(x) * looked_at(problem, count))
        few, every = (
            looked_at(problem, count),
            torch.arange(margins.shape[1], device=x.device).expand(margins.shape),
        )
        near = (
            every
            if few >= margins.shape[1]
            else margins.detach().topk(few, dim=1, largest=False).indices
        )
        chosen = margins.gather(1, near)
        length = torch.stack(
            [
                _steepness(problem, input_gradient(chosen[:, s], x, keep=True).flatten(1))
                for s in range(near.shape[1])
            ],
            1,
        )
    score = (chosen.detach() / length.clamp_min(torch.finfo(x.dtype).tiny)).nan_to_num(
        nan=torch.inf
    )
    return near.gather(
        1, score.argsort(1)[:, torch.arange(count, device=x.device).clamp(max=near.shape[1] - 1)]
    )


def _steepness(problem: Problem, slopes: Tensor) -> Tensor:
    norm, weight = problem.region.norm, problem.region.weight
    return norm.dual(slopes if weight is None else slopes / weight)
