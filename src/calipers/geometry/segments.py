"""Linear regions along a direction or a segment.

How far the border of a point's linear region is along a direction, how many steps an attack needs
to reach it, and all regions on a segment between two points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.geometry.linear_pieces import Pieces
from calipers.geometry.subdivision import Cells, cells
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.problem.problem import Problem

# relative: a number of steps this near to a whole number counts as whole, since 0.3 / 0.1 gives
# 2.9999999999999996
_WHOLE = 1e-9


def exit_distance(problem: Problem, direction: Tensor) -> Tensor:
    """Return how far each point can move before its linear region ends.

    Args:
        problem: the model and its points x, (N, *D). Only these are used, not the threat model.
        direction: a direction u for each point, (N, *D).

    Returns:
        The smallest t >= 0 at which x + t u reaches the border of the point's linear region, (N,)
        float64; infinite where it never does. For u of norm 1 it is the distance along u. At
        exactly this t no operation counts as having left its linear piece. The box is not
        considered.

    Raises:
        BadInput: the direction has not the shape of the points.
        UnsupportedOp: the network is not piecewise linear.

    Example:
        >>> import calipers
        >>> x, y = torch.tensor([[0.5, 0.25]]), torch.tensor([0])  # logits relu(x)
        >>> problem = calipers.Problem.pose(torch.nn.ReLU(), x, y, calipers.Ball("linf", 0.1))
        >>> exit_distance(problem, torch.tensor([[-1.0, 0.0]])).tolist()
        [0.5]

    Cost: two forward passes.
    """
    if direction.shape != problem.x.shape:
        raise BadInput(
            f"a direction for each point is needed, shape {tuple(problem.x.shape)}, got "
            f"{tuple(direction.shape)}"
        )
    with torch.no_grad():
        return _exit(
            Pieces.at(graph_of(problem.classifier, problem.x), problem.x), direction.double()
        )


def _exit(pieces: Pieces, u: Tensor) -> Tensor:
    moved, soonest = (
        pieces.push(u),
        torch.full((len(u),), torch.inf, dtype=torch.float64, device=u.device),
    )
    for k in pieces.nonlinear_nodes():
        rate = moved[pieces.graph.nodes[k - 1].inputs[0]].flatten(1)
        if k in pieces.slopes:
            gaps = pieces.gaps(k)
            gap, speed = torch.where(rate > 0, gaps.above, gaps.below), rate.abs()
        else:
            gap, windows = pieces.trailing(k)
            members = torch.cat([rate, torch.zeros_like(rate[:, :1])], 1)[:, windows]
            speed = (members - rate.gather(1, pieces.picks[k].flatten(1))[..., None]).flatten(1)
            gap = gap.flatten(1)
        time = torch.where(
            speed > 0, gap / speed.clamp_min(torch.finfo(speed.dtype).tiny), torch.inf
        )
        soonest = torch.minimum(soonest, time.amin(1)) if time.shape[1] else soonest
    return soonest


def steps_to_leave(distance: Tensor, step: float | Tensor) -> Tensor:
    """Return how many steps of a given length leave the linear region.

    It is floor(t / step) + 1. That is ceil(t / step), and one more where t is a whole number of
    steps, since these end *on* the border. It holds for attacks that keep their direction: on a
    margin, or between two classes. The gradient of a cross-entropy over more classes turns within
    the region.

    Args:
        distance: t, the distance to the region's border along the steps, as `exit_distance` returns
            it.
        step: the length of a step, in the same unit; a number, or a tensor that broadcasts. Ratios
            t / step within a relative 1e-9 of a whole number count as whole, as 0.3 / 0.1 is meant
            to be 3.

    Returns:
        The number of steps, float64 of the shape of `distance`; infinite where the region never
        ends.

    Raises:
        BadInput: a step is not positive.

    Example:
        >>> steps_to_leave(torch.tensor([0.5, 0.70711]), 0.1).tolist()
        [6.0, 8.0]
    """
    length = torch.as_tensor(step, dtype=torch.float64)
    if not bool((length > 0).all()):
        raise BadInput(f"a step has a positive length, got {step}")
    ratio = distance.double() / length.to(distance.device)
    whole = ratio.round()
    ratio = torch.where((ratio - whole).abs() <= _WHOLE * whole.clamp_min(1), whole, ratio)
    return ratio.floor() + 1


@dataclass(frozen=True, eq=False)
class Path:
    """The linear regions along a segment, in order.

    Args:
        breaks: (B,), where the segment passes from one region to the next, as fractions of its
            length, ascending.
        knots: (B + 2,), the two ends and the breaks between them, as fractions.
        logits: (B + 2, K), the logits at the knots; between two knots they are affine.
    """

    breaks: Tensor
    knots: Tensor
    logits: Tensor

    @property
    def regions(self) -> int:
        """Number of linear regions that the segment meets."""
        return len(self.breaks) + 1


def path(problem: Problem, index: int, end: Tensor) -> Path:
    """Return all linear regions on a segment from one of the points.

    The regions are exact up to float64 rounding: layer by layer the segment is cut where an
    operation reaches a breakpoint (the one-dimensional case of Sotoudeh and Thakur 2019, arXiv
    1908.06214); nothing is sampled.

    Args:
        problem: the model and its points. Only these are used, not the threat model.
        index: which of the points is the beginning of the segment.
        end: the other end of the segment, (*D).

    Returns:
        A `Path`: where the regions meet, and the logits there.

    Raises:
        UnsupportedOp: the network is not piecewise linear.
        BadInput: the segment meets more than 50 000 regions.

    Example:
        >>> import calipers
        >>> x, y = torch.tensor([[0.5, 0.25]]), torch.tensor([0])  # logits relu(x)
        >>> problem = calipers.Problem.pose(torch.nn.ReLU(), x, y, calipers.Ball("linf", 0.1))
        >>> found = path(problem, 0, torch.tensor([-0.5, 0.25]))
        >>> found.regions, found.breaks.tolist(), found.logits[:, 0].tolist()
        (2, [0.5], [0.5, 0.0, 0.0])

    Cost: a forward pass of one point for each region.
    """
    with torch.no_grad():
        return path_of(graph_of(problem.classifier, problem.x), problem.x[index], end)


def path_of(graph: Graph, begin: Tensor, end: Tensor) -> Path:
    """Return the linear regions of a graph on a segment; see `path`."""
    start = begin.double()
    found: Cells = cells(
        graph,
        start,
        (end.double() - start)[None],
        torch.tensor([[0.0], [1.0]], dtype=torch.float64),
    )
    ends = torch.stack([c[:, 0] for c in found.corners])  # (R, 2)
    order = ends[:, 0].argsort()
    ends, maps = ends[order], found.maps[order]
    knots = torch.cat([ends[:, 0], ends[-1:, 1]])
    at = torch.cat([maps, maps[-1:]])
    return Path(knots[1:-1], knots, at[:, 0] + knots[:, None].to(at) * at[:, 1])
