"""Local Lipschitz constants of the margins, from below and from above.

Sampled gradients give an estimate from below, interval bounds of the gradient a bound from above.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.bounds.interval import Box, input_box, propagate
from calipers.bounds.rounding import CHECKED
from calipers.errors import UnsupportedOp
from calipers.geometry.gradients import dual_norm
from calipers.geometry.hyperplanes import check_ball
from calipers.geometry.linear_pieces import breakpoints_of, line, members, require_piecewise_linear
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph, Node
from calipers.graph.kinds import Affine, Elementwise, is_affine, is_elementwise
from calipers.problem.problem import Problem

_POINTS = 32


@dataclass(frozen=True, eq=False)
class Slopes:
    """Local Lipschitz constants of the margins, in logits for each unit.

    Both are (N, S) float64, for S margins of N points, over each point's perturbation region in the
    threat's norm.

    Args:
        estimate: the largest dual norm of the gradient at sampled points, an *estimate* from below
            (Weng et al. 2018, arXiv 1801.10578, without the fit of an extreme-value distribution).
            Where gradients are masked it is far too small (Goodfellow 2018, arXiv 1804.07870).
        bound: an upper bound of the gradient's dual norm everywhere inside the region, in real
            arithmetic; infinite where the network is not piecewise linear.
    """

    estimate: Tensor
    bound: Tensor


def local_slopes(problem: Problem, samples: int = 32, seed: int = 0) -> Slopes:
    """Return how steeply the margins can fall around every point.

    The upper bound propagates interval bounds of the gradient backward through the slopes that each
    operation can have over the region (the idea of Fast-Lip, Weng et al. 2018, arXiv 1804.09699,
    with intervals).

    Args:
        problem: the model, points, labels and threat model; the region around each point is the one
            of the threat's radius, norm, box and mask.
        samples: the number of points for each estimate: the point itself, then random ones in the
            region.
        seed: of the random points.

    Returns:
        The `Slopes`, estimate and bound for each point and margin.

    Raises:
        BadInput: the threat is not a ball in linf, l2 or l1, or has constraints between features.

    Example:
        >>> import calipers
        >>> x, y = torch.tensor([[0.5, 0.25]]), torch.tensor([0])  # logits relu(x)
        >>> problem = calipers.Problem.pose(torch.nn.ReLU(), x, y, calipers.Ball("linf", 0.1))
        >>> found = local_slopes(problem)  # of the margin x1 - x2, in the dual norm l1
        >>> found.estimate.tolist(), found.bound.tolist()
        ([[2.0]], [[2.0]])

    Cost for each point: `samples` forward passes and samples * S backward passes for the estimate;
    about 4 passes a margin for the bound.
    """
    check_ball(problem)
    graph = graph_of(problem.classifier, problem.x)
    parts = [
        problem.take(index)
        for index in torch.arange(len(problem), device=problem.x.device).split(_POINTS)
    ]
    with torch.no_grad():
        estimate = torch.cat([_sampled(part, graph, samples, seed) for part in parts])
        bound = (
            torch.cat([_bounded(part, graph) for part in parts])
            if _is_piecewise_linear(graph)
            else torch.full_like(estimate, torch.inf)
        )
    return Slopes(estimate, bound)


def _is_piecewise_linear(graph: Graph) -> bool:
    try:
        require_piecewise_linear(graph)
    except UnsupportedOp:
        return False
    return True


def _rows(problem: Problem) -> Tensor:
    return problem.goal.rows(problem.y, problem.classes).double()


def _sampled(problem: Problem, graph: Graph, samples: int, seed: int) -> Tensor:
    best, rows, region = None, _rows(problem), problem.threat.region(problem.x.double())
    for k in range(samples):
        x = problem.x.double() if k == 0 else region.sample(problem.streams(seed).fork(k))
        with torch.enable_grad():
            x = x.requires_grad_()
            margins = torch.einsum("nsk,nk->ns", rows, graph.values(x)[-1].flatten(1))
            slopes = [
                torch.autograd.grad(margins[:, s].sum(), x, retain_graph=True)[0]
                for s in range(margins.shape[1])
            ]
        now = torch.stack([dual_norm(region, g) for g in slopes], 1)
        best = now if best is None else torch.maximum(best, now)
    return torch.zeros_like(rows[..., 0]) if best is None else best


def _bounded(problem: Problem, graph: Graph) -> Tensor:
    """Return upper bounds (N, S) of the margins' gradients over the regions."""
    rows, region = _rows(problem), problem.threat.region(problem.x.double(), outward=True)
    boxes = {0: input_box(region, CHECKED)}
    for number in range(1, len(graph.nodes) + 1):
        boxes[number] = propagate(graph, number, boxes, CHECKED)
    return torch.stack(
        [dual_norm(region, _steepest(graph, boxes, rows[:, s])) for s in range(rows.shape[1])], 1
    )


def _steepest(graph: Graph, boxes: dict[int, Box], row: Tensor) -> Tensor:
    """Return bounds (N, *D) of the magnitudes of a margin's gradient.

    They hold over the boxes for each component of the gradient of <row, logits>; row is (N, K).
    """
    last = len(graph.nodes)
    start = row.view(len(row), *graph.shape(last))
    pending = {last: (start, torch.zeros_like(start))}  # centre and radius
    for number in range(last, 0, -1):
        if number not in pending:
            continue
        node, (middle, radius) = graph.nodes[number - 1], pending.pop(number)
        for i, (c, r) in zip(node.inputs, _back(node, boxes, middle, radius), strict=True):
            pending[i] = (c, r) if i not in pending else (pending[i][0] + c, pending[i][1] + r)
    middle, radius = pending[0]
    return middle.abs() + radius


def _back(
    node: Node, boxes: dict[int, Box], middle: Tensor, radius: Tensor
) -> list[tuple[Tensor, Tensor]]:
    inputs = [boxes[i] for i in node.inputs]
    if is_affine(node.op):
        return list(
            zip(node.op.adjoint(middle), _absolute_adjoint(node.op, inputs, radius), strict=True)
        )
    if not is_elementwise(node.op):
        return [_to_members(node, inputs[0], middle - radius, middle + radius)]
    slopes = _slopes(node.op, inputs[0])
    corners = torch.stack(
        [end * slope for end in (middle - radius, middle + radius) for slope in slopes]
    )
    floor, ceiling = corners.amin(0), corners.amax(0)
    return [((floor + ceiling) / 2, (ceiling - floor) / 2)]


def _to_members(node: Node, box: Box, floor: Tensor, ceiling: Tensor) -> tuple[Tensor, Tensor]:
    """Return interval gradients of a window operation's input.

    The interval of each window's gradient goes to its winner where only one member can win;
    otherwise every member that can win gets the interval widened to contain 0. The result is
    (centre, radius).
    """
    windows = members(node).to(floor.device)
    low, high = (
        torch.cat([t.flatten(1), torch.full_like(t.flatten(1)[:, :1], -torch.inf)], 1)[:, windows]
        for t in (box.lower, box.upper)
    )
    can = (high >= low.amax(2, keepdim=True)) & high.isfinite()
    alone = can.sum(2, keepdim=True) == 1
    shares = [
        (end.flatten(1)[..., None], clipped.flatten(1)[..., None])
        for end, clipped in ((floor, floor.clamp(max=0)), (ceiling, ceiling.clamp(min=0)))
    ]
    places = windows.flatten().expand(len(floor), -1)
    nothing = floor.new_zeros(len(floor), box.lower[0].numel() + 1)
    ends = [
        nothing.scatter_add(1, places, (torch.where(alone, whole, part) * can).flatten(1))
        for whole, part in shares
    ]
    least, most = (end[:, :-1].view_as(box.lower) for end in ends)
    return (least + most) / 2, (most - least) / 2


def _slopes(op: Elementwise, box: Box) -> tuple[Tensor, Tensor]:
    """Return the least and largest slope of the pieces that a box reaches."""
    low, high = (line(op, end)[0] for end in (box.lower, box.upper))
    least, most = torch.minimum(low, high), torch.maximum(low, high)
    for breakpoint in breakpoints_of(op) or ():
        crossed = (box.lower <= breakpoint) & (box.upper >= breakpoint)
        for side in (-torch.inf, torch.inf):
            beside = line(
                op,
                torch.nextafter(
                    torch.full_like(box.lower, breakpoint), torch.full_like(box.lower, side)
                ),
            )[0]
            least, most = (
                torch.where(crossed, torch.minimum(least, beside), least),
                torch.where(crossed, torch.maximum(most, beside), most),
            )
    return least, most


def _absolute_adjoint(op: Affine, inputs: list[Box], radius: Tensor) -> tuple[Tensor, ...]:
    """Return |W|^T radius for each input.

    It is computed by automatic differentiation of |W| r.
    """
    with torch.enable_grad():
        zeros = [torch.zeros_like(b.lower, requires_grad=True) for b in inputs]
        made = op.absolute(*zeros)
        found = torch.autograd.grad(made, zeros, radius, allow_unused=True)
    return tuple(
        torch.zeros_like(z) if g is None else g.detach() for g, z in zip(found, zeros, strict=True)
    )
