"""What does one element of an image depend on? The relaxed network cut down to that window, a row for each element.

An element of a second convolution may see a tenth of its image. What is chosen for its bounds, step by step, then costs a tenth too. A crop is a relaxed
network like any other, so searches and confirmation run on it unchanged. Places of a window that lie outside the image stand for padding: there the input
cannot move, every activation's lines are 0, and behind an affine operation that feeds another one `Inside` puts the zeros back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from calipers.bounds.coefficients import WORTH_A_WINDOW, Window
from calipers.bounds.interval import Box
from calipers.bounds.linear import Relaxed
from calipers.graph.affine import Conv, Scale, Sum
from calipers.graph.ir import Affine, Elementwise, Graph, Lines, Node
from calipers.problem.ball import Region


@dataclass(frozen=True)
class Inside:
    """The identity, as an activation that never bends: in a crop its lines are 0 where the window leaves the image."""

    rounds: bool = False
    straight: bool = True
    kind: Literal["elementwise"] = field(default="elementwise", repr=False)

    def value(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The interval itself."""
        return lower, upper

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Nowhere."""
        return torch.zeros_like(lower, dtype=torch.bool)

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """The diagonal."""
        one, zero = torch.ones_like(lower), torch.zeros_like(lower)
        return Lines(one, zero, one, zero)


@dataclass(frozen=True)
class Cut:
    """A part of each image: `top` and `left` say where it begins, `size` and `whole` how large it and the image are."""

    top: int
    left: int
    size: tuple[int, int]
    whole: tuple[int, int]
    rounds: bool = False
    kind: Literal["affine"] = field(default="affine", repr=False)

    def value(self, *inputs: Tensor) -> Tensor:
        """(M, C, H, W) -> (M, C, h, w)."""
        return inputs[0][:, :, self.top : self.top + self.size[0], self.left : self.left + self.size[1]]

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Zeros around."""
        below, right = self.whole[0] - self.top - self.size[0], self.whole[1] - self.left - self.size[1]
        return (functional.pad(a, [self.left, right, self.top, below]),)

    def absolute(self, *inputs: Tensor) -> Tensor:
        """The same part."""
        return self.value(*inputs)

    def to(self, dtype: torch.dtype) -> Cut:
        """No constants to convert."""
        return self


class _Origin(NamedTuple):
    """Where a crop's number comes from: the whole graph's number, seen through a window; `made` is False where the crop itself added the operation."""

    number: int
    window: Window
    made: bool = True


@dataclass(frozen=True, eq=False)
class Crop:
    """The part of a graph that one element of a number sees; `origins` by number of the crop."""

    graph: Graph
    origins: tuple[_Origin, ...]
    grid: tuple[int, int]

    @classmethod
    def of(cls, graph: Graph, number: int, region: Region) -> Crop | None:
        """Return the crop of a number's elements; None where that would save little, or operations before it do not keep to windows."""
        if type(region) is not Region or region.weight is not None or graph.field_of_view(number) > WORTH_A_WINDOW:
            return None
        if not all(map(_fits, (graph.nodes[k - 1] for k in _before(graph, number)))):
            return None
        windows = _windows(graph, number)
        return None if windows is None else _written(graph, number, windows)

    @property
    def elements(self) -> int:
        """How many elements one row holds."""
        return sum(torch.Size(self.graph.shape(k)).numel() for k in range(len(self.origins)))

    def region(self, whole: Region, points: Tensor, place: Tensor) -> Region:
        """Return the windows of the regions, as regions: outside the image nothing moves."""
        seen = self._seen(0, points, place)
        low, high = (seen(end.view_as(whole.center)).flatten(1) for end in (whole.low, whole.high))
        return Region(whole.ball, whole.norm, seen(whole.center), whole.radius[points], low, high, None)

    def relaxed(self, whole: Relaxed, points: Tensor, place: Tensor) -> tuple[Relaxed, dict[int, Tensor]]:
        """Return the relaxed crop around elements at `place (P,)` of points (P,), and for every number which of its elements are inside the image (P, n)."""
        state = Relaxed(self.graph, self.region(whole.region, points, place), whole.arithmetic, torch.zeros_like(points), reach=whole.reach[points])
        inside = {}
        for k, origin in enumerate(self.origins):
            seen = self._seen(k, points, place)
            box = whole.boxes.get(origin.number)
            like = whole.region.center
            mask = seen(like.new_ones(1, 1, *origin.window.image)).expand(-1, self.graph.shape(k)[0], -1, -1)
            inside[k] = mask.flatten(1) > 0
            if box is not None:
                state.boxes[k] = Box(seen(box.lower), seen(box.upper))
            if k == 0:
                if 0 in whole.departures:
                    state.departures[0] = seen(whole.departures[0])
                continue
            op = self.graph.nodes[k - 1].op
            if isinstance(op, Inside):
                zero = torch.zeros_like(mask)
                state.relaxations[k] = Lines(mask, zero, mask, zero)
            elif isinstance(op, Elementwise):
                lines = whole.relaxations[origin.number]
                assert isinstance(lines, Lines)
                state.relaxations[k] = Lines(*(seen(line) for line in lines))
            for held, into in ((whole.sizes, state.sizes), (whole.departures, state.departures)):
                if held:
                    into[k] = seen(held[origin.number]) if origin.made else torch.zeros_like(mask)
        return state, inside

    def _seen(self, number: int, points: Tensor, place: Tensor) -> Callable[[Tensor], Tensor]:
        window = self.origins[number].window
        return lambda values: window.at(values, points, place, self.grid)


def _before(graph: Graph, number: int) -> list[int]:
    """Return the numbers that a number is made of, itself included, the input not."""
    needed = {number}
    for k in range(number, 0, -1):
        if k in needed:
            needed.update(graph.nodes[k - 1].inputs)
    return sorted(needed - {0})


def _fits(node: Node) -> bool:
    """Does the operation do the same at every place of the image, and does each window touch the image?"""
    op = node.op
    if isinstance(op, Conv):
        return len(op.stride) == 2 and all(pad < op.window(1, axis) for axis, pad in enumerate(op.padding))
    if isinstance(op, Scale):
        return all(t.numel() == 1 or t.shape == (1, node.shape[0], 1, 1) for t in (op.scale, op.shift))
    return isinstance(op, Sum) or (isinstance(op, Elementwise) and len(node.inputs) == 1)


def _needed(node: Node, window: Window, image: tuple[int, ...]) -> Window:
    """Return what an operation reads of an input (C, H, W) for a window of its result."""
    if not isinstance(node.op, Conv):
        return window
    size = (node.op.window(window.size[0], 0), node.op.window(window.size[1], 1))
    return window.through(node.op.stride, node.op.padding, size, (image[1], image[2]))


def _windows(graph: Graph, number: int) -> dict[int, Window] | None:
    """Return the window of every number that one element sees; None where two ways to a number move differently."""
    image = graph.shape(number)[1:]
    windows = {number: Window((1, 1), (0, 0), (1, 1), (image[0], image[1]))}
    for k in reversed(_before(graph, number)):
        node = graph.nodes[k - 1]
        for i in node.inputs:
            wanted = _needed(node, windows[k], graph.shape(i))
            if i in windows and windows[i].stride != wanted.stride:
                return None
            windows[i] = windows[i].union(wanted) if i in windows else wanted
    return windows


def _written(graph: Graph, number: int, windows: dict[int, Window]) -> Crop:
    """Write the crop's graph: operations on windows, `Inside` where zeros have to be put back, `Cut` where an operation reads less than there is."""
    read_by_affine = {i for k in _before(graph, number) if isinstance(graph.nodes[k - 1].op, Affine) for i in graph.nodes[k - 1].inputs}
    first = (graph.input_shape[0], *windows[0].size)
    nodes, origins, place = list[Node](), [_Origin(0, windows[0])], {0: 0}

    def add(node: Node, op: Conv | Scale | Sum | Cut | Inside | Elementwise, inputs: tuple[int, ...], origin: _Origin) -> int:
        channels = graph.shape(origin.number)[0]
        nodes.append(dataclasses.replace(node, op=op, inputs=inputs, shape=(channels, *origin.window.size)))
        origins.append(origin)
        return len(nodes)

    for k in _before(graph, number):
        node, inputs = graph.nodes[k - 1], list[int]()
        for i in node.inputs:
            wanted, there = _needed(node, windows[k], graph.shape(i)), windows[i]
            if wanted == there:
                inputs.append(place[i])
                continue
            top, left = (w - t for w, t in zip(wanted.offset, there.offset, strict=True))
            inputs.append(add(node, Cut(top, left, wanted.size, there.size), (place[i],), _Origin(i, wanted, made=False)))
        op = node.op
        if isinstance(op, Conv):
            op = dataclasses.replace(op, padding=(0, 0), input_size=_needed(node, windows[k], graph.shape(node.inputs[0])).size)
        assert isinstance(op, Conv | Scale | Sum | Elementwise)
        place[k] = add(node, op, tuple(inputs), _Origin(k, windows[k]))
        if isinstance(op, Affine) and k in read_by_affine:
            place[k] = add(node, Inside(), (place[k],), _Origin(k, windows[k], made=False))
    grid = graph.shape(number)[1:]
    return Crop(Graph(first, tuple(nodes)), tuple(origins), (grid[0], grid[1]))
