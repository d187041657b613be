"""What bounds an operation from below and above over a box, and how does a sweep pass through it?
Lines, planes of two numbers, and the winners of windows.

Every relaxation knows how coefficients go back through it, of what size are the terms that it adds
up, and which value it takes; so a new kind of bound is one class, and no sweep has to know it. All
tensors hold one row a problem.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor

from calipers.adjoint import contract

Ends = tuple[Tensor, Tensor]
"""The lower and the upper ends of a box, (N, *shape) each."""


class Relaxation(ABC):
    """A lower and an upper bound of an operation over boxes, as a tuple of tensors (N, ...)."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same relaxation with every tensor changed."""
        made: Callable[..., Self] = type(self)
        return made(*(change(t) for t in cast("Iterable[Tensor]", self)))

    def take(self, rows: Tensor | slice) -> Self:
        """Return the relaxation of the chosen rows."""
        return self.each(lambda t: t[rows])

    def to(self, dtype: torch.dtype) -> Self:
        """Return the relaxation in another dtype; indices and flags stay."""
        return self.each(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def lines(self) -> tuple[Lines, ...] | None:
        """Return a pair of lines for each input that add up to the relaxation, element by element;
        None where elements mix.
        """
        return None

    @abstractmethod
    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the coefficients of the inputs (P, S, *shape), and the offset (P, S), of a lower
        bound of <a, value> for a (P, S, *out): lower bounds where positive, upper ones elsewhere.
        """

    @abstractmethod
    def size(self, *magnitudes: Tensor) -> Tensor:
        """Return what rounding is a share of, (N, *out): the absolute terms that `backward` adds
        up, given the largest absolute value of every input.
        """

    @abstractmethod
    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """Return the value (P, *out) at the inputs of what coefficients a (P, *out) take."""


class _Lines(NamedTuple):
    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


class Lines(_Lines, Relaxation):
    """Two lines that sandwich a function on an interval: slope * x + intercept, each of the input's
    shape.
    """

    __slots__ = ()

    def lines(self) -> tuple[Lines, ...]:
        """These."""
        return (self,)

    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """On a straight piece both lines are one factor; only the columns where lines differ are
        looked at by sign.
        """
        low, low_at, high, high_at = (line.flatten(1) for line in self)
        differ = (low != high) | (low_at != high_at)
        # one look at the values for each operation, not for each row
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
        bent, offset = by_sign(flat.gather(2, wide), low_slope, rise, low_end, gap)
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
        return ((flat * high[:, None]).scatter_(2, wide, bent).view(a.shape),), offset

    def size(self, *magnitudes: Tensor) -> Tensor:
        """|slope||x| + |intercept|, of the lower line and of the rise to the upper one."""
        low, low_at, high, high_at = self
        return (
            (low.abs() + (high - low).abs()) * magnitudes[0]
            + low_at.abs()
            + (high_at - low_at).abs()
        )

    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """The lower line where a is positive, the upper one elsewhere."""
        low, low_at, high, high_at = self
        return torch.where(a > 0, low * inputs[0] + low_at, high * inputs[0] + high_at)


class _Planes(NamedTuple):
    pick: Tensor
    exact: Tensor
    ceiling: Tensor


class Planes(_Planes, Relaxation):
    """A lower and an upper plane of the largest of some elements: each output is one input element,
    or a constant.

    `pick (M, *out)` is the flat index of the input element that bounds the output from below. Where
    `exact`, that element bounds it from above too; elsewhere `ceiling` does.
    """

    __slots__ = ()

    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """To the winners."""
        pick, exact, ceiling = (t.flatten(1)[:, None] for t in self)
        flat = a.flatten(2)
        constant = flat.clamp(max=0) * ~exact
        back = a.new_zeros(*a.shape[:2], torch.Size(shapes[0]).numel())
        back.scatter_add_(-1, pick.expand_as(flat), flat - constant)
        return (back.view(*a.shape[:2], *shapes[0]),), (constant * ceiling).sum(-1)

    def size(self, *magnitudes: Tensor) -> Tensor:
        """The element, or the ceiling."""
        picked = magnitudes[0].flatten(1).gather(1, self.pick.flatten(1)).view_as(self.ceiling)
        return torch.maximum(picked, self.ceiling.abs())

    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """The element, or the ceiling."""
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
    """Two planes that sandwich a function of two numbers over a box: each side's slopes for x and y
    and its intercept, all of the function's shape (M, *shape).
    """

    __slots__ = ()

    def lines(self) -> tuple[Lines, ...]:
        """Return the planes' share in each number as lines, the intercepts with the first."""
        zero = torch.zeros_like(self.lower_x)
        return Lines(self.lower_x, self.lower_intercept, self.upper_x, self.upper_intercept), Lines(
            self.lower_y, zero, self.upper_y, zero
        )

    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Through the lines of each number."""
        each = [lines.backward(a, shapes[:1]) for lines in self.lines()]
        return tuple(back for (back,), _ in each), each[0][1] + each[1][1]

    def size(self, *magnitudes: Tensor) -> Tensor:
        """Of both numbers' lines."""
        first, second = (
            lines.size(most) for lines, most in zip(self.lines(), magnitudes, strict=True)
        )
        return first + second

    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """The lower plane where a is positive, the upper one elsewhere."""
        x, y, intercept = self.side(a)
        return x * inputs[0] + y * inputs[1] + intercept

    def side(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return slopes and intercept of the planes that coefficients a (M, *shape) take."""
        x, y, intercept = (
            torch.where(a > 0, low, high) for low, high in zip(self[:3], self[3:], strict=True)
        )
        return x, y, intercept


def by_sign(
    a: Tensor, low: Tensor, rise: Tensor, low_at: Tensor | None, gap: Tensor
) -> tuple[Tensor, Tensor]:
    """Return coefficients and offset behind lower lines (low, low_at) and upper lines (low + rise,
    low_at + gap); no `low_at` where all are 0, as those of a ReLU.
    """
    negative = a.clamp(max=0)
    # A+ low + A- high = A low + A- (high - low): one pass less over the coefficients than splitting
    # both signs.
    offset = contract(negative.flatten(2), gap.flatten(1))
    if low_at is not None:
        offset = offset + contract(a.flatten(2), low_at.flatten(1))
    return (a * low).addcmul_(negative, rise), offset


class Parametrised(ABC):
    """An operation between planes that may be chosen, one direction a row: a (P, *out) are the
    coefficients of what it makes, alpha (P, n) the choice.
    """

    @abstractmethod
    def start(self) -> Tensor | None:
        """Return where the choice begins, (P, n); None where there is none."""

    @abstractmethod
    def backward(
        self, a: Tensor, alpha: Tensor | None, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the coefficients of its inputs, (P, ...) each, and the offset (P,)."""

    @abstractmethod
    def at(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Return the planes that the coefficients take, at the inputs."""

    @abstractmethod
    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Return d bound / d alpha, (P, n)."""


class Fixed(Parametrised):
    """A relaxation with nothing to choose."""

    def __init__(self, relaxation: Relaxation) -> None:
        self.relaxation = relaxation

    def start(self) -> Tensor | None:
        """Nothing."""
        return None

    def backward(
        self, a: Tensor, alpha: Tensor | None, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """As in a sweep of one direction a row."""
        backs, offset = self.relaxation.backward(a[:, None], shapes)
        return tuple(back[:, 0] for back in backs), offset[:, 0]

    def at(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """The relaxation's own."""
        return self.relaxation.at(a, *inputs)

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Nothing."""
        return None


class Tilt(Parametrised):
    """Planes of two numbers between a first and a last pair: alpha weighs the last, element by
    element.
    """

    def __init__(self, first: Saddle, last: Saddle) -> None:
        self.first, self.rise = first, Saddle(*(b - a for a, b in zip(first, last, strict=True)))

    def start(self) -> Tensor | None:
        """The mean of both planes."""
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
        """Element by element."""
        x, y, intercept = self._side(a, alpha)
        return (a * x, a * y), (a * intercept).flatten(1).sum(1)

    def at(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Element by element."""
        x, y, intercept = self._side(a, alpha)
        return x * inputs[0] + y * inputs[1] + intercept

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """The rise from the first planes to the last, weighed."""
        return (a * self.rise.at(a, *inputs)).flatten(1)
