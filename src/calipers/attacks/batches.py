"""How do attacks work on many points at once? The size of a batch, one value a point beside tensors of points, and all their gradients in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.problem.problem import Problem

BATCH = 256  # points in flight: enough to fill two cores and to hide what a loop itself does, small enough to stay in cache


def input_gradient(loss: Tensor, x: Tensor, keep: bool = False) -> Tensor:
    """Return the gradient of the sum; zero where it is not finite, or where the model cuts the graph (a threshold, a detach)."""
    (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=keep, allow_unused=True) if loss.requires_grad else (None,)
    return torch.zeros_like(x) if gradient is None else gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def backwards_of(problem: Problem) -> int:
    """Return how many backward passes a step of a gradient attack makes: one, or none where the model gives no gradient by its input at all."""
    return 0 if problem.classifier.no_gradient else 1


def per_job(values: Tensor, x: Tensor) -> Tensor:
    """Return one value a job, (B,), in a shape that broadcasts with x (B, *D)."""
    return values.view(-1, *[1] * (x.dim() - 1))
