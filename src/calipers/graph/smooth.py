"""Between which two lines does a smooth function lie? One engine for all: the slope is a choice,
the intercept a proof.

An entry states a function, its derivative, and the places where its curvature changes sign; between
those it is convex or concave. A line below of slope m has for its intercept the least f(x) - m x
over the interval. On a concave piece that is attained at an end of the piece. On a convex piece f
lies above each of its tangents: above the one at the touching point, and above the one at the left
end of a bracket around the place where f' = m. So whatever slope is taken the line is sound, and
the search for good slopes needs no trust: alpha slides the touching point from the first place
whose tangent clears the interval's left end to the last whose tangent clears the right one (tanh
and sigmoid thus: Zhang et al. 2018, arXiv:1811.00866). Where there is no such place, or the
function is concave, the slope is the chord's. A line above is one below the negative, turned over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.graph.kinds import Elementwise, Entry, Shape, Slid, function_entry
from calipers.graph.parameters import require
from calipers.graph.relaxations import Lines

# after a few halvings a function is nearly straight in its bracket, and a secant doubles the digits
_HALVINGS, _CROSSINGS = 6, 12
# of the largest term, taken off every intercept: the functions err by less than 8 units in the last
# place, and so do their derivatives
_ULPS = 32
_RANGE_ULPS = 8
# those that a proof file calls by their name
_NAMED = frozenset(
    "tanh sigmoid erf atan gelu silu mish hardswish exp expm1 log log1p sin cos".split()
) | {
    "gelu by tanh",
    "log sigmoid",
}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}

Function = Callable[[Tensor], Tensor]


class Piece(NamedTuple):
    """A part [begin, end] of every interval on which the function keeps to one curvature; of no
    width where the interval has no share in it.

    `convex`: of all intervals alike, or of each its own.
    """

    begin: Tensor
    end: Tensor
    convex: Tensor | bool

    def turned(self) -> Piece:
        """Return the same piece of the negative."""
        return self._replace(
            convex=not self.convex if isinstance(self.convex, bool) else ~self.convex
        )


def _everywhere(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.ones_like(lower, dtype=torch.bool)


@dataclass(frozen=True)
class Smooth(Elementwise):
    """A function of one number, smooth but for kinks at its inflections.

    `inflections` in order, the curvature alternating from `convex` on the far left (a straight
    piece passes as either); `turns` are its minima and maxima; `defined(lower, upper)` says over
    which intervals it has a value; outside `curved` it is a straight line. `rough`: where the value
    is small it errs by units in the last place of the argument (or of 1), not of the value. `jump`:
    by how much the function falls at its last inflection. `gate`: where a product was seen to be
    this curve, how many times the argument its other factor is, which is executed too.
    `parameters`: the numbers that the function is made with.
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
        """Its name."""
        return self.name

    def value(self, x: Tensor) -> Tensor:
        """f(x), as the model does it."""
        return self.run(x)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Extremes are at the ends or the turns; pushed out by the function's own error. Infinite
        where the function is not defined.
        """
        least, most = self._extremes(lower, upper)
        known, fall = self.defined(lower, upper), self._fall(lower, upper)
        return torch.where(known, least - fall, -torch.inf), torch.where(
            known, most + fall, torch.inf
        )

    def _fall(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the jump where the interval holds it; on which side its place itself lies is left
        open.
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

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Everywhere but on a point and where the function is straight."""
        return (upper > lower) & (upper > self.curved[0]) & (lower < self.curved[1])

    def pieces(self, lower: Tensor, upper: Tensor) -> list[Piece]:
        """Return the interval cut at the inflections."""
        places = [lower, *(self._within(place, lower, upper) for place in self.inflections), upper]
        return [
            Piece(a, b, self.convex == (k % 2 == 0)) for k, (a, b) in enumerate(pairwise(places))
        ]

    def slid(self, lower: Tensor, upper: Tensor) -> Slid:
        """Return what `relax` gives at any alpha, for a search: touching points are looked for
        once, and nothing is proved or leaves room for rounding.
        """
        pieces = self.pieces(lower, upper)
        below, low_start = _sliding(self.run, self.derivative, pieces, lower, upper)
        above, high_start = _sliding(
            lambda x: -self.run(x),
            lambda x: -self.derivative(x),
            [p.turned() for p in pieces],
            lower,
            upper,
        )
        least, most = self.range(lower, upper)
        known = self.defined(lower, upper)

        def lines(alpha: Tensor) -> Lines:
            (low, low_at), (high, high_at) = below(alpha), above(1 - alpha)
            return Lines(
                *_or_else(known, low, low_at, least), *_or_else(known, -high, -high_at, most)
            )

        # A half says that nothing slides on that side: then the other side decides.
        return Slid(
            lines,
            torch.where(
                low_start == 0.5,
                1 - high_start,
                torch.where(high_start == 0.5, low_start, (low_start + 1 - high_start) / 2),
            ),
        )

    def relax(self, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
        """See the module; alpha is None: the tangent that is highest in the middle of the interval.
        Lines that bound nothing where f is not defined.
        """
        pieces = self.pieces(lower, upper)
        # over an inflection the lower line touches best at the end of its range, the upper one at
        # the beginning
        above = None if alpha is None else 1 - alpha
        low, low_at = _under(self.run, self.derivative, pieces, lower, upper, alpha, self.rough)
        high, high_at = _under(
            lambda x: -self.run(x),
            lambda x: -self.derivative(x),
            [p.turned() for p in pieces],
            lower,
            upper,
            above,
            self.rough,
        )
        least, most = self.range(lower, upper)
        known, fall = self.defined(lower, upper), self._fall(lower, upper)
        low, low_at = _or_else(known, low, low_at - fall, least)
        high, high_at = _or_else(known, -high, -high_at + fall, most)
        return Lines(low, low_at, high, high_at)

    def described(self, shapes: list[Shape], shape: Shape) -> Entry | None:
        """By its name, which holds its parameters after the first words."""
        words = self.name.split()
        if words[0] in ("power", "softplus", "elu"):
            return function_entry(words[0], *map(float, words[1:]))
        if self.name in _POWERS:
            return function_entry("power", _POWERS[self.name])
        return function_entry(self.name) if self.name in _NAMED else None


def _sliding(
    f: Function, slope_of: Function, pieces: list[Piece], lower: Tensor, upper: Tensor
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    """Return alpha -> slope and intercept of a line that ought to lie below f, and the alpha
    nearest to the middle; 1/2 where nothing slides.
    """
    with torch.no_grad():
        middle = lower + (upper - lower) / 2
        first, last, touches = _touching(f, slope_of, pieces, lower, upper, middle)
        chord = _chord(f, slope_of, lower, upper, middle)
        chord_at = torch.minimum(f(lower) - chord * lower, f(upper) - chord * upper)
        slides = touches & (last > first)
        start = torch.where(
            slides, ((middle - first) / torch.where(slides, last - first, 1)).clamp(0, 1), 0.5
        )

    def line(alpha: Tensor) -> tuple[Tensor, Tensor]:
        at = first + alpha * (last - first)
        slope = torch.where(touches, slope_of(at), chord)
        return slope, torch.where(touches, f(at) - slope * at, chord_at)

    return line, start


def _chord(f: Function, slope_of: Function, lower: Tensor, upper: Tensor, middle: Tensor) -> Tensor:
    width = upper - lower
    # The rounding of two near values would leave nothing of a chord's slope.
    wide = width > math.sqrt(torch.finfo(lower.dtype).eps) * torch.maximum(lower.abs(), upper.abs())
    return torch.where(wide, (f(upper) - f(lower)) / torch.where(wide, width, 1), slope_of(middle))


def _or_else(known: Tensor, slope: Tensor, at: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the line, or the level where the line is not finite or its function not defined."""
    good = known & slope.isfinite() & at.isfinite()
    return torch.where(good, slope, torch.zeros_like(slope)), torch.where(good, at, level)


def _under(
    f: Function,
    slope_of: Function,
    pieces: list[Piece],
    lower: Tensor,
    upper: Tensor,
    alpha: Tensor | None,
    rough: bool,
) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of a line below f on [lower, upper]."""
    middle = lower + (upper - lower) / 2
    with torch.no_grad():
        first, last, touches = _touching(f, slope_of, pieces, lower, upper, middle)
        chord = _chord(f, slope_of, lower, upper, middle)
    at = (
        torch.minimum(torch.maximum(middle, first), last)
        if alpha is None
        else first + alpha * (last - first)
    )
    slope = torch.where(touches, slope_of(at), chord)
    reach = torch.maximum(lower.abs(), upper.abs())
    return slope, _intercept(
        f, slope_of, pieces, torch.where(touches, at, middle), slope, (slope.abs() + rough) * reach
    )


def _touching(
    f: Function,
    slope_of: Function,
    pieces: list[Piece],
    lower: Tensor,
    upper: Tensor,
    middle: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first and the last place of a convex piece whose tangents clear both ends of the
    interval, and whether there is one.

    On a convex piece the tangent's value at the left end falls as its place moves right, and at the
    right end it rises. Of several pieces the one whose places are nearest to the middle is taken.
    """
    if len(pieces) == 1:
        return lower, upper, torch.ones_like(lower, dtype=torch.bool) & pieces[0].convex
    f_lower, f_upper = f(lower), f(upper)

    def room(x: Tensor, end: Tensor, value: Tensor) -> Tensor:
        """How far does the tangent at x pass below the function at an end?"""
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
    """Return two neighbouring places between which the value, seen from `out`, ceases to be
    negative: twice `out` itself where it is not negative there.

    By halving, then by secants whose older end counts for half when it stays twice (the Illinois
    rule); where no secant crosses in between, by halving again.
    """
    kept, at_kept, last, at_last = inside, value(inside), out, value(out)
    good = at_last >= 0
    kept, at_kept = torch.where(good, last, kept), torch.where(good, at_last, at_kept)
    for k in range(_HALVINGS + _CROSSINGS):
        place = kept + (last - kept) / 2
        if k >= _HALVINGS:
            crossing = last - (last - kept) * (at_last / (at_last - at_kept))
            # a NaN is nowhere
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


def _intercept(
    f: Function, slope_of: Function, pieces: list[Piece], at: Tensor, slope: Tensor, size: Tensor
) -> Tensor:
    """Return a lower bound of f(x) - slope * x over the pieces: a proof, whatever the slope and
    wherever `at`. Beside the values of f, terms of that size were added up.
    """
    info = torch.finfo(slope.dtype)

    def gap(x: Tensor) -> Tensor:
        y = f(x)
        return y - slope * x - _ULPS * info.eps * (size + y.abs()) - info.tiny

    least = torch.full_like(slope, torch.inf)
    for begin, end, convex in pieces:
        ends = torch.minimum(gap(begin), gap(end))
        least = torch.minimum(least, ends)
        if convex is False:
            continue
        place = torch.minimum(torch.maximum(at, begin), end)
        tilt = slope_of(place) - slope
        fall = torch.minimum(tilt * (begin - place), tilt * (end - place))
        below = gap(place) + torch.where(
            tilt == 0, torch.zeros_like(fall), fall * (1 + _ULPS * info.eps)
        )
        if len(pieces) > 1:
            below = torch.fmax(below, _bracketed(gap, slope_of, begin, end, slope))
        least = torch.minimum(
            least, below if convex is True else torch.where(convex, below, torch.inf)
        )
    return least


def _bracketed(
    gap: Function, slope_of: Function, begin: Tensor, end: Tensor, slope: Tensor
) -> Tensor:
    """Bound the gap on convex pieces by its tangent at the left end of a small bracket around the
    place where it is least.
    """
    with torch.no_grad():
        right, left = _edge(lambda x: slope - slope_of(x), end, begin)
    tilt = slope_of(left) - slope
    return gap(left) + (tilt * (right - left) * (1 + _ULPS * torch.finfo(slope.dtype).eps)).clamp(
        max=0
    )


@dataclass(frozen=True)
class Wave(Smooth):
    """sin(x + shift): its inflections and turns stand wherever the interval does. Beyond `_FAR`, or
    over more than a period, it lies between -1 and 1.
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
        """Does the interval come within rounding of a place of that phase?"""
        room = 8 * torch.finfo(lower.dtype).eps * _FAR / (2 * math.pi)
        turns = [(end + (self.shift - phase)) / (2 * math.pi) for end in (lower, upper)]
        return torch.floor(turns[1] + room) >= torch.ceil(turns[0] - room)

    def pieces(self, lower: Tensor, upper: Tensor) -> list[Piece]:
        """Half waves; an interval of less than a period has a share in four at most."""
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
        """As any smooth function, where the interval is short."""
        return self._tamed(super().relax(lower, upper, alpha), lower, upper)

    def slid(self, lower: Tensor, upper: Tensor) -> Slid:
        """As any smooth function, where the interval is short."""
        free = super().slid(lower, upper)
        return Slid(lambda alpha: self._tamed(free.lines(alpha), lower, upper), free.start)

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
