"""Batch sizes and input gradients for attacks on many points at once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem

# points in flight: enough to fill two cores and to hide the overhead of the loop, small enough to
# stay in cache
BATCH = 256
_HELD = 2**30  # bytes of the points in flight and of what a forward pass keeps of them
_HELD_ELSEWHERE = 2**33  # the same on an accelerator
# tensors of a point's size that a loop holds for it: iterates, gradients, ends of the box, memories
_COPIES = 24
_ROOM = 2.0  # factor on what is kept for the backward pass, for what a layer needs while it runs
_LIGHT = 2**17  # up to so many bytes of copies, and parameters, no batch is too large


def in_flight(problem: Problem, most: int) -> int:
    """Return how many points may be in flight at once.

    `most`, or as many as their bytes allow. What a pass keeps of a point is measured once for a
    model.
    """
    own = problem.x[:1].numel() * problem.x.element_size() * _COPIES if len(problem) else 0
    kept = (
        _kept(problem.classifier, problem.x[:1])
        if own > _LIGHT or _parameters(problem.classifier) > _LIGHT
        else 0
    )
    held = _HELD if problem.x.device.type == "cpu" else _HELD_ELSEWHERE
    return max(1, min(most, int(held // max(1.0, own + _ROOM * kept))))


def _parameters(classifier: Classifier) -> int:
    return sum(p.numel() for p in classifier.module.parameters())


_measured: weakref.WeakKeyDictionary[Classifier, dict[Hashable, int]] = weakref.WeakKeyDictionary()


def _kept(classifier: Classifier, point: Tensor) -> int:
    """Return how many bytes a forward pass keeps for the backward pass.

    Parameters are left out.
    """
    sizes = _measured.setdefault(classifier, {})
    key = (tuple(point.shape), point.dtype)
    if key not in sizes and len(point):
        sizes[key] = _measure(classifier, point)
    return sizes.get(key, 0)


def _measure(classifier: Classifier, point: Tensor) -> int:
    own = {
        t.untyped_storage().data_ptr()
        for t in [*classifier.network.parameters(), *classifier.network.buffers()]
    }
    held = dict[int, int]()

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    network: nn.Module = classifier.network
    with (
        classifier.frozen(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        network(point.detach().clone().nan_to_num(0.0).requires_grad_(point.is_floating_point()))
    return sum(held.values())


def input_gradient(loss: Tensor, x: Tensor, keep: bool = False) -> Tensor:
    """Return the gradient of the summed loss by x.

    Zero where it is not finite, or where the model cuts the graph (a threshold, a detach).
    """
    (gradient,) = (
        torch.autograd.grad(loss.sum(), x, retain_graph=keep, allow_unused=True)
        if loss.requires_grad
        else (None,)
    )
    return (
        torch.zeros_like(x)
        if gradient is None
        else gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    )


def backwards_of(problem: Problem) -> int:
    """Return how many backward passes a step of a gradient attack makes.

    One, or none where the model gives no gradient by its input at all.
    """
    return 0 if problem.classifier.no_gradient else 1


def per_job(values: Tensor, x: Tensor) -> Tensor:
    """Return one value per job, (B,), in a shape that broadcasts with x.

    x has shape (B, *D).
    """
    return values.view(-1, *[1] * (x.dim() - 1))
