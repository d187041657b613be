"""Detection of missing, zero or non-finite gradients of a model.

Looked for at the points of the problem, before gradient-based attacks are trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.problem.problem import Problem

_ASKED = 64  # points of a problem that are looked at
_ROWS = 64


def gradients(problem: Problem, seed: int = 0) -> dict[str, int | str]:
    """Count the points whose worst margin has no usable gradient.

    Returns how many points were `asked`, at how many of them the gradient does not exist ("none":
    the model cuts its graph by a detach, a `no_grad` block or NumPy), is exactly zero ("zero":
    rounding, a threshold, saturation) or is not finite ("not finite"), and `why`. Points that hold
    NaN or infinity are left out; of many points a random part is looked at. Cost: a forward and a
    backward pass for each of at most 64 points.
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
    """Count points of no, of zero and of non-finite gradient, (3,)."""
    classifier, n = problem.classifier, len(problem)
    classifier.passes.add(forwards=n)
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
    classifier.passes.add(backwards=n)
    flat = slope.flatten(1)
    return (
        torch.stack([torch.zeros_like(flat[:, 0]), (flat == 0).all(1), ~flat.isfinite().all(1)], 1)
        .sum(0)
        .long()
    )


__all__ = ["gradients"]
