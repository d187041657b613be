"""Gradients of the loss or margin, and first-order estimates from them.

A linear score w'x + b changes by radius * ||w||_dual at worst, for linf by radius * ||w||_1: many
small weights add up (Goodfellow et al. 2015, arXiv 1412.6572). For any other model these are
first-order values, *estimates*: a curved decision boundary may be nearer or farther, and gradients
may be masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.problem import Problem
from calipers.threats.count_norms import L0
from calipers.threats.norms import norm_for, norm_named
from calipers.threats.region import Region

Of = Literal["loss", "margin"]
_POINTS = 256
_MEASURED = ("l1", "l2", "linf")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Input gradients of N points, their sizes, and first-order distances.

    All fields but `gradient` and `norms` are (N,); those computed from norms are float64.

    Args:
        gradient: (N, *D), the gradient of the loss or of the worst margin, as `sensitivity` was
            asked, in the model's own dtype.
        dual: (N,), the gradient's dual norm under the threat's norm, weights and mask: to first
            order the score changes by at most radius * dual.
        norms: the l1, l2 and linf norms of the whole gradient, (N,) each, by name.
        margin: (N,), the worst margin, in logits; the model is wrong where it is not positive.
        estimate: (N,), the first-order distance to the decision boundary, in the data's units: the
            smallest margin / dual norm over all other classes (the largest for a target), box left
            out; in l0 and pixels the smallest number of changes inside the box. It is neither an
            upper nor a lower bound, but exact for linear models in linf, l2 and l1 without a box,
            and in l0 and pixels. 0 where the model is wrong.
    """

    gradient: Tensor
    dual: Tensor
    norms: dict[str, Tensor]
    margin: Tensor
    estimate: Tensor


def sensitivity(problem: Problem, of: Of = "margin") -> Sensitivity:
    """Return the gradients of the margin or loss at all points.

    Args:
        problem: the model, points, labels and threat model. Its norm, weights and mask define the
            dual norm; its radius and box are not used.
        of: "margin" for the gradient of the worst margin, or "loss" for that of the cross-entropy.

    Returns:
        A `Sensitivity` with the gradients, their norms, and the first-order distance to the
        decision boundary.

    Raises:
        BadInput: `of` is neither "margin" nor "loss".

    Example:
        >>> import calipers
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight = torch.nn.Parameter(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        >>> x, y = torch.tensor([[0.5, 0.2]]), torch.tensor([0])
        >>> problem = calipers.Problem.pose(model, x, y, calipers.Ball("linf", 0.1))
        >>> found = sensitivity(problem)
        >>> found.gradient.tolist(), found.dual.tolist(), found.norms["l2"].tolist()
        ([[3.0, -4.0]], [7.0], [5.0])
        >>> [round(value, 3) for value in found.estimate.tolist()]  # margin 0.7 / dual norm 7
        [0.1]

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
    ratio = torch.stack(
        [
            _first_order(problem.region, slopes[:, s], margins[:, s].double())
            for s in range(slopes.shape[1])
        ],
        1,
    )
    # Combined as the margins are: the smallest over the other classes, for a target the largest;
    # 0 where the model is already wrong.
    estimate = torch.where(worst > 0, problem.goal.worst(ratio), 0.0)
    deciding = (margins - worst[:, None]).abs().argmin(1)
    chosen = (
        loss if of == "loss" else slopes[torch.arange(len(slopes), device=slopes.device), deciding]
    )
    return chosen, dual_norm(problem.region, chosen), worst, estimate


def margin_gradients(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return the margins, their gradients, and the gradient of the loss.

    The shapes are (N, S), (N, S, *D) and (N, *D); the loss is the cross-entropy.
    """
    with problem.classifier.frozen(), torch.enable_grad():
        x = problem.x.clone().requires_grad_()
        margins = problem.margins(problem.classifier.network(x))
        slopes = [_gradient(margins[:, s], x) for s in range(margins.shape[1])]
        loss = torch.nn.functional.softplus(-problem.goal.smooth(margins))
        steepest = _gradient(loss, x)
    return margins.detach(), torch.stack(slopes, 1), steepest


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of each point's own value.

    It is zero where the model cuts the autograd graph, which then shows in the norms.
    """
    (g,) = (
        torch.autograd.grad(values.sum(), x, retain_graph=True, allow_unused=True)
        if values.requires_grad
        else (None,)
    )
    return torch.zeros_like(x) if g is None else g


def dual_norm(region: Region, g: Tensor) -> Tensor:
    """Return the dual norm of directions over the features that can move.

    For directions g (M, *D) it is the most that <g, delta> gains for each unit of radius, (M,)
    float64. The box is left out, but in l0 and pixels, where it alone limits what a change gains:
    there it is the most that one change moves <g, delta>, up or down.
    """
    if isinstance(region.norm, L0):
        up, down = (_gains(region, region.norm, way).amax(1) for way in (g, -g))
        return torch.maximum(up, down)
    flat = torch.where(
        (region.low == 0) & (region.high == 0) & _frozen(region), 0.0, g.flatten(1).double()
    )
    return region.norm.dual(flat if region.weight is None else flat / region.weight.double())


def _gains(region: Region, norm: L0, g: Tensor) -> Tensor:
    """Return how far each change alone raises <g, delta> inside the box.

    (M, features or pixels) float64, for directions g (M, *D).
    """
    flat = g.flatten(1).double()
    gain = flat * torch.where(flat > 0, region.high, region.low).double()
    return norm.pixels(gain).sum(-2)


def _first_order(region: Region, slope: Tensor, margin: Tensor) -> Tensor:
    """Return the distance at which a linear margin of this slope is 0, (M,).

    Infinite where it is nowhere.
    """
    if isinstance(region.norm, L0):
        gains = _gains(region, region.norm, -slope).sort(1, descending=True).values
        changes = 1 + (gains.cumsum(1) < margin[:, None]).sum(1)
        return torch.where(changes <= gains.shape[1], changes.double(), torch.inf)
    dual = dual_norm(region, slope)
    return torch.where(dual > 0, margin / dual, torch.inf)


def _frozen(region: Region) -> Tensor:
    """Return the features (d,) that the mask holds still.

    A feature that only the box holds still counts as movable: first-order estimates leave the box
    out.
    """
    mask = region.ball.mask
    return (
        torch.zeros(region.low.shape[1], dtype=torch.bool, device=region.low.device)
        if mask is None
        else ~mask.to(region.low.device).flatten()
    )


def linear_score_change(weight: Tensor, radius: float | Tensor, norm: str) -> Tensor:
    """Return by how much a linear score w'x + b can change within a ball.

    Args:
        weight: w, (..., d).
        radius: the radius of the ball, in the data's units; a number, or a tensor that broadcasts
            to (...).
        norm: the name of the ball's norm, such as "linf", "l2" or "l1".

    Returns:
        radius * dual norm of w, (...) float64. This is the exact change where no box limits the
        perturbation, and an upper bound inside a box.

    Raises:
        BadInput: the norm counts features ("l0"), so that without a box the change is unbounded.

    Example:
        >>> gradient = torch.tensor([3.0, -4.0])
        >>> [float(linear_score_change(gradient, 1.0, norm)) for norm in ("linf", "l2")]
        [7.0, 5.0]
    """
    if norm_named(norm).is_count:
        raise BadInput(f"{norm!r} counts features: without a box their change has no end")
    return torch.as_tensor(radius, dtype=torch.float64) * norm_named(norm).dual(weight.double())


__all__ = ["Sensitivity", "dual_norm", "linear_score_change", "margin_gradients", "sensitivity"]
