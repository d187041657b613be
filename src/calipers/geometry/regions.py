"""The linear region around a point, and decision boundaries inside it.

With d_B the distance to the region's border and d_D the distance to the decision boundary of its
affine map, nothing nearer than min(d_B, d_D) is adversarial, and where d_D <= d_B the adversarial
distance *is* d_D: exact, without a search (Croce, Andriushchenko and Hein 2019, arXiv 1810.07481).
The radius of linearity d_B alone says nothing about robustness: a decision boundary may cut the
region.

Differs from the paper: both are measured inside the box, with masks and weights. What is computed
is kept apart from what is proved: backward bound propagation in checked float64 confirms that no
operation can leave its linear piece within `proved_border`, and that every margin stays positive
within `lower`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.rounding import CHECKED
from calipers.geometry.hyperplanes import Hyperplane, check_ball, nearest_hyperplane
from calipers.geometry.linear_pieces import Pieces
from calipers.geometry.region_certificates import all_stable, confirmed, margins_hold
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.problem.goals import by_case
from calipers.problem.problem import Problem
from calipers.threats.region import distance_to

_POINTS = 32  # points measured together
_OVERSHOOT = (
    2.0  # how far behind the decision boundary the candidate is put, in the model's own roundings
)


@dataclass(frozen=True, eq=False)
class Regions:
    """The linear regions of N points, with computed and proved distances.

    Distances are (N,) float64, in the threat's norm and the data's own units, and infinite where
    there is nothing to reach. Computed in float64 are `border`, `decision`, `node` and `element`;
    proved, with rounding accounted for, are `proved_border` and `lower`.

    Args:
        border: d_B, the distance to the border of the region.
        decision: d_D, the distance to the decision boundary of the region's affine map; 0 where the
            model is wrong.
        proved_border: a proved radius: within it no operation leaves its linear piece. 0 claims
            nothing.
        lower: a proved lower bound on the adversarial distance. 0 claims nothing.
        exact: (N,) bool, where d_D <= d_B and a single margin decides, so that d_D is the
            adversarial distance.
        candidate: (N, *D), the point at distance d_D, put behind the decision boundary by twice the
            model's own rounding; whether it is adversarial is left for a forward pass of the model
            to judge. The point itself where the model is wrong.
        margin: (N,), the worst margin at the point.
        node: (N,), the number of the operation that bounds the region; -1 where there is none.
        element: (N,), the element of that operation's input; -1 where there is none.
        where: for each point the name of that operation's place in the model; "" where there is
            none.
        guarantee: the arithmetic in which `proved_border` and `lower` are proved.

    Raises:
        Nothing: it holds what was found.
    """

    border: Tensor
    decision: Tensor
    proved_border: Tensor
    lower: Tensor
    exact: Tensor
    candidate: Tensor
    margin: Tensor
    node: Tensor
    element: Tensor
    where: tuple[str, ...]
    guarantee: str = CHECKED.guarantee


def regions_of(problem: Problem) -> Regions:
    """Return the linear region of every point, measured and proved.

    Args:
        problem: the model, points, labels and threat model. Norm, box, mask and weights define the
            distances; the radius is not used.

    Returns:
        The `Regions`: distances to the region's border and to the decision boundary inside it, and
        what of them is proved.

    Raises:
        UnsupportedOp: the network is not piecewise linear.
        BadInput: the threat is not a ball in linf, l2 or l1, or has constraints between features.

    Example:
        >>> import calipers
        >>> layers = torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> values = ([[1.0]], [-0.25], [[1.0], [0.0]], [0.0, 0.125])
        >>> with torch.no_grad():
        ...     for parameter, value in zip(model.parameters(), values):
        ...         _ = parameter.copy_(torch.tensor(value))
        >>> x, y = torch.tensor([[0.5]]), torch.tensor([0])  # logits relu(x - 0.25) and 0.125
        >>> found = regions_of(calipers.Problem.pose(model, x, y, calipers.Ball("linf", 0.1)))
        >>> found.border.tolist(), found.decision.tolist(), found.exact.tolist()
        ([0.25], [0.125], [True])
        >>> 0.1249 < float(found.lower) <= 0.125  # proved
        True

    Cost for each point: a backward product for each bounding hyperplane that may be the nearest (at
    worst one for each unstable element), and a backward bound propagation (CROWN) at each of the
    two radii.
    """
    check_ball(problem)
    graph = graph_of(problem.classifier, problem.x)
    parts = [
        _measured(problem.take(index), graph)
        for index in torch.arange(len(problem), device=problem.x.device).split(_POINTS)
    ]
    columns: dict[str, Any] = {
        name: torch.cat([getattr(p, name) for p in parts]) for name in _TENSORS
    }
    return Regions(**columns, where=tuple(name for p in parts for name in p.where))


_TENSORS = (
    "border",
    "decision",
    "proved_border",
    "lower",
    "exact",
    "candidate",
    "margin",
    "node",
    "element",
)


def activation_pattern(problem: Problem) -> Tensor:
    """Return on which linear piece every operation is at each point.

    Args:
        problem: the model and its N points. Only these are used, not the threat model.

    Returns:
        The pattern (N, n) int64, for each input of a piecewise linear function the number of
        breakpoints at or below it, for each window the flat index of its maximum. Two points of
        equal patterns are in one linear region.

    Raises:
        UnsupportedOp: the network is not piecewise linear.

    Example:
        >>> import calipers
        >>> x, y = torch.tensor([[0.5, 0.25]]), torch.tensor([0])  # logits relu(x)
        >>> problem = calipers.Problem.pose(torch.nn.ReLU(), x, y, calipers.Ball("linf", 0.1))
        >>> activation_pattern(problem).tolist()  # both neurons are active
        [[1, 1]]

    Cost: a forward pass.
    """
    return Pieces.at(graph_of(problem.classifier, problem.x), problem.x).pattern()


def _measured(problem: Problem, graph: Graph) -> Regions:
    with torch.no_grad():
        pieces = Pieces.at(graph, problem.x)
        region = problem.threat.region(problem.x.double())
        hyperplane = nearest_hyperplane(pieces, region)
        decision, delta, margins, alone = _decision(problem, pieces)
        worst = problem.goal.worst(margins)
        candidate = (problem.x.double() + delta.view_as(problem.x)).to(problem.x.dtype)
        proved_border = confirmed(problem, pieces, hyperplane.distance, all_stable)
        lower = confirmed(
            problem,
            pieces,
            torch.minimum(hyperplane.distance, decision) * (worst > 0),
            margins_hold,
            proved_border,
        )
    exact = (worst > 0) & alone & (decision <= hyperplane.distance) & decision.isfinite()
    decision = torch.where(worst > 0, decision, 0.0)
    candidate = torch.where(_like(worst > 0, candidate), candidate, problem.x)
    return Regions(
        hyperplane.distance,
        decision,
        proved_border,
        lower,
        exact,
        candidate,
        worst,
        hyperplane.node,
        hyperplane.element,
        _places(graph, hyperplane),
    )


def _like(flags: Tensor, x: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (x.dim() - 1))


def _places(graph: Graph, hyperplane: Hyperplane) -> tuple[str, ...]:
    return tuple("" if k < 0 else graph.nodes[k - 1].where for k in hyperplane.node.tolist())


def _decision(problem: Problem, pieces: Pieces) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the decision boundaries of the affine maps.

    The results are the distances d_D (N,), offsets (N, d) to just behind the decision boundary, the
    margins (N, S), and where one margin alone decides. Of several margins that must all fall (a
    target, a specification), the farthest is only a lower bound on the distance.
    """
    n, logits = len(problem), pieces.values[-1]
    margins = problem.margins(logits)
    count = margins.shape[1]
    rows = problem.goal.rows(problem.y, problem.classes).to(logits)
    point = torch.arange(n, device=logits.device).repeat_interleave(count)
    last = len(pieces.graph.nodes)
    split = zip(rows.flatten(0, 1).split(pieces.rows), point.split(pieces.rows), strict=True)
    g = torch.cat(
        [
            pieces.pull(last, part.view(-1, *pieces.graph.shape(last)), at).flatten(1)
            for part, at in split
        ]
    )
    region = problem.threat.region(problem.x.double()).take(point)
    distance = distance_to(region, -g, margins.flatten()).distance.view(n, count)
    cases = problem.goal.cases(problem.classes)
    nearest = by_case(distance, cases).amin(1)
    behind = _OVERSHOOT * problem.allowance(problem.classifier.logits64(problem.x), problem.size)
    pick = torch.where(distance == nearest[:, None], 0.0, 1.0).argmin(1)
    at = torch.arange(n, device=logits.device) * count + pick
    delta = distance_to(
        region.take(at), -g[at], margins.gather(1, pick[:, None])[:, 0] + behind
    ).delta
    alone = torch.bincount(cases.to(logits.device), minlength=1)[cases.to(logits.device)[pick]] == 1
    return nearest, delta, margins, alone
