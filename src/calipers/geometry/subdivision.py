"""Exact linear regions of a network on a segment or in a plane.

All regions are found; nothing is sampled. Operation by operation, each region is cut along the
lines where an operation passes from one of its linear pieces to another, while the network's values
over each region are kept as affine maps of the one or two coordinates (Sotoudeh and Thakur 2019,
arXiv 1908.06214). The coordinates are float64; cuts nearer to each other than 1e-11 of a value's
size are treated as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.geometry.linear_pieces import (
    breakpoints_of,
    line,
    members,
    require_piecewise_linear,
    winner,
)
from calipers.graph.ir import Graph, Node
from calipers.graph.kinds import Affine, is_affine, is_elementwise

_NEAR = 1e-11  # tolerance of a cut, as a share of the largest value on a cell
_CELLS = 50_000
_BATCH = 2**27  # bytes of coefficients processed at once

Corner = tuple[float, ...]
Polygon = list[Corner]


@dataclass(frozen=True, eq=False)
class Cells:
    """R convex cells of a segment or a plane, with the network's affine maps.

    `corners` holds one tensor (V, k) for each cell: the two ends on a segment (k = 1), the corners
    in order in a plane (k = 2). `maps (R, 1 + k, *shape)` is the network's value over each cell, as
    a constant followed by the slopes in the k coordinates.
    """

    corners: list[Tensor]
    maps: Tensor


def cells(graph: Graph, origin: Tensor, axes: Tensor, corners: Tensor, most: int = _CELLS) -> Cells:
    """Return the linear regions of a network on a segment or plane.

    The segment or plane is origin + sum t_i axes_i for t in the convex hull of `corners (V, k)`,
    with origin (*D), axes (k, *D), and k = 1 or 2.

    Raises `UnsupportedOp` where the network is not piecewise linear, and `BadInput` for more than
    `most` regions. Cost: 1 + k forward passes for each region, and the cutting itself: n lines
    through a plane make up to n^2 / 2 regions.
    """
    require_piecewise_linear(graph)
    state = _Cutting(graph, origin, axes, corners, most)
    for number in range(1, len(graph.nodes) + 1):
        state.step(number)
    return Cells(
        [torch.tensor(p, dtype=torch.float64) for p in state.polygons], state.held[len(graph.nodes)]
    )


def decided(found: Cells, most: int = _CELLS) -> tuple[Cells, Tensor]:
    """Return the cells split by predicted class, and their classes (R,).

    Each cell is cut further along the lines where another logit becomes the largest.
    """
    polygons = [_polygon(c) for c in found.corners]
    windows = torch.arange(found.maps.shape[2])[None]
    pieces, parents = _divide(
        polygons, found.maps.flatten(2), lambda p, m, left: _by_winner(p, m, windows, left), most
    )
    maps = found.maps[torch.tensor(parents)]
    centres = torch.tensor([_centre(p) for p in pieces], dtype=torch.float64)
    classes = _at(maps, centres).argmax(1)
    return Cells([torch.tensor(p, dtype=torch.float64) for p in pieces], maps), classes


class _Cutting:
    """The cells so far, and the affine maps that later operations read.

    `held` maps the number of a value in the graph (0 is the input) to its affine maps over all
    cells.
    """

    def __init__(
        self, graph: Graph, origin: Tensor, axes: Tensor, corners: Tensor, most: int
    ) -> None:
        self.graph, self.most = graph, most
        self.polygons: list[Polygon] = [_polygon(corners)]
        self.held = {0: torch.cat([origin[None], axes])[None].double().cpu()}
        self.last = {i: k for k, node in enumerate(graph.nodes, start=1) for i in node.inputs}

    def step(self, number: int) -> None:
        """Apply one operation to all cells, cutting them at its breakpoints."""
        node = self.graph.nodes[number - 1]
        if is_affine(node.op):
            self.held[number] = _affine(node.op, [self.held[i] for i in node.inputs])
        else:
            self._cut(node)
            self.held[number] = self._nonlinear(node)
        for i in [i for i in self.held if self.last.get(i, len(self.graph.nodes) + 1) <= number]:
            del self.held[i]

    def _cut(self, node: Node) -> None:
        maps = self.held[node.inputs[0]].flatten(2)
        breakpoints = breakpoints_of(node.op)
        if breakpoints is None:
            windows = members(node).cpu()
            self.polygons, parents = _divide(
                self.polygons, maps, lambda p, m, left: _by_winner(p, m, windows, left), self.most
            )
        else:
            self.polygons, parents = _divide(
                self.polygons,
                maps,
                lambda p, m, left: _by_breakpoints(p, m, breakpoints, left),
                self.most,
            )
        if len(parents) > len(maps):
            index = torch.tensor(parents)
            self.held = {i: m[index] for i, m in self.held.items()}

    def _nonlinear(self, node: Node) -> Tensor:
        maps = self.held[node.inputs[0]]
        centres = torch.tensor([_centre(p) for p in self.polygons], dtype=torch.float64)
        z = _at(maps, centres)
        if not is_elementwise(node.op):
            pick = winner(node, z).flatten(1)[:, None].expand(-1, maps.shape[1], -1)
            return maps.flatten(2).gather(2, pick).view(*maps.shape[:2], *node.shape)
        slope, intercept = line(node.op, z)
        image = maps * slope[:, None]
        image[:, 0] += intercept
        return image


def _affine(op: Affine, inputs: list[Tensor]) -> Tensor:
    """Apply an affine operation to constants and slopes.

    A bounded number of rows is processed at a time. The operation's own constant is subtracted from
    the slopes.
    """
    rows, k = len(inputs[0]), inputs[0].shape[1]
    most = max(1, _BATCH // (8 * k * max(t[0, 0].numel() for t in inputs)))
    nothing = op.value(*(torch.zeros_like(t[0, :1]) for t in inputs))
    made = [
        op.value(*(t[i : i + most].flatten(0, 1) for t in inputs)) for i in range(0, rows, most)
    ]
    whole = torch.cat(made).view(rows, k, *made[0].shape[1:])
    whole[:, 1:] -= nothing
    return whole


def _at(maps: Tensor, t: Tensor) -> Tensor:
    """Return the values (R, *shape) of maps (R, 1 + k, *shape) at (R, k)."""
    weight = torch.cat([torch.ones_like(t[:, :1]), t], 1)
    return torch.einsum("rk,rk...->r...", weight, maps)


_Cutter = Callable[[Polygon, Tensor, int], Iterator[Polygon]]


def _divide(
    polygons: list[Polygon], maps: Tensor, cutter: _Cutter, most: int
) -> tuple[list[Polygon], list[int]]:
    """Return the parts of all cells, and the parent cell of each part.

    The maps are (R, 1 + k, n).
    """
    pieces: list[Polygon] = []
    parents: list[int] = []
    for r, (polygon, m) in enumerate(zip(polygons, maps, strict=True)):
        new = list(cutter(polygon, m, most - len(pieces)))
        pieces += new
        parents += [r] * len(new)
    return pieces, parents


def _check_count(count: int, left: int) -> None:
    """Raise `BadInput` if there are more parts than are left to make.

    It is checked while cutting, because n lines can make n^2 / 2 parts.
    """
    if count > left:
        raise BadInput(
            "too many linear regions: take a shorter segment or a smaller part of the plane"
        )


def _by_breakpoints(
    polygon: Polygon, maps: Tensor, breakpoints: tuple[float, ...], left: int
) -> Iterator[Polygon]:
    """Yield the parts of a cell on which no value crosses a breakpoint.

    The values are affine maps (1 + k, n).
    """
    values = _corner_values(polygon, maps)
    room = _NEAR * values.abs().amax(0)
    lines = []
    for breakpoint in breakpoints:
        crossed = (values.amin(0) < breakpoint - room) & (values.amax(0) > breakpoint + room)
        level = maps[:, crossed].T.clone()
        level[:, 0] -= breakpoint
        lines += [
            (tuple(row), near)
            for row, near in zip(level.tolist(), room[crossed].tolist(), strict=True)
        ]
    parts = [polygon]
    for row, near in lines:
        parts = [part for whole in parts for part in _halves(whole, row, near)]
        _check_count(len(parts), left)
    yield from parts


def _by_winner(polygon: Polygon, maps: Tensor, windows: Tensor, left: int) -> Iterator[Polygon]:
    """Yield the parts of a cell on which every window has one maximum.

    The windows (out, members) index the values, which are affine maps (1 + k, n).
    """
    padded = torch.cat([maps, torch.zeros_like(maps[:, :1])], 1)
    padded[0, -1] = -1e300  # padding never wins
    members = padded[:, windows]  # (1 + k, out, members)
    waiting, count = [polygon], 0
    while waiting:
        whole = waiting.pop()
        count += 1
        _check_count((count + 1) // 2, left)
        row = _undecided(whole, members)
        parts = [whole] if row is None else _halves(whole, *row)
        if len(parts) == 1:
            yield parts[0]
        else:
            waiting += parts


def _undecided(polygon: Polygon, members: Tensor) -> tuple[Corner, float] | None:
    """Return a line along which to cut a cell whose windows are undecided.

    It is the line on which two members are equal that are the maximum of one window at different
    corners of the cell. Returns None where every window has one member that is its maximum at all
    corners.
    """
    values = torch.einsum("vk,kom->vom", _weights(polygon), members)
    top = values.amax(2, keepdim=True)
    near = _NEAR * top.abs().amax()
    wins = values >= top - near
    open_windows = torch.nonzero(~wins.all(0).any(1)).flatten()
    if not len(open_windows):
        return None
    window = int(open_windows[0])
    ranked = values[:, window].argmax(1).tolist()
    for first, second in ((a, b) for a in ranked for b in ranked if a != b):
        row = members[:, window, first] - members[:, window, second]
        sides = _weights(polygon) @ row
        if bool(sides.min() < -near) and bool(sides.max() > near):
            return tuple(row.tolist()), float(near)
    return None


def _halves(polygon: Polygon, row: Corner, near: float) -> list[Polygon]:
    """Return the parts of a cell on either side of a line.

    The line is row[0] + <row[1:], t> = 0. Returns the cell itself where the line does not cut it.
    """
    sides = [
        row[0] + sum(a * t for a, t in zip(row[1:], corner, strict=True)) for corner in polygon
    ]
    if min(sides) >= -near or max(sides) <= near:
        return [polygon]
    if len(polygon[0]) == 1:
        (a,), (b,) = polygon
        middle = (a + (b - a) * sides[0] / (sides[0] - sides[1]),)
        return [[(a,), middle], [middle, (b,)]] if a < middle[0] < b else [polygon]
    above: Polygon = []
    below: Polygon = []
    for i, corner in enumerate(polygon):
        after, here, there = (
            polygon[(i + 1) % len(polygon)],
            sides[i],
            sides[(i + 1) % len(polygon)],
        )
        if here >= 0:
            above.append(corner)
        if here <= 0:
            below.append(corner)
        if here * there < 0:
            share = here / (here - there)
            cut = tuple(p + (q - p) * share for p, q in zip(corner, after, strict=True))
            above.append(cut)
            below.append(cut)
    return [above, below]


def _corner_values(polygon: Polygon, maps: Tensor) -> Tensor:
    return _weights(polygon) @ maps


def _weights(polygon: Polygon) -> Tensor:
    return torch.tensor([(1.0, *corner) for corner in polygon], dtype=torch.float64)


def _polygon(corners: Tensor) -> Polygon:
    return [tuple(row) for row in corners.tolist()]


def _centre(polygon: Polygon) -> Corner:
    return tuple(sum(values) / len(polygon) for values in zip(*polygon, strict=True))
