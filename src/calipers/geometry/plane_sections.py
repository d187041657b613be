"""Decisions and linear regions in a plane through a point.

For piecewise linear networks all regions are found exactly, as polygons; for other networks the
decisions are drawn on a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.errors import BadInput, CaptureError, UnsupportedOp
from calipers.geometry.hyperplanes import check_ball
from calipers.geometry.linear_pieces import require_piecewise_linear
from calipers.geometry.segments import path_of
from calipers.geometry.subdivision import cells, decided
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.problem.problem import Problem

_GRID = 200  # points on each side of the grid where only decisions can be drawn
_OUTLINE = 360  # directions of a ball's outline
_LINES = 40  # region borders along the axes, of about as many regions as a drawing can show

Outline = tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Slice:
    """A square part of a plane through a point, with classes and regions.

    The plane is x + s u + t v with |s|, |t| <= `half`. u and v have norm 1, so that s and t are in
    the threat's units; u leads to an example.

    Args:
        half: half of the square's side.
        label: the point's label.
        polygons: parts of the square on each of which one class is predicted, each as its corners
            (s, t) in order.
        classes: the class predicted on each polygon.
        own: the outline of the linear region that contains the point; empty where it is not known.
        boundary: segments along which the decision changes.
        marks: (s, t) of the point, of the example, and of the second example if there is one.
        unit: the outline of the ball of radius 1 in this plane.
        exact: whether the polygons are all linear regions, cut where another class becomes the
            largest; otherwise they are strips of a grid.
        regions: the number of linear regions, 0 where they are not known.
        norm: the name of the threat's norm.
        across: words for the direction v.
        index: the place of the point in the problem.
    """

    half: float
    label: int
    polygons: tuple[Outline, ...]
    classes: tuple[int, ...]
    own: Outline
    boundary: tuple[Outline, ...]
    marks: tuple[tuple[float, float], ...]
    unit: Outline
    exact: bool
    regions: int
    norm: str
    across: str
    index: int


def plane_slices(
    problem: Problem,
    index: int,
    toward: Tensor,
    other: Tensor | None = None,
    *,
    across: tuple[Tensor, str] | None = None,
    reach: float = 1.4,
    seed: int = 0,
    most: int = 2500,
) -> tuple[Slice, ...]:
    """Return the decisions in the plane through a point and an example.

    The first slice is the wide view, `reach` times as far as the examples lie. Where it holds more
    than `most` linear regions, it is drawn on a grid, and a second slice shows all regions in a
    nearer square around the point. Networks that are not piecewise linear or cannot be traced have
    the grid only. Nothing keeps the plane inside the box.

    Args:
        problem: the model, points, labels and threat model.
        index: which of the points is the centre.
        toward: an example, (*D), that gives the first direction u; it differs from the point.
        other: a second example, (*D), that gives the second direction v together with u; None for
            none.
        across: where there is no second example, a direction (*D) for v and words for it; its part
            along u is removed. None: a random direction.
        reach: half the side of the wide view, as a multiple of the largest distance of the
            examples.
        seed: of the random direction.
        most: the largest number of linear regions that a slice may hold. The default keeps drawings
            readable and quick.

    Returns:
        One or two slices, the wide view first.

    Raises:
        BadInput: the example lies on the point itself, v is parallel to u, or the threat is not a
            ball in linf, l2 or l1 without constraints between features.

    Example:
        >>> import calipers
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.eye(2))
        ...     _ = model[0].bias.copy_(torch.tensor([-0.5, -0.5]))  # logits relu(x - 0.5)
        >>> x, y = torch.tensor([[0.75, 0.625]]), torch.tensor([0])
        >>> problem = calipers.Problem.pose(model, x, y, calipers.Ball("linf", 0.1))
        >>> found = plane_slices(problem, 0, torch.tensor([0.625, 0.75]), reach=4.0)
        >>> [(s.exact, s.regions, s.half, sorted(set(s.classes))) for s in found]
        [(True, 4, 0.5, [0, 1])]

    Cost: a forward pass for each point of a grid of 200 by 200, three for each region.
    """
    check_ball(problem)
    u, distance = _first_axis(problem, index, toward)
    words = (
        "towards a second example"
        if other is not None
        else across[1]
        if across is not None
        else "in a random direction"
    )
    v, second = _second_axis(problem, index, u, other, seed, None if across is None else across[0])
    half = reach * max(distance, abs(second[0]), abs(second[1]))
    marks = ((0.0, 0.0), (distance, 0.0), *([second] if other is not None else []))
    view = _View(
        problem, index, torch.stack([u, v]), marks, _unit(problem, index, u, v), most, words
    )
    with torch.no_grad():
        try:
            graph = graph_of(problem.classifier, problem.x)
            require_piecewise_linear(graph)
        except (UnsupportedOp, CaptureError):
            return (view.grid(half),)
        near = view.nearest(graph, half)
        whole = None if near < half else view.exact(graph, half)
        if whole is not None:
            return (whole,)
        for _ in range(12):
            close = view.exact(graph, near)
            if close is not None:
                return view.grid(half), close
            near /= 2
        return (view.grid(half),)


@dataclass(frozen=True, eq=False)
class _View:
    """A plane to be drawn, with what all its slices share."""

    problem: Problem
    index: int
    axes: Tensor
    marks: Outline
    unit: Outline
    most: int
    across: str

    def exact(self, graph: Graph, half: float) -> Slice | None:
        """Return all regions of a square, or None where there are too many."""
        corners = half * torch.tensor(
            [[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64
        )
        try:
            found = cells(graph, self.problem.x[self.index].double(), self.axes, corners, self.most)
            parts, kinds = decided(found, 4 * self.most)
        except BadInput:
            return None
        polygons = tuple(_outline(c) for c in parts.corners)
        own = next((_outline(c) for c in found.corners if _holds(c)), ())
        classes = tuple(kinds.tolist())
        return self._slice(
            half, polygons, classes, own, _boundary(polygons, classes), len(found.corners)
        )

    def nearest(self, graph: Graph, half: float) -> float:
        """Return the half side of a square whose regions can all be drawn.

        It is the distance within which the axes meet `_LINES` borders of regions.
        """
        x = self.problem.x[self.index].double()
        for side in (half / 256, half / 16, half):
            breaks = [path_of(graph, x - side * axis, x + side * axis).breaks for axis in self.axes]
            every = (2 * side * (torch.cat(breaks) - 0.5)).abs().sort().values
            if len(every) > _LINES:
                return float(every[_LINES])
        return half

    def grid(self, half: float) -> Slice:
        """Return the decisions on a grid, and the decision boundary.

        The boundary is where the margin, interpolated between the grid's points, is zero.
        """
        problem, x = self.problem, self.problem.x[self.index].double()
        at = (
            -half
            + 2 * half * (torch.arange(_GRID, dtype=torch.float64, device=x.device) + 0.5) / _GRID
        )
        along = [x + at.view(-1, *[1] * x.dim()) * self.axes[0] + t * self.axes[1] for t in at]
        # by t, then by s: (t, s, K)
        logits = (
            torch.stack([problem.classifier.logits(points.to(problem.x)) for points in along])
            .double()
            .cpu()
        )
        polygons, classes = _strips(logits.argmax(2).tolist(), half)
        label = int(problem.y[self.index])
        others = logits.clone()
        others[..., label] = -torch.inf
        return self._slice(
            half, polygons, classes, (), _zeros(logits[..., label] - others.amax(2), at.cpu()), 0
        )

    def _slice(
        self,
        half: float,
        polygons: tuple[Outline, ...],
        classes: tuple[int, ...],
        own: Outline,
        boundary: tuple[Outline, ...],
        count: int,
    ) -> Slice:
        label, norm = int(self.problem.y[self.index]), self.problem.region.norm.name
        return Slice(
            half,
            label,
            polygons,
            classes,
            own,
            boundary,
            self.marks,
            self.unit,
            count > 0,
            count,
            norm,
            self.across,
            self.index,
        )


def _first_axis(problem: Problem, index: int, toward: Tensor) -> tuple[Tensor, float]:
    offset = (toward - problem.x[index]).double()
    distance = float(
        problem.region.take(slice(index, index + 1)).distance(toward[None].to(problem.x))
    )
    if not distance > 0:
        raise BadInput(
            "the example lies on the point itself: the model is wrong there, and there is no "
            "direction to draw"
        )
    return offset / distance, distance


def _second_axis(
    problem: Problem, index: int, u: Tensor, other: Tensor | None, seed: int, across: Tensor | None
) -> tuple[Tensor, tuple[float, float]]:
    """Return a second direction, and the second example in the plane.

    The direction is orthogonal to the first and of norm 1.
    """
    x = problem.x[index].double()
    if other is not None:
        raw = other.double() - x
    else:
        raw = (
            problem.streams(seed).normal(x.numel(), torch.float64)[index].view_as(x)
            if across is None
            else across.double()
        )
    along = float((raw * u).sum() / (u * u).sum())
    v = raw - along * u
    region = problem.region.take(slice(index, index + 1))
    length = float(
        region.norm.of(
            (v if region.weight is None else v.flatten() * region.weight.double()).reshape(1, -1)
        )
    )
    if not length > 1e-9 * abs(along):
        raise BadInput("both examples lie in the same direction: give another one, or none")
    return v / length, ((0.0, 0.0) if other is None else (along, length))


def _unit(problem: Problem, index: int, u: Tensor, v: Tensor) -> Outline:
    """Return the outline of the ball of radius 1 in the plane.

    In each direction it extends as far as the norm allows.
    """
    region = problem.region.take(slice(index, index + 1))
    angle = torch.arange(_OUTLINE, dtype=torch.float64) * (2 * math.pi / _OUTLINE)
    directions = angle.cos()[:, None] * u.flatten().cpu() + angle.sin()[:, None] * v.flatten().cpu()
    length = region.norm.of(
        directions if region.weight is None else directions * region.weight.double().cpu()
    )
    return tuple(zip((angle.cos() / length).tolist(), (angle.sin() / length).tolist(), strict=True))


def _strips(rows: list[list[int]], half: float) -> tuple[tuple[Outline, ...], tuple[int, ...]]:
    """Return runs of one class in each row of a grid, as rectangles."""
    step = 2 * half / len(rows)
    strips: list[Outline] = []
    classes: list[int] = []
    for j, row in enumerate(rows):
        begin, low, high = 0, -half + step * j, -half + step * (j + 1)
        for k in range(1, len(row) + 1):
            if k == len(row) or row[k] != row[begin]:
                a, b = -half + step * begin, -half + step * k
                strips.append(((a, low), (b, low), (b, high), (a, high)))
                classes.append(row[begin])
                begin = k
    return tuple(strips), tuple(classes)


def _zeros(margin: Tensor, at: Tensor) -> tuple[Outline, ...]:
    """Return the segments along which a function on a grid (t, s) is zero.

    Each square of the grid is cut into two triangles, on which the function is interpolated
    linearly.
    """
    values, place = margin.tolist(), at.tolist()
    inside = margin > 0
    mixed = inside[:-1, :-1].int() + inside[1:, :-1] + inside[:-1, 1:] + inside[1:, 1:]
    found: list[Outline] = []
    for j, i in torch.nonzero((mixed > 0) & (mixed < 4)).tolist():
        corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
        for triangle in (corners[:3], [corners[0], corners[2], corners[3]]):
            ends = []
            for (a, b), (c, d) in zip(triangle, (*triangle[1:], triangle[0]), strict=True):
                p, q = values[b][a], values[d][c]
                if (p > 0) != (q > 0):
                    share = p / (p - q)
                    ends.append(
                        (
                            place[a] + share * (place[c] - place[a]),
                            place[b] + share * (place[d] - place[b]),
                        )
                    )
            if len(ends) == 2:
                found.append((ends[0], ends[1]))
    return tuple(found)


def _outline(corners: Tensor) -> Outline:
    return tuple((s, t) for s, t in corners.tolist())


def _holds(corners: Tensor) -> bool:
    """Return whether the origin is inside a convex polygon.

    Its corners go around it in one direction.
    """
    after = corners.roll(-1, 0)
    turns = corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]
    return bool((turns >= 0).all() or (turns <= 0).all())


def _boundary(polygons: tuple[Outline, ...], classes: tuple[int, ...]) -> tuple[Outline, ...]:
    """Return the sides that polygons of two different classes share.

    Neighbouring polygons were cut at the same corners, so that a shared side has equal ends.
    """
    sides: dict[tuple[tuple[float, float], tuple[float, float]], int] = {}
    found = []
    for polygon, kind in zip(polygons, classes, strict=True):
        for a, b in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
            side = (min(a, b), max(a, b))
            if sides.setdefault(side, kind) != kind:
                found.append(side)
    return tuple(found)
