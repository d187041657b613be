"""What is a network, to a bound? A list of nodes in order, each an operation on earlier nodes.
Nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs


@runtime_checkable
class Affine(Protocol):
    """x -> Wx + b on one or more inputs (M, *in), batched over the first axis."""

    @property
    def kind(self) -> Literal["affine"]:
        """Which of the three kinds of operation this is."""

    def value(self, *inputs: Tensor) -> Tensor:
        """Return Wx + b, (M, *out)."""

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return W^T a for each input, from a (M, *out)."""

    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return |W| r for non-negative r."""

    def to(self, dtype: torch.dtype) -> Affine:
        """Return the operation in another dtype."""


class Lines(NamedTuple):
    """Two lines that sandwich a function on an interval: slope * x + intercept, each of the input's
    shape.
    """

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


@runtime_checkable
class Windowed(Protocol):
    """An affine operation on images that sees a window of its input at each place: convolution."""

    @property
    def stride(self) -> tuple[int, ...]:
        """Input pixels from one output place to the next, for each axis."""

    @property
    def padding(self) -> tuple[int, ...]:
        """Pixels of zeros before the input, for each axis."""

    def window(self, size: int, axis: int) -> int:
        """Return how many input pixels `size` neighbouring output places see along an axis."""

    def window_adjoint(self, a: Tensor) -> Tensor:
        """Return W^T a for windows (M, C', h, w): (M, C, window(h, 0), window(w, 1)), padding
        included.
        """


@runtime_checkable
class Elementwise(Protocol):
    """A scalar function applied to every element."""

    @property
    def kind(self) -> Literal["elementwise"]:
        """Which of the three kinds of operation this is."""

    def value(self, x: Tensor) -> Tensor:
        """Return f(x)."""

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value on [lower, upper], rounded outward."""

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Where is the function not a straight line on [lower, upper], bool? Only there do tighter
        input bounds help.
        """

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return lines that sandwich f on [lower, upper], rounded outward; sound for every alpha in
        [0, 1], by default the tightest guess.
        """


class Planes(NamedTuple):
    """A lower and an upper plane of a product over a box: each output is one input element, or a
    constant.

    `pick (M, *out)` is the flat index of the input element that bounds the output from below. Where
    `exact`, that element bounds it from above too; elsewhere `ceiling` does.
    """

    pick: Tensor
    exact: Tensor
    ceiling: Tensor


@runtime_checkable
class Selection(Protocol):
    """The largest of some elements of one input (max-pool)."""

    @property
    def kind(self) -> Literal["selection"]:
        """Which of the three kinds of operation this is."""

    def value(self, x: Tensor) -> Tensor:
        """Return the maxima."""

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which input elements can be one of several winners of some window, bool of the input's
        shape?
        """

    def planes(self, lower: Tensor, upper: Tensor) -> Planes:
        """Return planes over the box."""


class Saddle(NamedTuple):
    """Two planes that sandwich x * y over a box: each side's slopes for x and y and its intercept,
    all of the product's shape (M, *shape).
    """

    lower_x: Tensor
    lower_y: Tensor
    lower_intercept: Tensor
    upper_x: Tensor
    upper_y: Tensor
    upper_intercept: Tensor

    def lines(self) -> tuple[Lines, Lines]:
        """Return the planes' share in each factor as lines, the intercepts with the first."""
        zero = torch.zeros_like(self.lower_x)
        return Lines(self.lower_x, self.lower_intercept, self.upper_x, self.upper_intercept), Lines(
            self.lower_y, zero, self.upper_y, zero
        )


@runtime_checkable
class Bilinear(Protocol):
    """The product, element by element, of two numbers of one shape."""

    @property
    def kind(self) -> Literal["product"]:
        """Which kind of operation this is."""

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x * y."""

    def corners(self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest product over a box given by its ends, rounded outward."""

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Where is a factor no constant? Only there do tighter bounds of it help."""

    def saddle(
        self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], alpha: Tensor | None = None
    ) -> Saddle:
        """Return planes over a box, rounded outward; sound for every alpha in [0, 1], which mixes
        the two best ones of each side.
        """


class Facets(NamedTuple):
    """The planes of a matrix product over a box: the ends of both factors, the products of these
    ends, and (M, *out) the weight of each side's second plane.

    Without a weight (M, 0) the first plane of each side is meant.
    """

    low_x: Tensor
    high_x: Tensor
    low_y: Tensor
    high_y: Tensor
    low_low: Tensor
    low_high: Tensor
    high_low: Tensor
    high_high: Tensor
    alpha: Tensor

    def size(self, x: Tensor, y: Tensor) -> Tensor:
        """Return, from the factors' magnitudes, the size of all that an output's plane adds up,
        times what the roundings of its sums over k count for.

        A plane is made of 3 products for each k, the ends' products of k roundings each.
        """
        return (3 * x.shape[-1] + 16) * (x @ y)


@runtime_checkable
class Contraction(Protocol):
    """The product of two matrices, both variable, summed over the axis between them."""

    @property
    def kind(self) -> Literal["contraction"]:
        """Which kind of operation this is."""

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x @ y."""

    def corners(self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value over a box given by its ends, rounded outward."""

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Where is a factor no constant?"""

    def facets(
        self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], alpha: Tensor | None = None
    ) -> Facets:
        """Return planes over a box, sound for every alpha in [0, 1] but for the rounding of whoever
        adds them up.
        """

    def back(self, a: Tensor, facets: Facets) -> tuple[Tensor, Tensor, Tensor]:
        """Return the coefficients of both factors and the offset (P, S), from coefficients (P, S,
        *out).
        """

    def pull(self, a: Tensor, facets: Facets, x: Tensor, y: Tensor) -> Tensor:
        """Return d <a, plane at (x, y)> / d alpha for coefficients (P, *out)."""

    def plane(self, a: Tensor, facets: Facets, x: Tensor, y: Tensor) -> Tensor:
        """Return the value at (x, y) of the planes that coefficients (P, *out) take."""


Relaxation = Lines | Planes | Saddle | Facets


@runtime_checkable
class Pooling(Protocol):
    """A function of all elements along an axis that is neither affine nor one of them, in shares:
    every element of a row has its part of the value.

    Whoever reads it reads nothing but the sum along the axis, for only sums lie between the lines.
    """

    @property
    def kind(self) -> Literal["pooling"]:
        """Which kind of operation this is."""

    def value(self, x: Tensor) -> Tensor:
        """Return each element's share, of the input's shape."""

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest share over a box, rounded outward."""

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which elements do tighter bounds help?"""

    def lines(self, lower: Tensor, upper: Tensor) -> Lines:
        """Return a lower and an upper line for each element, whose sums along the axis sandwich the
        function over the box, rounded outward.
        """


Op = Affine | Elementwise | Selection | Bilinear | Contraction | Pooling


def is_affine(op: Op) -> TypeIs[Affine]:
    """As `isinstance(op, Affine)`, which asks for every member of the protocol and takes longer
    than a sweep through a small layer.
    """
    return op.kind == "affine"


def completed(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an exported call, those left out at its end filled in from the
    operation's defaults.
    """
    return args + defaults[len(args) :]


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on the results of earlier nodes; `shape` is without the batch, `where` names the
    model's module and source line.
    """

    op: Op
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    where: str


_FAN = 2  # outputs for each input, from which on the inputs are bounded in their place


def _passes_on(node: Node, shape: tuple[int, ...]) -> bool:
    """Does the operation only move and copy the elements of its one input, make several times as
    many of them, or bend each by itself?

    What is bent is bounded no worse by its range over the bounds of what goes in: no line below it
    rises above its least value. Weights that are not negative, and of which the moments of order 0,
    1 and 2 are those of a single one, belong to a single element.
    """
    if node.op.kind == "elementwise":
        return True
    if not is_affine(node.op) or len(node.inputs) > 1 or not hasattr(node.op, "positive"):
        return False
    elements = torch.Size(shape).numel()
    if torch.Size(node.shape).numel() >= _FAN * elements or not node.op.positive:
        return torch.Size(node.shape).numel() >= _FAN * elements
    count = torch.arange(1.0, elements + 1, dtype=torch.float64)
    with torch.no_grad():
        nothing, ones, first, second = (
            node.op.value(t.view(1, *shape)).flatten()
            for t in (0 * count, count**0, count, count.square())
        )
    return (
        not bool(nothing.any())
        and bool((ones == 1).all())
        and bool((second == first.square()).all())
    )


@dataclass(frozen=True, eq=False)
class Graph:
    """The network: number 0 is the input of shape `input_shape`, number i + 1 the result of
    `nodes[i]`, the last one the logits.
    """

    input_shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    apart: Graph | None = None
    """The same network before neighbouring layers were merged: what is executed, one operation
    after the other.
    """
    computed: str = ""
    """Where the model computes a constant that float32 does not hold, so that its execution has
    another one; empty where it does not.
    """

    def values(self, x: Tensor) -> list[Tensor]:
        """Return the result of every number, the input first, for a batch x (M, *input_shape)."""
        results = [x]
        for node in self.nodes:
            results.append(node.op.value(*(results[i] for i in node.inputs)))
        return results

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of a number's result, without the batch."""
        return self.nodes[number - 1].shape if number else self.input_shape

    def to(self, dtype: torch.dtype) -> Graph:
        """Return the graph with its constants in another dtype; made once for each."""
        if dtype not in self._copies:
            self._copies[dtype] = self._converted(dtype)
        return self._copies[dtype]

    @cached_property
    def _copies(self) -> dict[torch.dtype, Graph]:
        return {}

    def _converted(self, dtype: torch.dtype) -> Graph:
        nodes = tuple(
            dataclasses.replace(n, op=n.op.to(dtype)) if isinstance(n.op, Affine) else n
            for n in self.nodes
        )
        return Graph(self.input_shape, nodes)

    @cached_property
    def ways(self) -> dict[int, tuple[int, ...]]:
        """By number that a non-affine operation reads: the numbers from the one to bound in its
        place, up to itself.

        Elements that are moved about, copied or bent are bounded before that, once; and where sums
        multiply their number (the differences of all pairs), the few that they are made of, with
        intervals from there on.
        """
        found = {}
        for last in sorted(
            {i for n in self.nodes if not isinstance(n.op, Affine) for i in n.inputs}
        ):
            way, plain = [last], True
            while way[0] and _passes_on(
                self.nodes[way[0] - 1], self.shape(self.nodes[way[0] - 1].inputs[0])
            ):
                plain = plain and getattr(self.nodes[way[0] - 1].op, "diagonal", False)
                way.insert(0, self.nodes[way[0] - 1].inputs[0])
            found[last] = (last,) if plain else tuple(way)  # a mere change of shape is no gain
        return found

    @cached_property
    def bent(self) -> tuple[int, ...]:
        """The numbers whose bounds matter: inputs of non-affine operations, or what these are made
        of, in order.
        """
        return tuple(sorted({way[0] for way in self.ways.values()}))

    @cached_property
    def stem(self) -> int:
        """The last number that is made from the input by a chain of affine operations on which all
        else hangs; 0 where there is none.
        """
        for k, node in enumerate(self.nodes):
            if (
                not isinstance(node.op, Affine)
                or node.inputs != (k,)
                or any(min(n.inputs) <= k for n in self.nodes[k + 1 :])
            ):
                return k
        return len(self.nodes)

    @cached_property
    def largest(self) -> int:
        """The number of elements of the largest result."""
        return max(torch.Size(self.shape(i)).numel() for i in range(len(self.nodes) + 1))

    def field_of_view(self, number: int) -> float:
        """Return the largest share of any earlier image that one element of a number depends on;
        infinite where operations between do not keep to windows.
        """
        if len(self.shape(number)) != 3:
            return float("inf")
        window, widest = {number: (1, 1)}, 0.0
        for k in range(number, 0, -1):
            if k not in window:
                continue
            node, size = self.nodes[k - 1], window[k]
            if isinstance(node.op, Windowed):
                size = (node.op.window(size[0], 0), node.op.window(size[1], 1))
            elif not isinstance(node.op, Elementwise) and not hasattr(node.op, "slopes"):
                return float("inf")
            for i in node.inputs:
                if len(self.shape(i)) != 3:
                    return float("inf")
                _, height, width = self.shape(i)
                other = window.get(i, (0, 0))
                window[i] = (
                    min(height, max(size[0], other[0])),
                    min(width, max(size[1], other[1])),
                )
                widest = max(widest, window[i][0] * window[i][1] / (height * width))
        return widest
