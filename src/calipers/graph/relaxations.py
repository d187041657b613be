"""Relaxations: lower and upper bounds of an operation over a box.

There are lines, planes of two variables, and planes of a maximum over windows. Every relaxation
knows how backward bound propagation takes coefficients through it, how large the terms are that it
adds up (for the rounding allowance), and which value it takes at a point. A new kind of bound is
therefore one class, and the propagation code need not change. All tensors hold one row per problem.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor

from calipers.conv_gradient import contract

Ends = tuple[Tensor, Tensor]
"""The lower and the upper ends of a box, (N, *shape) each."""


class Relaxation(ABC):
    """Lower and upper bounds of an operation, as a tuple of tensors (N, ...)."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same relaxation with a function applied to every tensor."""
        made: Callable[..., Self] = type(self)
        return made(*(change(t) for t in cast("Iterable[Tensor]", self)))

    def take(self, rows: Tensor | slice) -> Self:
        """Return the relaxation of the chosen rows."""
        return self.each(lambda t: t[rows])

    def to(self, dtype: torch.dtype) -> Self:
        """Return the relaxation in another dtype; indices and flags are kept."""
        return self.each(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def lines(self) -> tuple[Lines, ...] | None:
        """Return a pair of lines per input that sum to the relaxation, or None.

        The sum is taken element by element. None where an output depends on several elements of an
        input.
        """
        return None

    @abstractmethod
    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return input coefficients and offset of a lower bound of <a, value>.

        For a (P, S, *out) the coefficients are (P, S, *shape) for each input and the offset is (P,
        S). The operation's lower bound is used where a is positive, its upper bound elsewhere.
        """

    @abstractmethod
    def size(self, *magnitudes: Tensor) -> Tensor:
        """Return the total magnitude of the terms `backward` adds up, (N, *out).

        The rounding error is a share of it. `magnitudes` are the largest absolute values of every
        input.
        """

    @abstractmethod
    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """Return the relaxation's value (P, *out) at given inputs.

        The coefficients a (P, *out) choose the side: lower bound where positive, upper bound
        elsewhere.
        """


class _Lines(NamedTuple):
    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


class Lines(_Lines, Relaxation):
    """Two lines below and above a function on an interval.

    Each is slope * x + intercept; the four tensors have the shape of the input.
    """

    __slots__ = ()

    def lines(self) -> tuple[Lines, ...]:
        """Return these lines."""
        return (self,)

    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Take coefficients through the lines.

        Where the two lines are equal (stable neurons) they act as one factor; only the columns
        where they differ are treated by sign.
        """
        low, low_at, high, high_at = (line.flatten(1) for line in self)
        differ = (low != high) | (low_at != high_at)
        # read the values back once per operation, not once per row
        width = int(differ.sum(1).max())
        if width * 4 > differ.shape[1]:
            shape = (-1, 1, *a.shape[2:])
            start = low_at.view(shape) if bool(low_at.any()) else None
            back, offset = by_sign(
                a,
                low.view(shape),
                (high - low).view(shape),
                start,
                (high_at - low_at).view(shape),
            )
            return (back,), offset
        columns = differ.to(torch.uint8).topk(width, dim=1).indices
        flat = a.flatten(2)
        wide = columns[:, None].expand(-1, flat.shape[1], -1)
        low_slope, rise, low_end, gap = (
            t.gather(1, columns)[:, None] for t in (low, high - low, low_at, high_at - low_at)
        )
        scaled, offset = by_sign(flat.gather(2, wide), low_slope, rise, low_end, gap)
        if bool(low_at.any()):
            constant = torch.where(differ, torch.zeros_like(low_at), low_at)
            picked = torch.zeros_like(columns, dtype=torch.bool).logical_or(
                differ.gather(1, columns)
            )
            offset = (
                offset
                - (flat.gather(2, wide) @ (low_at.gather(1, columns) * ~picked)[..., None])[..., 0]
                + (flat @ constant[..., None])[..., 0]
            )
        return ((flat * high[:, None]).scatter_(2, wide, scaled).view(a.shape),), offset

    def size(self, *magnitudes: Tensor) -> Tensor:
        """Return the magnitude of the lower line plus that of the rise.

        That is |slope||x| + |intercept| of the lower line and of the rise from it to the upper
        line.
        """
        low, low_at, high, high_at = self
        return (
            (low.abs() + (high - low).abs()) * magnitudes[0]
            + low_at.abs()
            + (high_at - low_at).abs()
        )

    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """Return the lower line where a is positive, the upper one elsewhere."""
        low, low_at, high, high_at = self
        return torch.where(a > 0, low * inputs[0] + low_at, high * inputs[0] + high_at)


class _Planes(NamedTuple):
    pick: Tensor
    exact: Tensor
    ceiling: Tensor


class Planes(_Planes, Relaxation):
    """Lower and upper planes of a maximum over some elements.

    Each plane is one input element or a constant. `pick (M, *out)` is the flat index of the input
    element that bounds the output from below. Where `exact`, that element bounds it from above too;
    elsewhere `ceiling` does.
    """

    __slots__ = ()

    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Add coefficients to the picked elements; ceilings go to the offset."""
        pick, exact, ceiling = (t.flatten(1)[:, None] for t in self)
        flat = a.flatten(2)
        constant = flat.clamp(max=0) * ~exact
        back = a.new_zeros(*a.shape[:2], torch.Size(shapes[0]).numel())
        back.scatter_add_(-1, pick.expand_as(flat), flat - constant)
        return (back.view(*a.shape[:2], *shapes[0]),), (constant * ceiling).sum(-1)

    def size(self, *magnitudes: Tensor) -> Tensor:
        """Return the larger magnitude of the picked element and the ceiling."""
        picked = magnitudes[0].flatten(1).gather(1, self.pick.flatten(1)).view_as(self.ceiling)
        return torch.maximum(picked, self.ceiling.abs())

    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """Return the picked element, or the ceiling."""
        picked = inputs[0].flatten(1).gather(1, self.pick.flatten(1)).view_as(a)
        return torch.where(self.exact | (a > 0), picked, self.ceiling)


class _Saddle(NamedTuple):
    lower_x: Tensor
    lower_y: Tensor
    lower_intercept: Tensor
    upper_x: Tensor
    upper_y: Tensor
    upper_intercept: Tensor


class Saddle(_Saddle, Relaxation):
    """Two planes below and above a function of two numbers over a box.

    Each side has slopes for x and y and an intercept, all of the function's shape (M, *shape).
    """

    __slots__ = ()

    def lines(self) -> tuple[Lines, ...]:
        """Return the planes as lines in x and in y; x has the intercepts."""
        zero = torch.zeros_like(self.lower_x)
        return Lines(self.lower_x, self.lower_intercept, self.upper_x, self.upper_intercept), Lines(
            self.lower_y, zero, self.upper_y, zero
        )

    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Take coefficients through the lines in x and in y."""
        each = [lines.backward(a, shapes[:1]) for lines in self.lines()]
        return tuple(back for (back,), _ in each), each[0][1] + each[1][1]

    def size(self, *magnitudes: Tensor) -> Tensor:
        """Return the sum of the sizes of the lines in x and in y."""
        first, second = (
            lines.size(most) for lines, most in zip(self.lines(), magnitudes, strict=True)
        )
        return first + second

    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """Return the lower plane where a is positive, the upper one elsewhere."""
        x, y, intercept = self.side(a)
        return x * inputs[0] + y * inputs[1] + intercept

    def side(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return slopes and intercept of the planes chosen by the signs of a.

        `a` is (M, *shape): the lower plane where positive, the upper one elsewhere.
        """
        x, y, intercept = (
            torch.where(a > 0, low, high) for low, high in zip(self[:3], self[3:], strict=True)
        )
        return x, y, intercept


def by_sign(
    a: Tensor, low: Tensor, rise: Tensor, low_at: Tensor | None, gap: Tensor
) -> tuple[Tensor, Tensor]:
    """Return coefficients and offset behind a lower and an upper line.

    The lower line is (low, low_at), the upper one (low + rise, low_at + gap). `low_at` is None
    where all its elements are 0, as for a ReLU.
    """
    negative = a.clamp(max=0)
    # A+ low + A- high = A low + A- (high - low): one pass fewer over the coefficients than
    # splitting into both signs.
    offset = contract(negative.flatten(2), gap.flatten(1))
    if low_at is not None:
        offset = offset + contract(a.flatten(2), low_at.flatten(1))
    return (a * low).addcmul_(negative, rise), offset


class Parametrised(ABC):
    """A relaxation with free parameters alpha, one direction per row.

    `a` (P, *out) are the coefficients of the operation's output, `alpha` (P, n) the parameters.
    """

    @abstractmethod
    def start(self) -> Tensor | None:
        """Return the initial alpha, (P, n), or None where there is none."""

    @abstractmethod
    def backward(
        self, a: Tensor, alpha: Tensor | None, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the inputs' coefficients, (P, ...) each, and the offset (P,)."""

    @abstractmethod
    def at(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Return the value at the inputs of the planes chosen by the signs of a."""

    @abstractmethod
    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Return the gradient of the bound with respect to alpha, (P, n)."""


class Fixed(Parametrised):
    """A relaxation without free parameters."""

    def __init__(self, relaxation: Relaxation) -> None:
        self.relaxation = relaxation

    def start(self) -> Tensor | None:
        """Return None."""
        return None

    def backward(
        self, a: Tensor, alpha: Tensor | None, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Take one direction per row through the relaxation."""
        backs, offset = self.relaxation.backward(a[:, None], shapes)
        return tuple(back[:, 0] for back in backs), offset[:, 0]

    def at(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Return the relaxation's value."""
        return self.relaxation.at(a, *inputs)

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Return None."""
        return None


class Tilt(Parametrised):
    """Planes of two numbers interpolated between a first and a last pair.

    alpha is the weight of the last pair, element by element.
    """

    def __init__(self, first: Saddle, last: Saddle) -> None:
        self.first, self.rise = first, Saddle(*(b - a for a, b in zip(first, last, strict=True)))

    def start(self) -> Tensor | None:
        """Return 0.5 everywhere: the mean of both pairs."""
        return torch.full_like(self.rise[0], 0.5).flatten(1)

    def _side(self, a: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert alpha is not None
        weight = alpha.view_as(self.rise[0])
        return Saddle(
            *(torch.addcmul(t, r, weight) for t, r in zip(self.first, self.rise, strict=True))
        ).side(a)

    def backward(
        self, a: Tensor, alpha: Tensor | None, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Take coefficients through the interpolated planes, element by element."""
        x, y, intercept = self._side(a, alpha)
        return (a * x, a * y), (a * intercept).flatten(1).sum(1)

    def at(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Return the value of the interpolated planes, element by element."""
        x, y, intercept = self._side(a, alpha)
        return x * inputs[0] + y * inputs[1] + intercept

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Return a times the difference of the last and the first planes."""
        return (a * self.rise.at(a, *inputs)).flatten(1)
