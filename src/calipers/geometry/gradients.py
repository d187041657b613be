"""How strongly does the model answer a small change of its input? Gradients at the points, and what
they say to first order.

A linear score w'x + b changes by radius * ||w||_dual at worst, for linf by radius * ||w||_1: many
small weights add up (Goodfellow et al. 2015, arXiv 1412.6572). For any other model these are
first-order values,
*estimates*: a curved decision boundary may be nearer or farther, and gradients may be masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.norms import norm_for, norm_named
from calipers.problem.problem import Problem
from calipers.problem.region import Region

Of = Literal["loss", "margin"]
_POINTS = 256
_MEASURED = ("l1", "l2", "linf")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Gradients `gradient (N, *D)` of the loss or of the worst margin, and their sizes, (N,)
    float64.

    `dual` is their dual norm in the threat's norm, weights and mask: the score changes by at most
    radius * dual to first order. `norms` are l1, l2 and linf norms of the whole gradient. `margin`
    is the worst margin; `estimate` the first-order distance to the decision boundary, the smallest
    margin / dual norm of all rivals, box left out: neither an upper nor a lower bound, but exact
    for linear models without a box. 0 where the model is wrong.
    """

    gradient: Tensor
    dual: Tensor
    norms: dict[str, Tensor]
    margin: Tensor
    estimate: Tensor


def sensitivity(problem: Problem, of: Of = "margin") -> Sensitivity:
    """Measure gradients at all points: of the worst margin, or of the "loss" (cross-entropy).

    Cost for each point: a forward pass, and a backward pass for each margin and for the loss, in
    the model's own precision.
    """
    if of not in ("loss", "margin"):
        raise BadInput(f"a gradient is of the 'loss' or of the 'margin', got {of!r}")
    parts = [
        _measured(problem.take(index), of)
        for index in torch.arange(len(problem), device=problem.x.device).split(_POINTS)
    ]
    gradient, dual, margin, estimate = (torch.cat([p[k] for p in parts]) for k in range(4))
    flat = gradient.flatten(1).double()
    norms = {name: norm_for(name, problem.x.shape[1:]).of(flat) for name in _MEASURED}
    return Sensitivity(gradient, dual, norms, margin, estimate)


def _measured(problem: Problem, of: Of) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    margins, slopes, loss = margin_gradients(problem)
    worst = problem.goal.worst(margins)
    dual = torch.stack([dual_norm(problem.region, slopes[:, s]) for s in range(slopes.shape[1])], 1)
    ratio = torch.where(dual > 0, margins.double() / dual, torch.inf)
    # Combined as margins are: the smallest over rivals, for a target the largest; where no margin
    # is left to lose it is 0.
    estimate = torch.where(worst > 0, problem.goal.worst(ratio), 0.0)
    deciding = (margins - worst[:, None]).abs().argmin(1)
    chosen = (
        loss if of == "loss" else slopes[torch.arange(len(slopes), device=slopes.device), deciding]
    )
    return chosen, dual_norm(problem.region, chosen), worst, estimate


def margin_gradients(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return the margins (N, S), their gradients (N, S, *D) and the gradient of the cross-entropy
    (N, *D).
    """
    with problem.classifier.frozen(), torch.enable_grad():
        x = problem.x.clone().requires_grad_()
        margins = problem.margins(problem.classifier.network(x))
        slopes = [_gradient(margins[:, s], x) for s in range(margins.shape[1])]
        loss = torch.nn.functional.softplus(-problem.goal.smooth(margins))
        steepest = _gradient(loss, x)
    return margins.detach(), torch.stack(slopes, 1), steepest


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of each point's own value; zero where the model cuts the graph, which
    shows as such in the norms.
    """
    (g,) = (
        torch.autograd.grad(values.sum(), x, retain_graph=True, allow_unused=True)
        if values.requires_grad
        else (None,)
    )
    return torch.zeros_like(x) if g is None else g


def dual_norm(region: Region, g: Tensor) -> Tensor:
    """Return the dual norm of directions g (M, *D) over a region's movable features, (M,) float64:
    the most that <g, delta> gains for each unit of radius.
    """
    flat = torch.where(
        (region.low == 0) & (region.high == 0) & _frozen(region), 0.0, g.flatten(1).double()
    )
    return region.norm.dual(flat if region.weight is None else flat / region.weight.double())


def _frozen(region: Region) -> Tensor:
    """Return the features (d,) that the mask holds still; one that the box holds can move in
    first-order estimates, which leave the box out.
    """
    mask = region.ball.mask
    return (
        torch.zeros(region.low.shape[1], dtype=torch.bool, device=region.low.device)
        if mask is None
        else ~mask.to(region.low.device).flatten()
    )


def linear_score_change(weight: Tensor, radius: float | Tensor, norm: str) -> Tensor:
    """Return by how much a linear score w'x + b can change within a ball: radius * dual norm of w
    (..., d), exact without a box.

    >>> gradient = torch.tensor([3.0, -4.0])
    >>> [float(linear_score_change(gradient, 1.0, norm)) for norm in ("linf", "l2")]
    [7.0, 5.0]
    """
    if norm_named(norm).is_count:
        raise BadInput(f"{norm!r} counts features: without a box their change has no end")
    return torch.as_tensor(radius, dtype=torch.float64) * norm_named(norm).dual(weight.double())


__all__ = ["Sensitivity", "dual_norm", "linear_score_change", "margin_gradients", "sensitivity"]
