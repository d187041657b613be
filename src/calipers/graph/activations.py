"""Bounds of piecewise linear activations by two lines.

Every line is sound for every alpha in [0, 1] *and* in floating point: slopes are taken as computed,
intercepts are derived from them and moved outward by more than the rounding of their derivation.
`alpha=None` takes the usual choice (for ReLU the adaptive slope of CROWN, Zhang et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calipers.graph.kinds import Elementwise, Entry, Shape, function_entry
from calipers.graph.parameters import argument, require, require_numbers
from calipers.graph.relaxations import Lines
from calipers.graph.smooth_table import CURVES

_EXACT_SLOPES = {-1.0, 0.0, 1.0}


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _outward(lines: Lines, lower: Tensor, upper: Tensor, size: Tensor, where: Tensor) -> Lines:
    """Move both intercepts outward by 16 roundings of their largest term.

    This is done only where the function is not linear on the interval (elsewhere the lines are
    exact).
    """
    reach = torch.maximum(lower.abs(), upper.abs())
    steepest = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs())
    room = (
        16 * _eps(lower) * ((1 + steepest) * reach + size) + torch.finfo(lower.dtype).tiny
    ) * where
    return Lines(
        lines.lower_slope,
        lines.lower_intercept - room,
        lines.upper_slope,
        lines.upper_intercept + room,
    )


@dataclass(frozen=True)
class TwoPieces(Elementwise):
    """left * x below 0, right * x above: ReLU, leaky ReLU, absolute value.

    The slopes (left, right) are (0, 1) for relu, (a, 1) for leaky_relu, and (-1, 1) for abs. alpha
    moves the slope of the line through the breakpoint from left to right.
    """

    left: float
    right: float
    linear_in_alpha: bool = field(default=True, repr=False)
    """The lines depend on alpha linearly: those at 0 and 1 determine all."""
    breakpoints: tuple[float, ...] = field(default=(0.0,), repr=False)
    """Breakpoints, where branching splits: the function is linear between."""

    @property
    def parameters(self) -> tuple[float, ...]:
        """Return both slopes."""
        return (self.left, self.right)

    @property
    def executed_exactly(self) -> bool:
        """Return whether both slopes are 0 or +-1."""
        return {self.left, self.right} <= _EXACT_SLOPES

    def __post_init__(self) -> None:
        require_numbers("a function of two linear pieces", left=self.left, right=self.right)

    def value(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        return torch.where(x > 0, self.right * x, self.left * x)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extremes, which are at the ends or the breakpoint."""
        ends = self.value(lower), self.value(upper)
        inside = (lower < 0) & (upper > 0)
        smallest, largest = torch.minimum(*ends), torch.maximum(*ends)
        return torch.where(inside, smallest.clamp(max=0), smallest), torch.where(
            inside, largest.clamp(min=0), largest
        )

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return where the breakpoint lies inside the interval."""
        return (lower < 0) & (upper > 0)

    def guess(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the slope of the longer piece (Zhang et al. 2018), as alpha.

        It leaves the smaller area between the lines.
        """
        return (upper > -lower).to(lower.dtype)

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return a chord on one side, a line through the breakpoint on the other."""
        unstable = self.unstable(lower, upper)
        # `where` with two Python numbers would give float32
        stable_slope = torch.where(lower >= 0, torch.full_like(lower, self.right), self.left)
        alpha = self.guess(lower, upper) if alpha is None else alpha
        width = torch.where(unstable, upper - lower, torch.ones_like(lower))
        chord = (self.right * upper - self.left * lower) / width
        tangent = self.left + (self.right - self.left) * alpha
        # The chord must clear every corner of the function, whatever its computed slope: both ends,
        # and, on the sound side, the breakpoint.
        ends = torch.stack([self.left * lower - chord * lower, self.right * upper - chord * upper])
        zero = torch.zeros_like(lower)
        if self.left <= self.right:
            lines = Lines(
                torch.where(unstable, tangent, stable_slope),
                zero,
                torch.where(unstable, chord, stable_slope),
                torch.where(unstable, ends.amax(0), zero),
            )
        else:
            lines = Lines(
                torch.where(unstable, chord, stable_slope),
                torch.where(unstable, ends.amin(0), zero),
                torch.where(unstable, tangent, stable_slope),
                zero,
            )
        return self._rounded(lines, lower, upper, unstable)

    def _rounded(self, lines: Lines, lower: Tensor, upper: Tensor, unstable: Tensor) -> Lines:
        if self.left == 0 and self.right == 1:
            # The slope through the breakpoint is alpha itself and needs no allowance, so stable
            # neurons and those of slope 0 add nothing to the intercepts.
            room = (4 * _eps(lower) * upper.clamp(min=0) + torch.finfo(lower.dtype).tiny) * unstable
            return lines._replace(upper_intercept=lines.upper_intercept + room)
        return _outward(lines, lower, upper, torch.zeros_like(lower), unstable)

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of both slopes."""
        return function_entry("two pieces", self.left, self.right)


@dataclass(frozen=True)
class Clip(Elementwise):
    """min(max(x, low), high): clip, hardtanh, relu6.

    alpha selects the slopes of both lines that are free to choose.

    With low above high the function is the constant `high`, in torch, NumPy and ONNX alike. Then
    `low` is set to `high`, since all lines assume corners in order.
    """

    low: float
    high: float
    linear_in_alpha: bool = field(default=True, repr=False)
    """As for `TwoPieces`."""

    def __post_init__(self) -> None:
        require(
            self.low < math.inf and self.high > -math.inf,
            "a clip",
            "a finite value between the ends",
            low=self.low,
            high=self.high,
        )
        object.__setattr__(self, "low", min(self.low, self.high))

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Return both corners."""
        return (self.low, self.high)

    def value(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        return x.clamp(self.low, self.high)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values at the ends, as the function is increasing."""
        return self.value(lower), self.value(upper)

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return where a corner lies inside the interval.

        Nowhere for a constant.
        """
        return (
            ((lower < self.low) & (upper > self.low)) | ((lower < self.high) & (upper > self.high))
        ) & (self.low < self.high)

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return a line below and a line above the function.

        Below: a line through the corner (low, low), or the chord where only the upper corner is
        inside. Above: mirrored.
        """
        unstable = self.unstable(lower, upper)
        flat = (
            (upper <= self.low)
            | (lower >= self.high)
            | torch.full_like(unstable, self.low == self.high)
        )
        f_lower, f_upper = self.value(lower), self.value(upper)
        one = torch.ones_like(lower)
        chord = (f_upper - f_lower) / torch.where(unstable, upper - lower, one)
        rise = (f_upper - self.low) / torch.where(upper > self.low, upper - self.low, one)
        fall = (self.high - f_lower) / torch.where(lower < self.high, self.high - lower, one)
        under = (upper - self.low > self.low - lower).to(lower.dtype) if alpha is None else alpha
        over = (self.high - lower > upper - self.high).to(lower.dtype) if alpha is None else alpha
        # Slopes are reduced a little so that the computed line through one corner cannot cut off
        # the other.
        shave = 1 - 4 * _eps(lower)
        low_slope = torch.where(lower < self.low, under * rise * shave, chord)
        high_slope = torch.where(upper > self.high, over * fall * shave, chord)
        low_at = torch.where(
            lower < self.low,
            self.low - low_slope * self.low,
            torch.minimum(f_lower - chord * lower, f_upper - chord * upper),
        )
        high_at = torch.where(
            upper > self.high,
            self.high - high_slope * self.high,
            torch.maximum(f_lower - chord * lower, f_upper - chord * upper),
        )
        slope = (~flat).to(lower.dtype)
        corners = sum(abs(c) for c in (self.low, self.high) if math.isfinite(c))
        constant = torch.where(flat, f_lower, torch.zeros_like(lower))
        picked = (
            torch.where(unstable, a, b)
            for a, b in zip(
                (low_slope, low_at, high_slope, high_at),
                (slope, constant, slope, constant),
                strict=True,
            )
        )
        return _outward(Lines(*picked), lower, upper, torch.full_like(lower, corners), unstable)

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of both corners."""
        return function_entry("clip", self.low, self.high)


def _clip(args: tuple[Any, ...]) -> Elementwise:
    low, high = argument(args, 1, -math.inf), argument(args, 2, math.inf)
    return TwoPieces(0.0, 1.0) if (low, high) == (0.0, math.inf) else Clip(low, high)


ACTIVATIONS: dict[str, Callable[[tuple[Any, ...]], Elementwise | None]] = {
    "aten.relu.default": lambda args: TwoPieces(0.0, 1.0),
    "aten.leaky_relu.default": lambda args: TwoPieces(argument(args, 1, 0.01), 1.0),
    "aten.abs.default": lambda args: TwoPieces(-1.0, 1.0),
    "aten.hardtanh.default": lambda args: Clip(argument(args, 1, -1.0), argument(args, 2, 1.0)),
    "aten.relu6.default": lambda args: Clip(0.0, 6.0),
    "aten.clamp.default": _clip,
    "aten.clip.default": _clip,
    "aten.clamp_min.default": _clip,
    "aten.clamp_max.default": lambda args: Clip(-math.inf, argument(args, 1, math.inf)),
    **CURVES,
}
"""Builders by exported name, from the call's arguments.

A builder returns None where the arguments ask for something that is not known here.
"""
