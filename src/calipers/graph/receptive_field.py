"""Receptive fields: what one element of an image depends on.

The part is written as a graph of its own, on windows of the images. Places of a window that lie
outside the image stand for padding. Behind an affine operation that feeds another one, `Inside`
marks where the zeros have to be put back; for activations the code that relaxes the field does it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from calipers.graph.affine import Conv, Scale, Sum
from calipers.graph.ir import Graph, Node
from calipers.graph.kinds import Affine, Elementwise, is_affine
from calipers.graph.relaxations import Lines


class Window(NamedTuple):
    """The part of an image (H, W) that one element depends on.

    For the element at `place` of a grid it is `size` pixels from `place * stride + offset` on.
    """

    stride: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    image: tuple[int, int]

    def at(self, values: Tensor, points: Tensor, place: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return windows of values (N, C, H, W), zero outside, as (P, C, h, w).

        They belong to the elements at `place (P,)` of points (P,). With N = 1 the values serve all
        points.
        """
        pads = []
        for axis in (1, 0):
            last = (grid[axis] - 1) * self.stride[axis] + self.offset[axis] + self.size[axis]
            pads += [-self.offset[axis], last - self.image[axis]]
        windows = functional.unfold(functional.pad(values, pads), self.size, stride=self.stride)
        flat = windows.transpose(1, 2).reshape(-1, windows.shape[1])
        where = place if len(values) == 1 else points * windows.shape[2] + place
        return flat.index_select(0, where).view(len(place), values.shape[1], *self.size)

    def through(
        self,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        size: tuple[int, int],
        image: tuple[int, int],
    ) -> Window:
        """Return the window of a convolution's input, of `size` pixels.

        This window is that of the convolution's output.
        """
        moved = (
            (self.stride[axis] * stride[axis], self.offset[axis] * stride[axis] - padding[axis])
            for axis in range(2)
        )
        (rows, top), (columns, left) = moved
        return Window((rows, columns), (top, left), size, image)

    def union(self, other: Window) -> Window:
        """Return the smallest window around both; their strides must be equal."""
        begin = [min(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        end = [max(w.offset[axis] + w.size[axis] for w in (self, other)) for axis in range(2)]
        return Window(
            self.stride, (begin[0], begin[1]), (end[0] - begin[0], end[1] - begin[1]), self.image
        )


@dataclass(frozen=True)
class Inside(Elementwise):
    """The identity, as an activation that is linear everywhere.

    In a receptive field its lines are 0 where the window leaves the image.
    """

    rounds: bool = False
    linear_in_alpha: bool = True
    breakpoints: tuple[float, ...] = ()

    def value(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the interval itself."""
        return lower, upper

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return False everywhere."""
        return torch.zeros_like(lower, dtype=torch.bool)

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return the identity as both lines."""
        one, zero = torch.ones_like(lower), torch.zeros_like(lower)
        return Lines(one, zero, one, zero)


@dataclass(frozen=True)
class Cut(Affine):
    """A rectangular part of each image.

    It begins at `top` and `left`; `size` is its size and `whole` that of the image.
    """

    top: int
    left: int
    size: tuple[int, int]
    whole: tuple[int, int]
    rounds: bool = False

    def value(self, *inputs: Tensor) -> Tensor:
        """Return the part: (M, C, H, W) -> (M, C, h, w)."""
        return inputs[0][
            :, :, self.top : self.top + self.size[0], self.left : self.left + self.size[1]
        ]

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return a with zeros around it."""
        below, right = (
            self.whole[0] - self.top - self.size[0],
            self.whole[1] - self.left - self.size[1],
        )
        return (functional.pad(a, [self.left, right, self.top, below]),)

    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return the same part."""
        return self.value(*inputs)


class Origin(NamedTuple):
    """The origin of a result of the field in the whole graph.

    It is the result `number` of the whole graph, seen through `window`; `made` is False where the
    field itself added the operation.
    """

    number: int
    window: Window
    made: bool = True


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """The part of a graph that one element of a result depends on.

    `origins` are indexed by the numbers of its own graph; `grid` is the grid of places that such an
    element can have.
    """

    graph: Graph
    origins: tuple[Origin, ...]
    grid: tuple[int, int]

    @classmethod
    def of(cls, graph: Graph, number: int) -> ReceptiveField | None:
        """Return the receptive field of a result's elements, or None.

        None where operations before it do not read windows, or where a window may lie outside the
        image.
        """
        windows = _windows(graph, number)
        if windows is None or not all(_fits(graph, k) for k in graph.behind(number)):
            return None
        return _written(graph, number, windows)

    @property
    def elements(self) -> int:
        """Return how many elements one row holds."""
        return sum(torch.Size(self.graph.shape(k)).numel() for k in range(len(self.origins)))

    def seen(self, number: int, values: Tensor, points: Tensor, place: Tensor) -> Tensor:
        """Return what elements depend on in an image, (P, C, h, w).

        The elements are those at `place (P,)` of points (P,). `values` (N, C, H, W) are those of
        the result of the whole graph from which the field's `number` comes.
        """
        return self.origins[number].window.at(values, points, place, self.grid)


def _fits(graph: Graph, number: int) -> bool:
    """Return whether an operation is the same everywhere in the image.

    Each of its windows must overlap the image as well.
    """
    node = graph.nodes[number - 1]
    op = node.op
    if isinstance(op, Conv):
        return len(op.stride) == 2 and all(
            pad < op.window(1, axis) for axis, pad in enumerate(op.padding)
        )
    if isinstance(op, Scale):
        return all(
            t.numel() == 1 or t.shape == (1, node.shape[0], 1, 1) for t in (op.scale, op.shift)
        )
    return isinstance(op, Sum) or (isinstance(op, Elementwise) and len(node.inputs) == 1)


def field_of_view(graph: Graph, number: int) -> float:
    """Return the largest share of an earlier image that an element reads.

    Infinite where operations in between do not read windows.
    """
    windows = _windows(graph, number)
    if windows is None:
        return float("inf")
    return max(
        (_share(window.size, window.image) for k, window in windows.items() if k != number),
        default=0.0,
    )


def _share(size: tuple[int, int], image: tuple[int, int]) -> float:
    return min(size[0], image[0]) * min(size[1], image[1]) / (image[0] * image[1])


def _keeps_to_windows(graph: Graph, number: int) -> bool:
    """Return whether each place of an image depends on nearby places only."""
    node = graph.nodes[number - 1]
    if len(node.shape) != 3 or any(len(graph.shape(i)) != 3 for i in node.inputs):
        return False
    if is_affine(node.op):
        return node.op.windowed() is not None or node.op.slopes() is not None
    return node.op.elementwise


def _needed(node: Node, window: Window, image: tuple[int, ...]) -> Window:
    """Return the window of an input (C, H, W) for a window of the result."""
    op = node.op.windowed() if is_affine(node.op) else None
    if op is None:
        return window
    size = (op.window(window.size[0], 0), op.window(window.size[1], 1))
    return window.through(op.stride, op.padding, size, (image[1], image[2]))


def _windows(graph: Graph, number: int) -> dict[int, Window] | None:
    """Return the window of every result that one element depends on, or None.

    None where operations do not read windows, or where two paths to a result have different
    strides.
    """
    if len(graph.shape(number)) != 3:
        return None
    image = graph.shape(number)[1:]
    windows = {number: Window((1, 1), (0, 0), (1, 1), (image[0], image[1]))}
    for k in range(number, 0, -1):
        if k not in windows:
            continue
        if not _keeps_to_windows(graph, k):
            return None
        node = graph.nodes[k - 1]
        for i in node.inputs:
            wanted = _needed(node, windows[k], graph.shape(i))
            if i in windows and windows[i].stride != wanted.stride:
                return None
            windows[i] = windows[i].union(wanted) if i in windows else wanted
    return windows


def _written(graph: Graph, number: int, windows: dict[int, Window]) -> ReceptiveField:
    """Write the graph of a receptive field.

    It consists of operations on windows, `Inside` where zeros have to be put back, and `Cut` where
    an operation reads less than there is.
    """
    read_by_affine = {
        i
        for k in graph.behind(number)
        if isinstance(graph.nodes[k - 1].op, Affine)
        for i in graph.nodes[k - 1].inputs
    }
    first = (graph.input_shape[0], *windows[0].size)
    nodes, origins, place = list[Node](), [Origin(0, windows[0])], {0: 0}

    def add(
        node: Node,
        op: Conv | Scale | Sum | Cut | Inside | Elementwise,
        inputs: tuple[int, ...],
        origin: Origin,
    ) -> int:
        channels = graph.shape(origin.number)[0]
        nodes.append(
            dataclasses.replace(node, op=op, inputs=inputs, shape=(channels, *origin.window.size))
        )
        origins.append(origin)
        return len(nodes)

    for k in graph.behind(number):
        node, inputs = graph.nodes[k - 1], list[int]()
        for i in node.inputs:
            wanted, there = _needed(node, windows[k], graph.shape(i)), windows[i]
            if wanted == there:
                inputs.append(place[i])
                continue
            top, left = (w - t for w, t in zip(wanted.offset, there.offset, strict=True))
            inputs.append(
                add(
                    node,
                    Cut(top, left, wanted.size, there.size),
                    (place[i],),
                    Origin(i, wanted, made=False),
                )
            )
        op = node.op
        if isinstance(op, Conv):
            op = dataclasses.replace(
                op,
                padding=(0, 0),
                input_size=_needed(node, windows[k], graph.shape(node.inputs[0])).size,
            )
        assert isinstance(op, Conv | Scale | Sum | Elementwise)
        place[k] = add(node, op, tuple(inputs), Origin(k, windows[k]))
        if isinstance(op, Affine) and k in read_by_affine:
            place[k] = add(node, Inside(), (place[k],), Origin(k, windows[k], made=False))
    grid = graph.shape(number)[1:]
    return ReceptiveField(Graph(first, tuple(nodes)), tuple(origins), (grid[0], grid[1]))
