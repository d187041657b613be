"""Does the model have gradients to follow? Asked at the points themselves, before attacks by
gradients are believed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.problem.problem import Problem

_ASKED = 64  # points of a question that are looked at
_ROWS = 64


def gradients(problem: Problem, seed: int = 0) -> dict[str, int | str]:
    """Return of how many points the gradient of the worst margin does not exist, is exactly zero,
    or is not finite, how many were `asked`, and `why`.

    "none": the model cuts its graph (a detach, a `no_grad` block, NumPy). "zero": rounding, a
    threshold, saturation. Points that hold NaN or infinity are left out; of many points a random
    part is asked. Cost: a forward and a backward pass for each of at most 64 points.
    """
    places = torch.nonzero(problem.x.flatten(1).isfinite().all(1)).flatten()
    if len(places) > _ASKED:
        luck = problem.streams(seed).take(places).uniform(1, torch.float64)[:, 0]
        places = places[luck.argsort()[:_ASKED]].sort().values
    kinds = [_kinds(problem.take(part)) for part in places.split(_ROWS) if len(part)]
    counts = torch.stack(kinds).sum(0).tolist() if kinds else [0, 0, 0]
    none, zero, infinite = map(int, counts)
    return {
        "asked": len(places),
        "none": none,
        "zero": zero,
        "not finite": infinite,
        "why": problem.classifier.no_gradient,
    }


def _kinds(problem: Problem) -> Tensor:
    """Return how many points have no gradient, one of zeros, one that is not finite, (3,)."""
    classifier, n = problem.classifier, len(problem)
    classifier.counter.forwards += n
    with classifier.frozen():
        x = problem.x.clone().requires_grad_()
        worst = problem.goal.worst(problem.margins(classifier.network(x)))
        (slope,) = (
            torch.autograd.grad(worst.sum(), x, allow_unused=True)
            if worst.requires_grad
            else (None,)
        )
    if slope is None:
        return torch.tensor([n, 0, 0])
    classifier.counter.backwards += n
    flat = slope.flatten(1)
    return (
        torch.stack([torch.zeros_like(flat[:, 0]), (flat == 0).all(1), ~flat.isfinite().all(1)], 1)
        .sum(0)
        .long()
    )


__all__ = ["gradients"]
