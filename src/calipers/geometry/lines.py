"""How far is the end of the linear region along a direction, and how many steps does an attack take
to get there?
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.geometry.cells import Cells, cells
from calipers.geometry.pieces import Pieces
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.problem.problem import Problem

# a number of steps this near to a whole one is meant to be whole: 0.3 / 0.1 is 2.9999999999999996
_WHOLE = 1e-9


def exit_distance(problem: Problem, direction: Tensor) -> Tensor:
    """Return the t >= 0 at which x + t u leaves the linear region of each point, (N,) float64,
    infinite where it never does; u is `direction (N, *D)`.

    For u of norm 1 it is the distance along u. On the border itself (t exactly) no operation counts
    as having left its piece. Cost: two forward passes.
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
    for k in pieces.bending():
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
    """Return after how many steps of length `step` the region is left, given the distance of its
    border along them: floor(t / step) + 1.

    That is ceil(t / step), and one more where t is a whole number of steps: these end *on* the
    border. Infinite where the region never ends. Holds for attacks that keep their direction: on a
    margin, or between two classes; the gradient of a cross-entropy over more classes turns within
    the region.

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
    """The linear regions along a segment from one point to another: it goes from one to the next at
    `breaks (B,)`, in shares of the segment; at `knots (B + 2,)`, the ends and the breaks, the
    logits are `logits (B + 2, K)`, and straight in between.
    """

    breaks: Tensor
    knots: Tensor
    logits: Tensor

    @property
    def regions(self) -> int:
        """How many linear regions the segment meets."""
        return len(self.breaks) + 1


def path(problem: Problem, index: int, end: Tensor) -> Path:
    """Return all linear regions on the segment from the problem's point `index` to `end (*D)`.

    Exact but for float64 rounding: layer by layer the segment is cut where an operation meets the
    end of its piece (the one-dimensional case of Sotoudeh and Thakur 2019, arXiv 1908.06214);
    nothing is sampled. Cost: a forward pass of one point for each region.
    """
    with torch.no_grad():
        return path_of(graph_of(problem.classifier, problem.x), problem.x[index], end)


def path_of(graph: Graph, begin: Tensor, end: Tensor) -> Path:
    """As `path`, of a graph alone."""
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
