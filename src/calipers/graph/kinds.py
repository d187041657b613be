"""What is an operation, to a bound? One abstract class, with the facts that bounds ask of it.

An operation says what it computes, over which interval its values lie, and between what it lies
over a box (`graph/relaxations.py`). All else has a default that is true of any operation, so a new
one is a class in its own file and an entry in a table of builders. Two kinds are told apart: an
affine operation is its own relaxation, a function of one number has lines for each element, which
branching may cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from calipers.graph.relaxations import Ends, Fixed, Lines, Parametrised, Relaxation

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import TypeIs

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """How an operation is written into a proof file: its facts, JSON-ready, and its arrays."""

    facts: dict[str, Any]
    arrays: dict[str, Tensor]


class Op(ABC):
    """An operation on one or more numbers (M, *shape), batched over the first axis."""

    affine: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return type(self).__name__

    @abstractmethod
    def value(self, *inputs: Any, **options: Any) -> Tensor:
        """Return the result, (M, *out)."""

    @abstractmethod
    def interval(self, *ends: Any, **options: Any) -> Ends:
        """Return the smallest and the largest value over a box, given by the ends (lower, upper) of
        each input, rounded outward.
        """

    @abstractmethod
    def relaxation(self, *ends: Any, **options: Any) -> Relaxation:
        """Return what bounds the operation over a box, rounded outward, for an `alpha` (M, *out):
        sound for every one in [0, 1], by default the tightest guess.
        """

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Where do tighter bounds of an input help, bool of its shape? By default everywhere but on
        a point.
        """
        return upper > lower

    def parametrised(self, held: Relaxation, *ends: Ends) -> Parametrised:
        """Return the relaxations over a box as a function of alpha; `held` is the one of no alpha,
        and all there is by default.
        """
        return Fixed(held)

    def chosen(self, held: Relaxation, alpha: Tensor, *ends: Ends) -> Relaxation:
        """Return the relaxation at an alpha that a search has found; `held` is the one of none."""
        return self.relaxation(*ends, alpha=alpha)

    def carries(self, shapes: list[Shape], shape: Shape) -> bool:
        """Is it enough to bound the elements of the one input, and have them carried by intervals
        through the operation?
        """
        return False

    @property
    def diagonal(self) -> bool:
        """Is each result made of the one element that stands in the same place, or comes in the
        same order?
        """
        return False

    @property
    def rounds(self) -> bool:
        """Does the operation compute anything?"""
        return True

    @property
    def kinks(self) -> tuple[float, ...] | None:
        """Between which places is a function of one number straight, and branching splits it? None
        where it is not made of straight pieces.
        """
        return None

    def members(self) -> Tensor | None:
        """Return the flat places (out, k) in the input of the elements that each result is the
        largest of, one past the end for padding; None for any other operation.
        """
        return None

    @property
    def executed_as_written(self) -> bool:
        """Do libraries execute what `value` writes, one rounding for each operation in it?"""
        return False

    @property
    def executed_exactly(self) -> bool:
        """Is the executed result the real one, but for numbers below the normal ones?"""
        return False

    def described(self, shapes: list[Shape], shape: Shape) -> Entry | None:
        """Return what a proof file says of the operation on inputs of these shapes; None where its
        checker knows no such operation. `record/checker.py` says what each entry means.
        """
        return None

    def to(self, dtype: torch.dtype) -> Op:
        """Return the operation with its constants in another dtype."""
        return self


class Affine(Op):
    """x -> Wx + b on one or more inputs."""

    affine: ClassVar[bool] = True

    @abstractmethod
    def value(self, *inputs: Tensor) -> Tensor:
        """Return Wx + b, (M, *out)."""

    @abstractmethod
    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return W^T a for each input, from a (M, *out)."""

    @abstractmethod
    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return |W| r for non-negative r."""

    def interval(self, *ends: Ends) -> Ends:
        """An affine operation rounds as its terms do: whoever knows the arithmetic adds them up."""
        raise TypeError(f"{self.label} is affine: its interval is made of `value` and `absolute`")

    def relaxation(self, *ends: Ends, alpha: Tensor | None = None) -> Relaxation:
        """An affine operation is its own relaxation."""
        raise TypeError(f"{self.label} is affine: its coefficients go back by its adjoint")

    def windowed(self) -> Windowed | None:
        """Return the operation if it sees a window of its input at each place."""
        return None

    def slopes(self) -> tuple[Tensor, ...] | None:
        """Return the factor of each element of each input, which broadcasts; None where elements
        mix.
        """
        return None

    @property
    def constant_terms(self) -> Tensor | None:
        """The size of what was added up to make the constant, where that is more than its absolute
        value: folding may cancel, and rounds by what cancelled.
        """
        return None

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The model's own tensors that the operation computes with as they are."""
        return ()

    def longest_sum(self, shapes: list[Shape]) -> int:
        """Return how many terms one result adds up at most, besides the constant."""
        return sum(torch.Size(shape).numel() for shape in shapes)

    @property
    def sums_first(self) -> bool:
        """May the execution add up more than the weights say, and divide afterwards (a mean)?"""
        return False

    @property
    def weighs_places(self) -> bool:
        """May a neighbour of weight 0 get a little, as weights are computed from places?"""
        return False

    @property
    def detour(self) -> tuple[Tensor, Tensor] | None:
        """Of an operation that is executed in several steps: the largest product of its factors,
        each at least 1, and the size of what is taken off before.
        """
        return None

    @property
    def executed_as_written(self) -> bool:
        """A sum of products, in whatever order."""
        return True

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """As a matrix, found by asking about unit vectors."""
        return matrix_entry(self.value, shapes, shape)

    def to(self, dtype: torch.dtype) -> Affine:
        """Return the operation with its constants in another dtype."""
        return self


class Windowed(Affine):
    """An affine operation on images that sees a window of its input at each place: convolution."""

    if TYPE_CHECKING:

        @property
        def stride(self) -> tuple[int, ...]:
            """Input pixels from one output place to the next, for each axis."""

        @property
        def padding(self) -> tuple[int, ...]:
            """Pixels of zeros before the input, for each axis."""

    @abstractmethod
    def window(self, size: int, axis: int) -> int:
        """Return how many input pixels `size` neighbouring output places see along an axis."""

    @abstractmethod
    def window_adjoint(self, a: Tensor) -> Tensor:
        """Return W^T a for windows (M, C', h, w): (M, C, window(h, 0), window(w, 1)), padding
        included.
        """


class Elementwise(Op):
    """A scalar function applied to every element."""

    elementwise: ClassVar[bool] = True

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return f(x)."""

    @abstractmethod
    def range(self, lower: Tensor, upper: Tensor) -> Ends:
        """Return the smallest and largest value on [lower, upper], rounded outward."""

    @abstractmethod
    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return lines that sandwich f on [lower, upper], rounded outward; sound for every alpha in
        [0, 1], by default the tightest guess.
        """

    @property
    def straight(self) -> bool:
        """Are all lines straight functions of alpha? Then those at 0 and 1 say all."""
        return False

    def guess(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Return the alpha taken where none is given; None where that is no simple function of the
        ends.
        """
        return None

    def slid(self, lower: Tensor, upper: Tensor) -> Slid | None:
        """Return what `relax` gives at any alpha, for a search, where that is faster than asking
        it; nothing in it is proved or leaves room for rounding.
        """
        return None

    def parallel(self, lower: Tensor, upper: Tensor) -> Lines:
        """Return lines of one slope, or as near to it as alpha brings them."""
        half = torch.full_like(lower, 0.5)
        if not self.straight:
            return self.relax(lower, upper, half)
        first, last = (self.relax(lower, upper, torch.full_like(lower, a)) for a in (0.0, 1.0))
        rise = last.lower_slope - first.lower_slope
        missing = first.upper_slope - first.lower_slope
        alpha = missing / torch.where(rise == 0, torch.ones_like(rise), rise)
        return self.relax(lower, upper, torch.where(rise == 0, half, alpha).clamp(0, 1))

    def interval(self, x: Ends) -> Ends:
        """The function's range."""
        return self.range(*x)

    def relaxation(self, x: Ends, alpha: Tensor | None = None) -> Lines:
        """The function's lines."""
        return self.relax(*x, alpha)

    def carries(self, shapes: list[Shape], shape: Shape) -> bool:
        """What is bent is bounded no worse by its range over the bounds of what goes in: no line
        below it rises above its least value.
        """
        return True

    @property
    def executed_as_written(self) -> bool:
        """To a few units in the last place."""
        return True

    @property
    def jump(self) -> float:
        """By how much the function falls at its last inflection."""
        return 0.0

    @property
    def gate(self) -> float:
        """Where a product was seen to be this function, how many times the argument its other
        factor is, which is executed too.
        """
        return 0.0

    @property
    def parameters(self) -> tuple[float, ...]:
        """The numbers that the function is made with."""
        return ()


class Slid(NamedTuple):
    """The lines over an interval as a function of alpha, and the alpha at which they touch nearest
    to its middle.
    """

    lines: Callable[[Tensor], Lines]
    start: Tensor


def is_affine(op: Op) -> TypeIs[Affine]:
    """Is the operation affine?"""
    return op.affine


def is_elementwise(op: Op) -> TypeIs[Elementwise]:
    """Is the operation a function of one number, applied to every element?"""
    return op.elementwise


_AT_ONCE = 2**24  # bytes of unit vectors


def matrix_entry(value: Callable[..., Tensor], shapes: list[Shape], shape: Shape) -> Entry:
    """Return an affine function as entries of a matrix, found by asking about unit vectors."""
    zeros = [torch.zeros(1, *s, dtype=torch.float64) for s in shapes]
    constant = value(*zeros)
    held = dict[str, Tensor]()
    for k, each in enumerate(shapes):
        size = torch.Size(each).numel()
        count = max(1, _AT_ONCE // (8 * max(size, constant.numel())))
        parts = []
        for begin in range(0, size, count):
            end = min(size, begin + count)
            unit = torch.zeros(end - begin, size, dtype=torch.float64)
            unit[torch.arange(end - begin), torch.arange(begin, end)] = 1
            inputs = [
                unit.view(-1, *each) if i == k else zero.expand(end - begin, *zero.shape[1:])
                for i, zero in enumerate(zeros)
            ]
            change = (value(*inputs) - constant).flatten(1)
            point, row = change.nonzero(as_tuple=True)
            parts.append((row, point + begin, change[point, row]))
        held |= {
            f"{name}{k}": torch.cat(list(column))
            for name, column in zip(
                ("row", "column", "value"), zip(*parts, strict=True), strict=True
            )
        }
    return Entry({"op": "matrix"}, {**held, "bias": constant.view(shape)})


def diagonal_entry(*factors: Tensor, bias: Tensor | None = None) -> Entry:
    """Return the sum of inputs times factors of their own shape, plus a bias."""
    held = dict[str, Tensor]()
    for k, factor in enumerate(factors):
        places = torch.arange(factor.numel())
        held |= {f"row{k}": places, f"column{k}": places, f"value{k}": factor.reshape(-1)}
    return Entry({"op": "matrix"}, held if bias is None else {**held, "bias": bias})


def function_entry(name: str, *parameters: float) -> Entry:
    """Return a function of one number by the name that a checker knows."""
    return Entry({"op": "function", "function": name, "parameters": list(parameters)}, {})
