"""Lines below and above a smooth function, sound for any slope.

A function's entry states the function, its derivative, and the places where its curvature changes
sign; between those it is convex or concave. The slope of a line may be chosen freely, and its
intercept is proven: for a line below of slope m it is the least f(x) - m x over the interval. On a
concave piece the least value is attained at an end of the piece. On a convex piece f lies above
each of its tangents: above the one at the touching point, and above the one at the left end of a
bracket around the place where f' = m. So the line is sound whatever slope is taken, and the search
for good slopes need not be trusted.

alpha moves the touching point from the first place whose tangent passes below f at the interval's
left end to the last whose tangent passes below f at the right end (for tanh and sigmoid as in Zhang
et al. 2018, arXiv:1811.00866). Where there is no such place, or the function is concave, the slope
is that of the chord. A line above f is the negative of a line below -f.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.graph.kinds import Elementwise, Entry, ParametrisedLines, Shape, function_entry
from calipers.graph.parameters import require
from calipers.graph.relaxations import Lines

# after a few halvings a function is nearly linear in its bracket, and a secant doubles the digits
_HALVINGS, _CROSSINGS = 6, 12
# units in the last place of the largest term, taken off every intercept: the functions err by less
# than 8 units in the last place, and so do their derivatives
_ULPS = 32
_RANGE_ULPS = 8
# the functions that a proof file refers to by name
_NAMED = frozenset(
    "tanh sigmoid erf atan gelu silu mish hardswish exp expm1 log log1p sin cos".split()
) | {
    "gelu by tanh",
    "log sigmoid",
}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}

Function = Callable[[Tensor], Tensor]


class Piece(NamedTuple):
    """A part [begin, end] of every interval where f is convex or concave.

    Its width is 0 where the interval does not reach that part. `convex` is one value for all
    intervals, or one for each.
    """

    begin: Tensor
    end: Tensor
    convex: Tensor | bool

    def turned(self) -> Piece:
        """Return the same piece of the negative function."""
        return self._replace(
            convex=not self.convex if isinstance(self.convex, bool) else ~self.convex
        )


class _Curve(NamedTuple):
    """A function over intervals, of which lines below are sought.

    `value` and `slope` are f and its derivative; `pieces` cut the intervals [lower, upper].
    """

    value: Function
    slope: Function
    pieces: list[Piece]
    lower: Tensor
    upper: Tensor

    def turned(self) -> _Curve:
        """Return the negative function: a line below it is one above this."""
        return self._replace(
            value=lambda x: -self.value(x),
            slope=lambda x: -self.slope(x),
            pieces=[p.turned() for p in self.pieces],
        )

    def middle(self) -> Tensor:
        """Return the middles of the intervals."""
        return self.lower + (self.upper - self.lower) / 2


def _everywhere(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.ones_like(lower, dtype=torch.bool)


@dataclass(frozen=True)
class Smooth(Elementwise):
    """A function of one number, smooth except for breakpoints at inflections.

    `inflections` are in order, and the curvature alternates from `convex` on the far left (a linear
    piece counts as either); `turns` are its minima and maxima; `defined(lower, upper)` says over
    which intervals it has a value; outside `curved` it is linear. `rough`: where the value is small
    its error is in units in the last place of the argument (or of 1), not of the value. `jump`: by
    how much the function falls at its last inflection. `gate`: where a product was recognised as
    this curve, how many times the argument the product's other factor is; that factor is executed
    too. `parameters`: the numbers that define the function.
    """

    name: str
    run: Function = field(repr=False)
    derivative: Function = field(repr=False)
    convex: bool
    inflections: tuple[float, ...] = ()
    turns: tuple[float, ...] = ()
    defined: Callable[[Tensor, Tensor], Tensor] = field(default=_everywhere, repr=False)
    curved: tuple[float, float] = (-math.inf, math.inf)
    rough: bool = True
    jump: float = 0.0
    gate: float = 0.0
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(
            not any(math.isnan(p) for p in (*self.inflections, *self.turns, self.jump)),
            self.name,
            "a number for every parameter",
            jump=self.jump,
        )

    @property
    def label(self) -> str:
        """Return the name of the function."""
        return self.name

    def value(self, x: Tensor) -> Tensor:
        """Return f(x), as the model computes it."""
        return self.run(x)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extremes over the interval, rounded outward.

        They are attained at its ends or at the turns, and are moved outward by the function's own
        error. Infinite where the function is not defined.
        """
        least, most = self._extremes(lower, upper)
        known, fall = self.defined(lower, upper), self._fall(lower, upper)
        return torch.where(known, least - fall, -torch.inf), torch.where(
            known, most + fall, torch.inf
        )

    def _fall(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the jump where the interval contains it, 0 elsewhere.

        Intervals that come within rounding of the jump count, so it does not matter to which side
        its place belongs.
        """
        if not self.jump:
            return torch.zeros_like(lower)
        place = self.inflections[-1]
        near = 8 * torch.finfo(lower.dtype).eps * abs(place)
        return torch.where(
            (lower <= place + near) & (upper >= place - near), self.jump, torch.zeros_like(lower)
        )

    def _extremes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        places = [lower, upper, *(self._within(turn, lower, upper) for turn in self.turns)]
        ends = [self._widened(self.run(x), x) for x in places]
        return torch.stack([low for low, _ in ends]).amin(0), torch.stack(
            [high for _, high in ends]
        ).amax(0)

    def _widened(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        info = torch.finfo(y.dtype)
        room = (
            _RANGE_ULPS * info.eps * (y.abs() + (x.abs().clamp(max=1) if self.rough else 0))
            + info.tiny
        )
        return y - room, y + room

    @staticmethod
    def _within(place: float, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(torch.full_like(lower, place), lower), upper)

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return where the interval is no point and the function not linear."""
        return (upper > lower) & (upper > self.curved[0]) & (lower < self.curved[1])

    def pieces(self, lower: Tensor, upper: Tensor) -> list[Piece]:
        """Return the interval cut at the inflections."""
        places = [lower, *(self._within(place, lower, upper) for place in self.inflections), upper]
        return [
            Piece(a, b, self.convex == (k % 2 == 0)) for k, (a, b) in enumerate(pairwise(places))
        ]

    def _curve(self, lower: Tensor, upper: Tensor) -> _Curve:
        return _Curve(self.run, self.derivative, self.pieces(lower, upper), lower, upper)

    def alpha_lines(self, lower: Tensor, upper: Tensor) -> ParametrisedLines:
        """Return the lines of `relax` as a function of alpha, for a search.

        Touching points are searched once. Nothing in the result is proven or leaves room for
        rounding.
        """
        curve = self._curve(lower, upper)
        below, low_start = _tangents(curve)
        above, high_start = _tangents(curve.turned())
        least, most = self.range(lower, upper)
        known = self.defined(lower, upper)

        def lines(alpha: Tensor) -> Lines:
            (low, low_at), (high, high_at) = below(alpha), above(1 - alpha)
            return Lines(
                *_or_else(known, low, low_at, least), *_or_else(known, -high, -high_at, most)
            )

        # A start of 1/2 means that alpha changes nothing on that side: the other side decides.
        return ParametrisedLines(
            lines,
            torch.where(
                low_start == 0.5,
                1 - high_start,
                torch.where(high_start == 0.5, low_start, (low_start + 1 - high_start) / 2),
            ),
        )

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return lines below and above f; the module says how they are found.

        Without alpha it takes the tangents that are nearest to f in the middle of the interval.
        Where f is not defined the lines bound nothing.
        """
        curve = self._curve(lower, upper)
        # over an inflection the lower line is best with its touching point at the end of its range,
        # the upper one at the beginning
        above = None if alpha is None else 1 - alpha
        low, low_at = _under(curve, alpha, self.rough)
        high, high_at = _under(curve.turned(), above, self.rough)
        least, most = self.range(lower, upper)
        known, fall = self.defined(lower, upper), self._fall(lower, upper)
        low, low_at = _or_else(known, low, low_at - fall, least)
        high, high_at = _or_else(known, -high, -high_at + fall, most)
        return Lines(low, low_at, high, high_at)

    def described(self, shapes: list[Shape], shape: Shape) -> Entry | None:
        """Return the entry of its name, or None.

        The name holds the parameters after the first word.
        """
        words = self.name.split()
        if words[0] in ("power", "softplus", "elu"):
            return function_entry(words[0], *map(float, words[1:]))
        if self.name in _POWERS:
            return function_entry("power", _POWERS[self.name])
        return function_entry(self.name) if self.name in _NAMED else None


def _tangents(
    curve: _Curve,
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    """Return alpha -> (slope, intercept) of a line meant to lie below f.

    Also the alpha whose touching point is nearest to the middle; 1/2 where there is no choice.
    """
    f, slope_of, _, lower, upper = curve
    with torch.no_grad():
        middle = curve.middle()
        first, last, touches = _touching(curve, middle)
        chord = _chord(curve, middle)
        chord_at = torch.minimum(f(lower) - chord * lower, f(upper) - chord * upper)
        free = touches & (last > first)
        start = torch.where(
            free, ((middle - first) / torch.where(free, last - first, 1)).clamp(0, 1), 0.5
        )

    def line(alpha: Tensor) -> tuple[Tensor, Tensor]:
        at = first + alpha * (last - first)
        slope = torch.where(touches, slope_of(at), chord)
        return slope, torch.where(touches, f(at) - slope * at, chord_at)

    return line, start


def _chord(curve: _Curve, middle: Tensor) -> Tensor:
    f, slope_of, _, lower, upper = curve
    width = upper - lower
    # Cancellation between two near values would make a chord's slope meaningless.
    wide = width > math.sqrt(torch.finfo(lower.dtype).eps) * torch.maximum(lower.abs(), upper.abs())
    return torch.where(wide, (f(upper) - f(lower)) / torch.where(wide, width, 1), slope_of(middle))


def _or_else(known: Tensor, slope: Tensor, at: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the line, or the constant `level` where the line is unusable.

    That is where the line is not finite or the function not defined.
    """
    good = known & slope.isfinite() & at.isfinite()
    return torch.where(good, slope, torch.zeros_like(slope)), torch.where(good, at, level)


def _under(curve: _Curve, alpha: Tensor | None, rough: bool) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of a line below f on [lower, upper]."""
    middle = curve.middle()
    with torch.no_grad():
        first, last, touches = _touching(curve, middle)
        chord = _chord(curve, middle)
    at = (
        torch.minimum(torch.maximum(middle, first), last)
        if alpha is None
        else first + alpha * (last - first)
    )
    slope = torch.where(touches, curve.slope(at), chord)
    reach = torch.maximum(curve.lower.abs(), curve.upper.abs())
    return slope, _intercept(
        curve, torch.where(touches, at, middle), slope, (slope.abs() + rough) * reach
    )


def _touching(curve: _Curve, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the range of touching points whose tangents lie below both ends.

    These are the first and the last such place on a convex piece, and whether there is one. On a
    convex piece the tangent's value at the interval's left end falls as the touching point moves
    right, and its value at the right end rises. Of several pieces the one whose places are nearest
    to the middle is taken.
    """
    f, slope_of, pieces, lower, upper = curve
    if len(pieces) == 1:
        return lower, upper, torch.ones_like(lower, dtype=torch.bool) & pieces[0].convex
    f_lower, f_upper = f(lower), f(upper)

    def room(x: Tensor, end: Tensor, value: Tensor) -> Tensor:
        """Return how far the tangent at x passes below f at an end."""
        return value - (f(x) + slope_of(x) * (end - x))

    first, last, found = lower, upper, torch.zeros_like(lower, dtype=torch.bool)
    for begin, end, convex in pieces:
        if convex is False:
            continue
        _, start = _edge(lambda x: room(x, lower, f_lower), begin, end)
        _, stop = _edge(lambda x: room(x, upper, f_upper), end, begin)
        here = (
            (end > begin)
            & (start <= stop)
            & (room(start, lower, f_lower) >= 0)
            & (room(stop, upper, f_upper) >= 0)
            & convex
        )
        nearer = here & (~found | (_distance(middle, start, stop) < _distance(middle, first, last)))
        first, last, found = (
            torch.where(nearer, start, first),
            torch.where(nearer, stop, last),
            found | here,
        )
    return first, last, found


def _distance(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(low - x, x - high).clamp(min=0)


def _edge(value: Function, out: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return two neighbouring places between which a value changes sign.

    Seen from `out`, the value is negative at the first place and not negative at the second; both
    are `out` itself where the value is not negative there.

    The search halves the interval, then uses secants, where the function value of an end kept twice
    is halved (the Illinois rule); where a secant's crossing is not in between, it halves again.
    """
    kept, at_kept, last, at_last = inside, value(inside), out, value(out)
    good = at_last >= 0
    kept, at_kept = torch.where(good, last, kept), torch.where(good, at_last, at_kept)
    for k in range(_HALVINGS + _CROSSINGS):
        place = kept + (last - kept) / 2
        if k >= _HALVINGS:
            crossing = last - (last - kept) * (at_last / (at_last - at_kept))
            # a NaN fails the comparison
            place = torch.where((crossing - kept) * (last - crossing) > 0, crossing, place)
        here = value(place)
        was, good = good, here >= 0
        turned = was != good
        kept, at_kept = (
            torch.where(turned, last, kept),
            torch.where(turned, at_last, at_kept / 2 if k >= _HALVINGS else at_kept),
        )
        last, at_last = place, here
    return torch.where(good, kept, last), torch.where(good, last, kept)


def _intercept(curve: _Curve, at: Tensor, slope: Tensor, size: Tensor) -> Tensor:
    """Return a proven lower bound of f(x) - slope * x over the pieces.

    It holds whatever the slope and wherever `at` lies. `size` is the magnitude of the terms that
    were added up besides the values of f, for the rounding allowance.
    """
    info, pieces = torch.finfo(slope.dtype), curve.pieces

    def gap(x: Tensor) -> Tensor:
        y = curve.value(x)
        return y - slope * x - _ULPS * info.eps * (size + y.abs()) - info.tiny

    least = torch.full_like(slope, torch.inf)
    for begin, end, convex in pieces:
        ends = torch.minimum(gap(begin), gap(end))
        least = torch.minimum(least, ends)
        if convex is False:
            continue
        place = torch.minimum(torch.maximum(at, begin), end)
        tilt = curve.slope(place) - slope
        fall = torch.minimum(tilt * (begin - place), tilt * (end - place))
        below = gap(place) + torch.where(
            tilt == 0, torch.zeros_like(fall), fall * (1 + _ULPS * info.eps)
        )
        if len(pieces) > 1:
            below = torch.fmax(below, _bracketed(gap, curve.slope, begin, end, slope))
        least = torch.minimum(
            least, below if convex is True else torch.where(convex, below, torch.inf)
        )
    return least


def _bracketed(
    gap: Function, slope_of: Function, begin: Tensor, end: Tensor, slope: Tensor
) -> Tensor:
    """Bound the gap on convex pieces from below by a tangent.

    It is the tangent at the left end of a small bracket around the place where the gap is least.
    """
    with torch.no_grad():
        right, left = _edge(lambda x: slope - slope_of(x), end, begin)
    tilt = slope_of(left) - slope
    return gap(left) + (tilt * (right - left) * (1 + _ULPS * torch.finfo(slope.dtype).eps)).clamp(
        max=0
    )


@dataclass(frozen=True)
class Wave(Smooth):
    """sin(x + shift), whose inflections and turns depend on the interval.

    Beyond `_FAR`, or over more than a period, it is only bounded by -1 and 1.
    """

    shift: float = 0.0

    def _tame(self, lower: Tensor, upper: Tensor) -> Tensor:
        return (torch.maximum(lower.abs(), upper.abs()) < _FAR) & (upper - lower < 2 * math.pi)

    def _extremes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        least, most = super()._extremes(lower, upper)
        tame = self._tame(lower, upper)
        holds = [self._near(lower, upper, turn) | ~tame for turn in (-math.pi / 2, math.pi / 2)]
        return torch.where(holds[0], -1.0, least), torch.where(holds[1], 1.0, most)

    def _near(self, lower: Tensor, upper: Tensor, phase: float) -> Tensor:
        """Return whether the interval contains a place of that phase.

        Places within rounding of the interval count.
        """
        room = 8 * torch.finfo(lower.dtype).eps * _FAR / (2 * math.pi)
        turns = [(end + (self.shift - phase)) / (2 * math.pi) for end in (lower, upper)]
        return torch.floor(turns[1] + room) >= torch.ceil(turns[0] - room)

    def pieces(self, lower: Tensor, upper: Tensor) -> list[Piece]:
        """Return the half waves; an interval below a period meets at most four."""
        half = torch.floor((lower + self.shift) / math.pi)
        places = [
            lower,
            *(
                torch.minimum(torch.maximum((half + k) * math.pi - self.shift, lower), upper)
                for k in (1, 2, 3)
            ),
            upper,
        ]
        return [
            Piece(a, b, (half + k).remainder(2) == 1) for k, (a, b) in enumerate(pairwise(places))
        ]

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """Return the lines of a smooth function where the interval is short."""
        return self._tamed(super().relax(lower, upper, alpha), lower, upper)

    def alpha_lines(self, lower: Tensor, upper: Tensor) -> ParametrisedLines:
        """Return the lines of a smooth function where the interval is short."""
        free = super().alpha_lines(lower, upper)
        return ParametrisedLines(
            lambda alpha: self._tamed(free.lines(alpha), lower, upper), free.start
        )

    def _tamed(self, lines: Lines, lower: Tensor, upper: Tensor) -> Lines:
        tame, zero, (least, most) = (
            self._tame(lower, upper),
            torch.zeros_like(lower),
            self.range(lower, upper),
        )
        return Lines(
            *(
                torch.where(tame, line, level)
                for line, level in zip(lines, (zero, least, zero, most), strict=True)
            )
        )


_FAR = 1e3
