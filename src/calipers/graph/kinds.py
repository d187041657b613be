"""The interface of an operation: the facts about it that bounds need.

An operation states what it computes, in which interval its values lie over a box, and which
relaxation bounds it from below and above over a box (`graph/relaxations.py`). Everything else has a
default that is true of any operation, so a new operation is a class in a file of its own and an
entry in a table of builders. Two kinds are distinguished: an affine operation is its own
relaxation; an elementwise function is bounded by two lines for each element, and branching may
split its input interval.
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
    """An operation in a proof file: its facts, ready for JSON, and its arrays."""

    facts: dict[str, Any]
    arrays: dict[str, Tensor]


class Op(ABC):
    """An operation on one or more inputs (M, *shape), batched over axis 0."""

    affine: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Return the name used for the operation in messages."""
        return type(self).__name__

    @abstractmethod
    def value(self, *inputs: Any, **options: Any) -> Tensor:
        """Return the result, (M, *out)."""

    @abstractmethod
    def interval(self, *ends: Any, **options: Any) -> Ends:
        """Return the smallest and the largest value over a box.

        The box is given by the ends (lower, upper) of each input. Both results are rounded outward.
        """

    @abstractmethod
    def relaxation(self, *ends: Any, **options: Any) -> Relaxation:
        """Return a relaxation of the operation over a box, rounded outward.

        `alpha` (M, *out) selects one of a family of relaxations; each alpha in [0, 1] is sound.
        Without it the relaxation that is expected to be tightest is returned.
        """

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return where tighter input bounds would help, bool (input shape).

        By default everywhere but where the interval is a single point.
        """
        return upper > lower

    def parametrised(self, held: Relaxation, *ends: Ends) -> Parametrised:
        """Return the relaxations over a box as a function of alpha.

        `held` is the relaxation without an alpha; by default it is the only one.
        """
        return Fixed(held)

    def chosen(self, held: Relaxation, alpha: Tensor, *ends: Ends) -> Relaxation:
        """Return the relaxation at an alpha found by a search.

        `held` is the relaxation without an alpha.
        """
        return self.relaxation(*ends, alpha=alpha)

    def carries(self, shapes: list[Shape], shape: Shape) -> bool:
        """Return whether it is enough to bound the operation's input instead.

        If so, the elements of its one input are bounded, and these bounds are propagated through
        the operation by interval arithmetic.
        """
        return False

    @property
    def diagonal(self) -> bool:
        """Return whether output elements correspond one to one to input elements.

        Each output element is then computed from the one input element in the same place, or in the
        same position of the flattened order.
        """
        return False

    @property
    def rounds(self) -> bool:
        """Return whether the operation computes anything, so that it can round."""
        return True

    @property
    def breakpoints(self) -> tuple[float, ...] | None:
        """Return the breakpoints of a piecewise linear function of one number.

        The function is linear between neighbouring breakpoints, and branching splits there. None
        where the function is not piecewise linear.
        """
        return None

    def members(self) -> Tensor | None:
        """Return the elements of which each output is the maximum, or None.

        These are flat indices (out, k) into the input, padded with the index one past its end. None
        for any operation that is not a maximum.
        """
        return None

    @property
    def executed_as_written(self) -> bool:
        """Return whether libraries execute exactly the operations of `value`.

        That is, with one rounding for each arithmetic operation in it.
        """
        return False

    @property
    def executed_exactly(self) -> bool:
        """Return whether the executed result equals the real one.

        Results below the normal floating-point numbers are excepted.
        """
        return False

    def described(self, shapes: list[Shape], shape: Shape) -> Entry | None:
        """Return the proof-file entry for inputs of these shapes, or None.

        None where the proof checker knows no such operation. `record/checker.py` says what each
        entry means.
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
        """Raise `TypeError`: `value` and `absolute` give the interval.

        The rounding of an affine operation depends on the number of its terms, so the code that
        knows the arithmetic adds the allowance.
        """
        raise TypeError(f"{self.label} is affine: its interval is made of `value` and `absolute`")

    def relaxation(self, *ends: Ends, alpha: Tensor | None = None) -> Relaxation:
        """Raise `TypeError`: an affine operation is its own relaxation."""
        raise TypeError(f"{self.label} is affine: its coefficients go back by its adjoint")

    def windowed(self) -> Windowed | None:
        """Return the operation if it reads a window at each place, or None."""
        return None

    def slopes(self) -> tuple[Tensor, ...] | None:
        """Return the factor of each element of each input, or None.

        The factors broadcast over the inputs. None where an output depends on several elements of
        an input.
        """
        return None

    @property
    def constant_terms(self) -> Tensor | None:
        """Return the total magnitude of the terms added up into the constant.

        It is given where it exceeds the absolute value of the constant: when constants are folded,
        terms may cancel, and the rounding error is proportional to what cancelled.
        """
        return None

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Return the model's own tensors that the operation uses unchanged."""
        return ()

    def longest_sum(self, shapes: list[Shape]) -> int:
        """Return the largest number of terms in one output, without the constant."""
        return sum(torch.Size(shape).numel() for shape in shapes)

    @property
    def sums_first(self) -> bool:
        """Return whether a sum may be executed first and divided afterwards.

        A mean may be executed that way; the intermediate sum is then larger than the weights say.
        """
        return False

    @property
    def weighs_places(self) -> bool:
        """Return whether interpolation weights are computed from positions.

        Rounding may then give a neighbour of weight 0 a small weight.
        """
        return False

    @property
    def detour(self) -> tuple[Tensor, Tensor] | None:
        """Return the magnitudes of an operation that executes in several steps.

        These are the largest product of its factors, each at least 1, and the size of what is
        subtracted before.
        """
        return None

    @property
    def executed_as_written(self) -> bool:
        """Return True: the operation is a sum of products, in whatever order."""
        return True

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the operation as a matrix, found by applying it to unit vectors."""
        return matrix_entry(self.value, shapes, shape)

    def to(self, dtype: torch.dtype) -> Affine:
        """Return the operation with its constants in another dtype."""
        return self


class Windowed(Affine):
    """An affine operation on images that reads a window at each place.

    Convolution is the example.
    """

    if TYPE_CHECKING:

        @property
        def stride(self) -> tuple[int, ...]:
            """Input pixels from one output place to the next, for each axis."""

        @property
        def padding(self) -> tuple[int, ...]:
            """Pixels of zeros before the input, for each axis."""

    @abstractmethod
    def window(self, size: int, axis: int) -> int:
        """Return how many input pixels `size` adjacent outputs see on an axis."""

    @abstractmethod
    def window_adjoint(self, a: Tensor) -> Tensor:
        """Return W^T a for windows of output places, padding included.

        `a` is (M, C', h, w), the result (M, C, window(h, 0), window(w, 1)).
        """


class Elementwise(Op):
    """A scalar function applied to every element."""

    elementwise: ClassVar[bool] = True

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return f(x)."""

    @abstractmethod
    def range(self, lower: Tensor, upper: Tensor) -> Ends:
        """Return the smallest and largest value on [lower, upper].

        Both are rounded outward.
        """

    @abstractmethod
    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return lines below and above f on [lower, upper], rounded outward.

        They are sound for every alpha in [0, 1]. Without alpha the lines that are expected to be
        tightest are returned.
        """

    @property
    def linear_in_alpha(self) -> bool:
        """Return whether the lines depend on alpha linearly.

        If so, the lines at alpha 0 and 1 determine those at every other alpha.
        """
        return False

    def guess(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Return the alpha used where none is given, or None.

        None where it is no simple function of the ends.
        """
        return None

    def alpha_lines(self, lower: Tensor, upper: Tensor) -> ParametrisedLines | None:
        """Return the lines as a function of alpha for a search, or None.

        Given where that is faster than calling `relax`. The lines are not proven sound and leave no
        room for rounding, so they serve the search only.
        """
        return None

    def parallel(self, lower: Tensor, upper: Tensor) -> Lines:
        """Return lines of equal slope, or the nearest to that alpha can reach."""
        half = torch.full_like(lower, 0.5)
        if not self.linear_in_alpha:
            return self.relax(lower, upper, half)
        first, last = (self.relax(lower, upper, torch.full_like(lower, a)) for a in (0.0, 1.0))
        rise = last.lower_slope - first.lower_slope
        missing = first.upper_slope - first.lower_slope
        alpha = missing / torch.where(rise == 0, torch.ones_like(rise), rise)
        return self.relax(lower, upper, torch.where(rise == 0, half, alpha).clamp(0, 1))

    def interval(self, x: Ends) -> Ends:
        """Return the range of the function."""
        return self.range(*x)

    def relaxation(self, x: Ends, alpha: Tensor | None = None) -> Lines:
        """Return the lines of the function."""
        return self.relax(*x, alpha)

    def carries(self, shapes: list[Shape], shape: Shape) -> bool:
        """Return True: the range over the input's bounds loses nothing.

        The least value of a line below the function is at most the least value of the function
        itself, so a relaxation would bound the output no better than the range over the bounds of
        the input.
        """
        return True

    @property
    def executed_as_written(self) -> bool:
        """Return True: libraries are accurate to a few units in the last place."""
        return True

    @property
    def jump(self) -> float:
        """Return by how much the function falls at its last inflection."""
        return 0.0

    @property
    def gate(self) -> float:
        """Return the factor that relates a recognised gate to its argument.

        Where a product x * g(x) was recognised as this function, the factor is how many times the
        argument the product's other factor is; that factor is executed too. 0 elsewhere.
        """
        return 0.0

    @property
    def parameters(self) -> tuple[float, ...]:
        """Return the numbers that define the function."""
        return ()


class ParametrisedLines(NamedTuple):
    """Lines over an interval as a function of alpha, and a starting alpha.

    `start` is the alpha at which the lines touch the function nearest to the middle of the
    interval.
    """

    lines: Callable[[Tensor], Lines]
    start: Tensor


def is_affine(op: Op) -> TypeIs[Affine]:
    """Return whether the operation is affine."""
    return op.affine


def is_elementwise(op: Op) -> TypeIs[Elementwise]:
    """Return whether the operation is a function applied to each element."""
    return op.elementwise


_AT_ONCE = 2**24  # bytes of unit vectors per batch


def matrix_entry(value: Callable[..., Tensor], shapes: list[Shape], shape: Shape) -> Entry:
    """Return an affine function as matrix entries, found from unit vectors."""
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
    """Return the entry of a sum of inputs times factors, plus a bias.

    Each factor has the shape of its input.
    """
    held = dict[str, Tensor]()
    for k, factor in enumerate(factors):
        places = torch.arange(factor.numel())
        held |= {f"row{k}": places, f"column{k}": places, f"value{k}": factor.reshape(-1)}
    return Entry({"op": "matrix"}, held if bias is None else {**held, "bias": bias})


def function_entry(name: str, *parameters: float) -> Entry:
    """Return a function of one number by the name the proof checker knows."""
    return Entry({"op": "function", "function": name, "parameters": list(parameters)}, {})
