"""The affine map that a piecewise linear network is around a point.

As long as no operation leaves its linear piece, the network is one affine map. Only general facts
of operations are read: the breakpoints of a function of one number, its slope at a point, the
members of a window. The affine map is never written out: it is pushed forward along a direction
(one forward pass for each point) and pulled back from any element (one backward product for each
row).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.errors import UnsupportedOp
from calipers.graph.ir import Graph, Node
from calipers.graph.kinds import Affine, Elementwise, Op, is_affine, is_elementwise
from calipers.graph.relaxations import Planes

BUDGET = 2**26  # bytes of one batch of rows pulled back at once


class Gaps(NamedTuple):
    """Distances of inputs from the next breakpoint above and below.

    They are differences of the values that an operation reads, (M, n) each; infinite where its
    linear piece has no end on that side.
    """

    above: Tensor
    below: Tensor


def breakpoints_of(op: Op) -> tuple[float, ...] | None:
    """Return the breakpoints of a piecewise linear function, in order.

    The function takes one number. Returns None where it is not piecewise linear.
    """
    if op.breakpoints is None:
        return None
    finite = sorted({k for k in op.breakpoints if math.isfinite(k)})
    ends = torch.tensor([-math.inf, *finite, math.inf], dtype=torch.float64)
    return None if bool(op.unstable(ends[:-1], ends[1:]).any()) else tuple(finite)


def require_piecewise_linear(graph: Graph) -> None:
    """Raise `UnsupportedOp` where the network is not piecewise linear."""
    for node in graph.nodes:
        op = node.op
        if not op.affine and breakpoints_of(op) is None and op.members() is None:
            raise UnsupportedOp(
                f"{type(op).__name__} at {node.where} is not piecewise linear: the model "
                "has no linear regions. Gradients, slices of its decisions and brackets do not "
                "need them."
            )


def line(op: Elementwise, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of the linear piece on which z lies.

    At a breakpoint they are those of the piece to its right.
    """
    lines = op.relax(z, z)
    return lines.lower_slope, op.value(z) - lines.lower_slope * z


def linear_part(op: Affine, inputs: list[Tensor]) -> Tensor:
    """Return Wx, an affine operation without its constant, (M, *out)."""
    return op.value(*inputs) - op.value(*(torch.zeros_like(t[:1]) for t in inputs))


def winner(node: Node, z: Tensor) -> Tensor:
    """Return the flat index of each window's maximum, (M, *out).

    Of several equal members it is any one.
    """
    planes = node.op.relaxation((z, z))
    assert isinstance(planes, Planes)
    return planes.pick


def members(node: Node) -> Tensor:
    """Return the flat indices of each window's members, (out, k).

    Padding has the index one past the last element.
    """
    found = node.op.members()
    assert found is not None
    return found


@dataclass(frozen=True, eq=False)
class Pieces:
    """The affine map of a network at each of M points.

    `values` holds the value of every number in the graph (the input first). By node number,
    `slopes` holds the slopes (M, *shape) of functions of one number and `picks` the indices (M,
    *out) of the windows' maxima. Everything is in the graph's float64.
    """

    graph: Graph
    values: list[Tensor]
    slopes: dict[int, Tensor]
    picks: dict[int, Tensor]

    @classmethod
    def at(cls, graph: Graph, x: Tensor) -> Pieces:
        """Return the pieces at points x (M, *D).

        Raises `UnsupportedOp` where the network is not piecewise linear. Cost: a forward pass.
        """
        require_piecewise_linear(graph)
        slopes, picks, values = {}, {}, graph.values(x.double())
        for number, node in enumerate(graph.nodes, start=1):
            z = values[node.inputs[0]]
            if is_elementwise(node.op):
                slopes[number] = line(node.op, z)[0]
            elif not is_affine(node.op):
                picks[number] = winner(node, z)
        return cls(graph, values, slopes, picks)

    def take(self, index: Tensor) -> Pieces:
        """Return the pieces of the chosen points."""
        slopes, picks = (
            {k: t[index] for k, t in held.items()} for held in (self.slopes, self.picks)
        )
        return Pieces(self.graph, [v[index] for v in self.values], slopes, picks)

    @property
    def rows(self) -> int:
        """Number of rows that may be pulled back at once."""
        return max(1, BUDGET // (8 * self.graph.largest))

    def push(self, u: Tensor) -> list[Tensor]:
        """Return the derivative of every number along directions u (M, *D).

        It holds as long as no operation leaves its linear piece.
        """
        moved = [u]
        for number, node in enumerate(self.graph.nodes, start=1):
            inputs = [moved[i] for i in node.inputs]
            if is_affine(node.op):
                moved.append(linear_part(node.op, inputs))
            elif number in self.slopes:
                moved.append(self.slopes[number] * inputs[0])
            else:
                pick = self.picks[number]
                moved.append(inputs[0].flatten(1).gather(1, pick.flatten(1)).view(pick.shape))
        return moved

    def steepest(self, scale: Tensor) -> list[Tensor]:
        """Return upper bounds of <|gradient|, scale> for all elements.

        There is one tensor for each number of the graph; scale (M, *D) >= 0. The bound is loose
        where paths through the network cancel in the gradient, since it adds up their absolute
        values. Cost: a forward pass with absolute weights.
        """
        size = [scale]
        for number, node in enumerate(self.graph.nodes, start=1):
            inputs = [size[i] for i in node.inputs]
            if is_affine(node.op):
                size.append(node.op.absolute(*inputs))
            elif number in self.slopes:
                size.append(self.slopes[number].abs() * inputs[0])
            else:
                pick = self.picks[number]
                size.append(inputs[0].flatten(1).gather(1, pick.flatten(1)).view(pick.shape))
        return size

    def pull(self, number: int, a: Tensor, point: Tensor) -> Tensor:
        """Return the input gradients of <a, value of a number>, (R, *D).

        The rows a (R, *shape) are each taken at a point of their own, `point (R,)`.
        """
        pending = {number: a}
        for k in range(number, 0, -1):
            if k not in pending:
                continue
            node, row = self.graph.nodes[k - 1], pending.pop(k)
            for i, back in zip(node.inputs, self._back(k, row, point), strict=True):
                pending[i] = back if i not in pending else pending[i] + back
        return pending[0] if 0 in pending else a.new_zeros(len(a), *self.graph.input_shape)

    def _back(self, number: int, row: Tensor, point: Tensor) -> tuple[Tensor, ...]:
        node = self.graph.nodes[number - 1]
        if is_affine(node.op):
            return node.op.adjoint(row)
        if number in self.slopes:
            return (row * self.slopes[number][point],)
        shape = self.graph.shape(node.inputs[0])
        empty = row.new_zeros(len(row), torch.Size(shape).numel())
        return (
            empty.scatter_add(1, self.picks[number][point].flatten(1), row.flatten(1)).view(
                len(row), *shape
            ),
        )

    def nonlinear_nodes(self) -> Iterator[int]:
        """Yield the numbers of the operations that are not affine."""
        yield from (k for k, node in enumerate(self.graph.nodes, start=1) if not is_affine(node.op))

    def gaps(self, number: int) -> Gaps:
        """Return how far a function's inputs are from its breakpoints.

        The operation must be a function of one number.
        """
        node = self.graph.nodes[number - 1]
        z = self.values[node.inputs[0]].flatten(1)
        above, below = torch.full_like(z, torch.inf), torch.full_like(z, torch.inf)
        for breakpoint in breakpoints_of(node.op) or ():
            away = breakpoint - z
            above = torch.where(away > 0, torch.minimum(above, away), above)
            below = torch.where(away <= 0, torch.minimum(below, -away), below)
        return Gaps(above, below)

    def trailing(self, number: int) -> tuple[Tensor, Tensor]:
        """Return how far each window's members are below its maximum.

        The distances (M, out, k) are infinite for the maximum itself and for padding. The second
        result are the members' flat indices (out, k).
        """
        node = self.graph.nodes[number - 1]
        z, windows = self.values[node.inputs[0]].flatten(1), members(node).to(self.values[0].device)
        each = torch.cat([z, torch.full_like(z[:, :1], -torch.inf)], 1)[:, windows]
        pick = self.picks[number].flatten(1)
        behind = z.gather(1, pick)[..., None] - each
        return torch.where(windows == pick[..., None], torch.inf, behind), windows

    def pattern(self) -> Tensor:
        """Return the activation pattern: each operation's piece, (M, n) int64.

        Two points of equal patterns are in one linear region. At a breakpoint it is the piece to
        the right.
        """
        found = [
            self.picks[k].flatten(1)
            if k in self.picks
            else _piece(self.graph.nodes[k - 1], self._read(k))
            for k in self.nonlinear_nodes()
        ]
        return (
            torch.cat(found, 1)
            if found
            else torch.zeros(len(self.values[0]), 0, dtype=torch.long, device=self.values[0].device)
        )

    def _read(self, number: int) -> Tensor:
        return self.values[self.graph.nodes[number - 1].inputs[0]].flatten(1)


def _piece(node: Node, z: Tensor) -> Tensor:
    count = torch.zeros_like(z, dtype=torch.long)
    for breakpoint in breakpoints_of(node.op) or ():
        count += z >= breakpoint
    return count
