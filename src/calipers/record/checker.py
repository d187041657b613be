"""Checker of proof files: `python checker.py proof.npz`.

It needs NumPy and the standard library only. A file states a claim: no input of a threat set around
the point `x` changes what a network, given as a list of operations, answers. Beside the claim the
file holds choices: slopes of relaxations, weights, multipliers, cuts (the splits of branch and
bound), parts of the threat set, and which elements to bound by backward propagation. Any choice is
sound, since this program derives from it whatever has to be true, from the network and the point,
and believes no bound of the file. It computes boxes (elementwise lower and upper bounds) of all
values by interval arithmetic; hyperplanes between which each nonlinear operation lies over its box;
and narrower boxes by backward bound propagation (a "sweep", as in CROWN: a lower bound of <a,
value> is carried back through one operation at a time to the input). Then it proves all leaves of
the branch and bound tree, and that they leave no gap.

Three hashes say what was proved. `model` names the network; `claim` names network, threat set,
point and goal together, that is every number that decides what is claimed. Both are computed here
from what is used, and printed; whoever knows the claim that was asked for compares it (`--claim`,
`--model`). The last 64 bytes of the file are the hash of all bytes before them: no bit of it can
change unnoticed.

Value number 0 is the input, value number k the result of operation k, each flattened. A pass looks
at the whole threat set, or at parts of it; every box then has one row for each part.

Bounds are computed in float64. A sum of n products errs by at most g(n) = nu / (1 - nu) times the
sum of their sizes, u = 2^-53, in any order of summation (Higham, Accuracy and Stability of
Numerical Algorithms, ch. 3). Coefficients that backward propagation has computed count as chosen,
so that the rounding of one operation costs g(n) <|A|, |W||x| + |b|>. Functions and hyperplanes are
taken to err by 2^-48 of their size. What is proved holds for the network in real arithmetic.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Box = tuple[Array, Array]
VERSION = 3
SEAL = 64  # bytes at the end of a file: the hash of those before
# what the hash of a claim covers: entries of the header, beginnings of the names of arrays
CLAIM = (
    ("guarantee", "network", "threat", "goal"),
    ("net.", "threat.", "x", "spec", "offsets", "cases"),
)
# unit roundoff; relative error of functions and hyperplanes; what underflow can lose
UNIT, ROOM, TINY = 2.0**-53, 2.0**-48, 1e-280
_OWN, _HELD = 64, 2**21  # roundings besides the long sums; coefficients held at once
# limits for any file: bytes unpacked, numbers of an operation, classes
_UNPACKED, _SIZE, _CLASSES = 2**28, 2**25, 2**13


class Rejected(Exception):
    """The file is damaged, or says what cannot be right."""


def demand(good: Any, message: str) -> None:
    """Raise `Rejected` with this message unless something holds."""
    if not good:
        raise Rejected(message)


def g(n: float) -> float:
    """Return the relative error bound of n roundings, nu / (1 - nu)."""
    return n * UNIT / (1 - n * UNIT)


def above(value: Any) -> Any:
    """Return the next larger float64 number."""
    return np.nextafter(value, np.inf)


def of(values: Array, part: Array) -> Array:
    """Return the row of `values` for each part; a single row serves all parts."""
    return values if values.shape[-2] == 1 else values[..., part, :]


def dot(a: Array, values: Array) -> Array:
    """Return <a, values> of each row."""
    return np.asarray(a @ values[0] if len(values) == 1 else (a * values).sum(1))


def gathered(a: Array, index: Array, size: int) -> Array:
    """Return (R, size): the columns of `a` (R, m) added up by their index."""
    order = np.argsort(index, kind="stable")
    keys, starts = np.unique(index[order], return_index=True)
    result = np.zeros((len(a), size))
    if len(keys):
        result[:, keys] = np.add.reduceat(a[:, order], starts, axis=1)
    return result


class Function(NamedTuple):
    """A function of one number, as the relaxations need it.

    `curvature` bounds |f''| on [a, b] between `breakpoints` (None: piecewise linear).
    `jump` is the size of a downward jump of the function, and the place where it jumps.
    """

    value: Callable[[Array], Array]
    curvature: Callable[[Array, Array], Any] | None
    breakpoints: tuple[float, ...] = ()
    jump: tuple[float, float] = (0.0, math.inf)

    def least(self, side: int, slope: Array, low: Array, high: Array) -> Array:
        """Return a lower bound of side * (f(t) - slope * t) on [low, high].

        It is the intercept (times `side`) of a line of that slope below f (side 1) or above f (side
        -1).

        Between breakpoints, on [a, b], the function is at least its smaller end value less max
        |f''| (b - a)^2 / 8. The interval is cut into 32 cells; the eight of least bound are cut
        into four, five times over. So little more than max |f''| (high - low)^2 2^-33 is lost.
        """

        def at(t: Array, m: Array) -> Any:
            y = self.value(t)
            return side * (y - m * t) - ROOM * (1 + np.abs(t) + np.abs(y) + np.abs(m * t))

        slope, *corners = np.broadcast_arrays(
            slope,
            low,
            high,
            *(
                np.clip(breakpoint, low, high)
                for breakpoint in self.breakpoints
                if math.isfinite(breakpoint)
            ),
        )
        if self.curvature is None:
            return np.asarray(np.min([at(t, slope) for t in corners], 0))
        result, step, shares = np.empty(slope.size), _HELD // 64, np.arange(32) / 32
        for i in range(0, slope.size, step):
            m, a, b, *breakpoints = (v.reshape(-1)[i : i + step, None] for v in (slope, *corners))
            edges, rest = (
                np.sort(np.concatenate([a + (b - a) * shares, b, *breakpoints], 1), 1)[:, None],
                np.full(len(m), np.inf),
            )
            for last in (False,) * 5 + (True,):
                y, a, b = at(edges, m[..., None]), edges[..., :-1], edges[..., 1:]
                bound = (
                    np.minimum(y[..., :-1], y[..., 1:])
                    - self.curvature(a, b) * (b - a) ** 2 / 8 * (1 + ROOM)
                    - self.jump[0] * (b >= self.jump[1] * (1 - ROOM))
                )
                bound = np.where(np.isnan(bound), -np.inf, bound).reshape(len(m), -1)
                if not last:
                    order = np.argpartition(bound, 8, axis=1)
                    rest = np.minimum(rest, np.take_along_axis(bound, order[:, 8:9], 1)[:, 0])
                    a, b = (
                        np.take_along_axis(v.reshape(bound.shape), order[:, :8], 1)[..., None]
                        for v in (a, b)
                    )
                    edges = np.concatenate([a + (b - a) * shares[::8], b], 2)
            result[i : i + step] = np.minimum(rest, bound.min(1))
        return result.reshape(slope.shape)

    def lines(self, low: Array, high: Array, slopes: list[Array | None]) -> list[Array]:
        """Return slope and intercept of a line below f, then of one above.

        The slopes are those given; where none is given, or it is not finite, that of the chord.
        """
        wide, lines = np.where(high > low, high - low, 1.0), list[Array]()
        chord = np.nan_to_num(
            (self.value(high) - self.value(low)) / wide, nan=0.0, posinf=0.0, neginf=0.0
        )
        for side, given in zip((1, -1), slopes, strict=True):
            m = chord if given is None else np.where(np.isfinite(given), given, chord)
            lines += [m[None], side * self.least(side, m, low, high)]
        return lines


def near(a: Array, b: Array) -> Array:
    """Return the least |t| on [a, b]."""
    return np.maximum(np.maximum(a, -b), 0.0)


def erf(t: Array) -> Array:
    """Return the error function of t, within 4e-16.

    Five terms of the Taylor series around the nearest multiple of 1/128; the sixth term is below 60
    / 256^6 / 720 < 4e-16.
    """
    t = np.clip(np.nan_to_num(t), -6.0, 6.0)
    k = np.rint(t * 128).astype(int)
    a, d = k / 128, t - k / 128
    rest = (2 * a**2 - 1) / 3 - d * (a * (2 * a**2 - 3) / 6 - d * (4 * a**4 - 12 * a**2 + 3) / 30)
    return np.asarray(
        _ERF[k] + 2 / math.sqrt(math.pi) * np.exp(-(a**2)) * d * (1 - d * (a - d * rest))
    )


# erf(k / 128) for k = -768 ... 768, where a negative k counts from the end of the array
_ERF = np.array([math.erf(k / 128) for k in [*range(769), *range(-768, 0)]])
_C = 2 / math.sqrt(2 * math.pi)
FUNCTIONS: dict[str, Callable[..., Function]] = {
    "two pieces": lambda left, right: Function(
        lambda t: left * np.minimum(t, 0) + right * np.maximum(t, 0), None, (0.0,)
    ),
    "clip": lambda low, high: Function(lambda t: np.clip(t, low, high), None, (low, high)),
    "tanh": lambda: Function(np.tanh, lambda a, b: np.minimum(0.77, 8 * np.exp(-2 * near(a, b)))),
    "sigmoid": lambda: Function(
        lambda t: 0.5 + 0.5 * np.tanh(t / 2), lambda a, b: np.minimum(0.0963, np.exp(-near(a, b)))
    ),
    "erf": lambda: Function(
        erf, lambda a, b: np.minimum(0.968, 1.37 * np.exp(-(near(a, b) ** 2) / 2))
    ),
    "atan": lambda: Function(np.arctan, lambda a, b: np.minimum(0.65, 2 / near(a, b) ** 3)),
    "gelu": lambda: Function(
        lambda t: t * (0.5 + 0.5 * erf(t / math.sqrt(2))),
        lambda a, b: 0.798 * np.exp(-(near(a, b) ** 2) / 4),
    ),
    "gelu by tanh": lambda: Function(
        lambda t: t * (0.5 + 0.5 * np.tanh(_C * (t + 0.044715 * t**3))),
        lambda a, b: 0.9 * np.exp(-(near(a, b) ** 2) / 4),
    ),
    "silu": lambda: Function(
        lambda t: t * (0.5 + 0.5 * np.tanh(t / 2)),
        lambda a, b: np.minimum(0.501, (2 + near(a, b)) * np.exp(-near(a, b))),
    ),
    "mish": lambda: Function(
        lambda t: t * np.tanh(np.logaddexp(0, t)),
        lambda a, b: np.minimum(0.65, (4 + 4 * near(a, b)) * np.exp(-near(a, b))),
    ),
    "log sigmoid": lambda: Function(
        lambda t: -np.logaddexp(0, -t), lambda a, b: np.minimum(0.2501, np.exp(-near(a, b)))
    ),
    "hardswish": lambda: Function(
        lambda t: t * np.clip(t + 3, 0, 6) / 6,
        lambda a, b: np.where((b <= -3) | (a >= 3), 0.0, 0.34),
        (-3.0, 3.0),
    ),
    "exp": lambda: Function(np.exp, lambda a, b: np.exp(b)),
    "expm1": lambda: Function(np.expm1, lambda a, b: np.exp(b)),
    "log": lambda: Function(np.log, lambda a, b: a**-2),
    "log1p": lambda: Function(np.log1p, lambda a, b: (1 + a) ** -2),
    "sin": lambda: Function(np.sin, lambda a, b: 1.0),
    "cos": lambda: Function(np.cos, lambda a, b: 1.0),
    "power": lambda p: Function(
        lambda t: t**p,
        lambda a, b: (
            abs(p * (p - 1)) * np.maximum(near(a, b) ** (p - 2), np.maximum(-a, b) ** (p - 2))
        ),
    ),
    "softplus": lambda beta, end: (
        Function(  # from beta t = end on it is t itself: there it jumps down by this much
            lambda t: np.logaddexp(0, beta * t) / beta,
            lambda a, b: beta * np.minimum(0.2501, np.exp(-beta * near(a, b))),
            (),
            (math.exp(-end) / beta, end / beta),
        )
    ),
    "elu": lambda alpha, scale, inner: Function(
        lambda t: scale * np.where(t > 0, t, alpha * np.expm1(inner * np.minimum(t, 0))),
        lambda a, b: scale * alpha * inner**2 * np.exp(inner * np.minimum(b, 0)) * (a < 0),
        (0.0,),
    ),
}


class Operation:
    """One operation of the list.

    An affine operation has `maps`: for each input a function x -> Wx, (B, n) -> (B, m), with W as
    it is or in absolute values, and a function a -> W^T a, (R, m) -> (R, n). Any other operation
    lies between hyperplanes; its `terms` tell, for each input, to which results a term of the
    hyperplane belongs and which element of the input it multiplies (None: term, result and element
    have the same number).
    """

    def __init__(
        self, facts: dict[str, Any], arrays: dict[str, Array], shapes: list[tuple[int, ...]]
    ) -> None:
        self.kind, self.inputs, self.shape = (
            str(facts["op"]),
            [int(i) for i in facts["inputs"]],
            tuple(int(n) for n in facts["shape"]),
        )
        demand(
            self.inputs and all(0 <= i < len(shapes) for i in self.inputs),
            f"an operation ({self.kind}) reads numbers that come after it",
        )
        demand(
            0 < math.prod(self.shape) <= _SIZE and min(self.shape, default=1) > 0,
            f"an operation ({self.kind}) of no size, or of more than {_SIZE} numbers",
        )
        self.facts, self.size, self.came, self.terms = (
            facts,
            math.prod(self.shape),
            [shapes[i] for i in self.inputs],
            list[tuple[Array, Array] | None]([None]),
        )
        self.wide, self.affine = (
            [math.prod(shape) for shape in self.came],
            self.kind in ("linear", "convolution", "matrix"),
        )
        ends = {
            "left": self.wide[0],
            "right": self.wide[-1],
            "into": self.size,
            "windows": self.wide[0] + (self.kind == "largest"),
        }
        ends |= {
            name: n
            for k, wide in enumerate(self.wide)
            for name, n in ((f"row{k}", self.size), (f"column{k}", wide))
        }
        self.held = h = {
            name: np.asarray(v, np.int64 if name in ends else np.float64)
            for name, v in arrays.items()
        }
        good = all(
            ((v >= 0) & (v < ends[name])).all() if name in ends else np.isfinite(v).all()
            for name, v in h.items()
        )
        good &= self.kind == "matrix" or len(self.inputs) == 1 + (self.kind == "product")
        entries = (
            [("left", "right", "into")]
            if self.kind == "product"
            else [(f"row{k}", f"column{k}", f"value{k}") for k in range(len(self.inputs))]
        )
        good &= self.kind not in ("product", "matrix") or all(
            h[a].ndim == 1 and h[a].shape == h[b].shape == h[c].shape for a, b, c in entries
        )
        if self.affine:
            self.maps = [getattr(self, f"_{self.kind}")(k) for k in range(len(self.inputs))]
        elif self.kind == "function":
            self.function, good = (
                FUNCTIONS[facts["function"]](*facts["parameters"]),
                good and self.wide[0] == self.size,
            )
            good &= all(p >= 0 for p in facts["parameters"]) or facts["function"] in (
                "power",
                "two pieces",
                "clip",
            )
        elif self.kind == "product":
            self.terms = [(h["into"], h["left"]), (h["into"], h["right"])]
        else:
            good &= (
                self.kind in ("largest", "logsumexp")
                and h["windows"].ndim == 2
                and len(h["windows"]) == self.size
                and facts.get("share", 1) > 0
            )
            self.terms = [
                (np.repeat(np.arange(self.size), h["windows"].shape[1]), h["windows"].reshape(-1))
            ]
        demand(
            good,
            f"an operation ({self.kind}) is not known, or its shapes or numbers do not fit "
            "together",
        )
        b = h.get("bias", np.zeros(1))
        self.constant = np.asarray(
            np.broadcast_to(
                b.reshape(-1, *[1] * (len(self.shape) - 1)) if self.kind == "convolution" else b,
                self.shape,
            ).reshape(-1)
        )
        self.long = self.size + max(
            [self.size, *self.wide, *(len(term[0]) for term in self.terms if term)]
        )

    def _linear(self, k: int) -> Any:
        """Return the maps of a layer with weights (out, in) at the last axis."""
        w = self.held["weight"]
        demand(
            w.shape == (self.shape[-1], self.came[0][-1]) and self.shape[:-1] == self.came[0][:-1],
            "weights that do not fit",
        )

        def forward(x: Array, weigh: Callable[[Array], Array]) -> Array:
            rows: Array = x.reshape(len(x), -1, w.shape[1]) @ weigh(w).T
            return rows.reshape(len(x), -1)

        return forward, lambda a: (a.reshape(len(a), -1, len(w)) @ w).reshape(len(a), -1)

    def _convolution(self, k: int) -> Any:
        """Return the maps of a convolution with weights (out, in/groups, *kernel).

        Each position of the kernel has weights (groups, m, c), and meets elements (groups, c,
        places).
        """
        w, groups, wide, taps = (
            self.held["weight"],
            int(self.facts["groups"]),
            self.wide[0],
            list[tuple[Array, Array]](),
        )
        # the padding has the number `wide`, one past the last element
        index = np.pad(
            np.arange(wide).reshape(self.came[0]),
            [(0, 0), *((p, p) for p in self.facts["padding"])],
            constant_values=wide,
        )
        for tap in np.ndindex(*w.shape[2:]):
            spans = zip(
                tap, self.facts["stride"], self.facts["dilation"], self.shape[1:], strict=True
            )
            met = index[
                (slice(None), *(slice(t * d, t * d + (n - 1) * s + 1, s) for t, s, d, n in spans))
            ]
            weight = w[(slice(None), slice(None), *tap)].reshape(
                groups, self.shape[0] // groups, -1
            )
            taps.append((weight, met.reshape(groups, weight.shape[2], math.prod(self.shape[1:]))))

        def forward(x: Array, weigh: Any) -> Array:
            around = np.vstack([x.T, np.zeros(len(x))])
            return np.asarray(
                sum(weigh(weight) @ around[met].reshape(*met.shape[:2], -1) for weight, met in taps)
                .reshape(self.size, -1)
                .T
            )

        def back(a: Array) -> Array:
            result, rows = np.zeros((wide + 1, len(a))), np.ascontiguousarray(a.T)
            for weight, met in taps:  # within one tap all indices differ, so += is safe
                result[met.reshape(-1)] += (
                    weight.transpose(0, 2, 1) @ rows.reshape(*weight.shape[:2], -1)
                ).reshape(-1, len(a))
            return result[:-1].T

        return forward, back

    def _matrix(self, k: int) -> Any:
        """Return the maps of a sparse matrix, given by row, column and value."""
        row, column, value = (self.held[f"{name}{k}"] for name in ("row", "column", "value"))
        return lambda x, weigh: gathered(
            x[:, column] * weigh(value), row, self.size
        ), lambda a: gathered(a[:, row] * value, column, self.wide[k])

    def planes(
        self, boxes: list[Box], given: list[Array | None], flat: bool = False
    ) -> list[Array]:
        """Return hyperplanes below the operation, then hyperplanes above it.

        Each has slopes (inputs, parts, terms) and intercepts (parts, size). `given`: chosen slopes
        of lines, or for products weights of the second hyperplane of each pair. With `flat` all
        slopes are 0, which makes the intercepts the range of the operation over its box.
        """
        if self.kind == "function":
            return self.function.lines(
                *boxes[0], [np.zeros_like(boxes[0][0])] * 2 if flat else given
            )
        if self.kind == "product":
            return self._product(boxes, given, flat)
        lows, highs = (
            np.concatenate([end, np.full((len(end), 1), -np.inf)], 1)[:, self.held["windows"]]
            for end in boxes[0]
        )
        low, low_at, high, high_at = (self._largest if self.kind == "largest" else self._logsumexp)(
            lows, highs, flat
        )
        return [low.reshape(1, len(low), -1), low_at, high.reshape(1, len(low), -1), high_at]

    def _product(self, boxes: list[Box], given: list[Array | None], flat: bool) -> list[Array]:
        """Return hyperplanes of sums of products x y.

        For x in [l_x, h_x] and y in [l_y, h_y], x y lies above hyperplanes of slopes (l_y, l_x) and
        (h_y, h_x), and below those of slopes (h_y, l_x) and (l_y, h_x) for x and y (McCormick
        1976); a chosen weight mixes the two. Any hyperplane that bounds x y at the corners of the
        box does so on all of it, since x y is linear along either axis: intercepts are computed
        from the corners.
        """
        into, planes, ends = (
            self.held["into"],
            list[Array](),
            [[end[:, t[1]] for end in box] for t, box in zip(self.terms, boxes, strict=True) if t],
        )
        for side, weights in zip((1, -1), given, strict=True):
            t = 0.0 if weights is None else np.nan_to_num(weights)[:, into]
            first, second = ends[1][::side]
            m = np.array(
                [first + t * (second - first), ends[0][0] + t * (ends[0][1] - ends[0][0])]
            ) * (not flat)
            corners = [(a * b, m[0] * a, m[1] * b) for a in ends[0] for b in ends[1]]
            gap = np.minimum.reduce(
                [
                    side * (c - x - y) - ROOM * (np.abs(c) + np.abs(x) + np.abs(y)) - TINY
                    for c, x, y in corners
                ]
            )
            planes += [
                m,
                side
                * (
                    gathered(gap, into, self.size)
                    - g(len(into) + 8) * gathered(np.abs(gap), into, self.size)
                    - TINY
                ),
            ]
        return planes

    def _largest(self, lows: Array, highs: Array, flat: bool) -> list[Array]:
        """Return hyperplanes of the maximum of each window.

        Below: one member, the first whose lower bound is within 1e-9 of the largest, since the
        maximum is no less than any member. Above: the same member where it dominates (its lower
        bound is no less than the upper bounds of all others), else the largest upper bound, a
        constant.
        """
        best = np.eye(lows.shape[2], dtype=bool)[(lows >= lows.max(2)[..., None] - 1e-9).argmax(2)]
        wins = (np.where(best, lows, -np.inf).max(2) >= np.where(best, -np.inf, highs).max(2)) & (
            not flat
        )
        return [
            best * 1.0,
            lows.max(2) * flat,
            (best & wins[..., None]) * 1.0,
            np.where(wins, 0.0, highs.max(2)),
        ]

    def _logsumexp(self, lows: Array, highs: Array, flat: bool) -> list[Array]:
        """Return hyperplanes of `share` times log sum exp x of each window.

        Below: log sum exp is convex, hence above its tangent in the middle of the box. Above: log s
        <= log t + s / t - 1 for any t > 0, where s is the sum of the exponentials, each of which
        lies below its chord.
        """

        def total(x: Array) -> Array:
            return np.asarray(x.max(2) + np.log(np.exp(x - x.max(2)[..., None]).sum(2)))

        share, middle, top, wide = (
            self.facts["share"],
            (lows + highs) / 2,
            highs.max(2)[..., None],
            np.where(highs > lows, highs - lows, 1.0),
        )
        room = (
            8
            * (lows.shape[2] + 16)
            * ROOM
            * (1 + math.log(lows.shape[2]) + np.maximum(np.abs(lows), np.abs(highs)).max(2))
        )
        weight, low, high = (
            np.exp(middle - total(middle)[..., None]),
            np.exp(lows - top),
            np.exp(highs - top),
        )
        t = ((low + high) / 2).sum(2)[..., None]
        chord = (high - low) / wide / t
        below = total(lows) if flat else total(middle) - (weight * middle).sum(2)
        over = (
            total(highs)
            if flat
            else (top + np.log(t))[..., 0] - 1 + (low / t - chord * lows).sum(2)
        )
        return [share * weight, share * (below - room), share * chord, share * (over + room)]


class Threat:
    """The threat set: all x + d with |w d|_p <= radius, low <= x + d <= high.

    d is 0 outside the mask. `box` is the smallest box around the set, rounded outwards.
    """

    def __init__(self, facts: dict[str, Any], x: Array, arrays: dict[str, Array]) -> None:
        self.norm, self.radius, self.x = facts["norm"], float(facts["radius"]), x
        inf, held = (
            np.float64(np.inf),
            {
                name: np.broadcast_to(np.asarray(v, np.float64), x.shape)
                for name, v in arrays.items()
            },
        )
        self.weight, low, high = (
            held.get("weights", np.ones_like(x)),
            held.get("low", -inf),
            held.get("high", inf),
        )
        good = (
            self.norm in ("linf", "l2", "l1")
            and 0 <= self.radius < math.inf
            and ((self.weight > 0) & np.isfinite(self.weight)).all()
        )
        demand(
            good,
            "the threat is none that this checker knows: linf, l2 or l1, a radius of at least 0, "
            "weights above 0",
        )
        demand(((low <= x) & (x <= high)).all(), "the point lies outside the threat's box")
        reach = above(self.radius / self.weight)
        free = (held.get("mask", np.ones_like(x)) != 0) & (self.radius > 0)
        self.box = (
            np.where(free, np.maximum(low, -above(reach - x)), x)[None],
            np.where(free, np.minimum(high, above(x + reach)), x)[None],
        )

    def fall(self, a: Array, low: Array, high: Array, whole: bool) -> Array:
        """Return an upper bound of <-a, d> over all allowed perturbations d.

        Allowed are low <= d <= high and, for the `whole` threat set, |w d|_p <= radius. For l1 and
        l2 the norm constraint enters with a Lagrange multiplier, which is sound at any value;
        bisection only seeks a good one.
        """
        if not whole or self.norm == "linf":
            return np.asarray(
                np.maximum(-a * low, -a * high).sum(1)
                + g(self.x.size + 8) * np.maximum(np.abs(a * low), np.abs(a * high)).sum(1)
                + TINY
            )
        p, slope = 1 if self.norm == "l1" else 2, np.abs(a) / self.weight
        cap = np.minimum(above(np.where(a < 0, high, -low) * self.weight), above(self.radius))

        def moved(m: Array) -> Any:
            return cap * (slope > m) if p == 1 else np.minimum(slope / m, cap)

        least, most = (
            np.zeros((len(a), 1)),
            np.sqrt((slope**2).sum(1, keepdims=True)) / (1 if p == 1 else max(self.radius, 1e-100))
            + 1e-200,
        )
        for _ in range(60):  # bisection: does the step at this multiplier use up the radius?
            middle = (least + most) / 2
            over = (moved(middle) ** p).sum(1, keepdims=True) > self.radius**p
            least, most = np.where(over, middle, least), np.where(over, most, middle)
        move, dual = moved(most), most[:, 0] * self.radius**p
        value = (move * (slope - most * move ** (p - 1) / p)).sum(1) + dual / p
        return np.asarray(value + g(self.x.size + 32) * 2 * ((slope * move).sum(1) + dual) + TINY)


class ProofVerdict(NamedTuple):
    """Whether the claim was proved; if not, `reason` says what failed.

    `claim` is the header, whose hashes were compared with those computed here.
    """

    proved: bool
    reason: str
    claim: dict[str, Any]
    leaves: int = 0


class Proof:
    """A proof file, read and compared with its own header."""

    def __init__(self, data: bytes) -> None:
        again = "if it is whole and from an older calipers, write it again"
        demand(
            data[-SEAL:] == seal(data),
            f"the file is not the one that was sealed: it is damaged or was changed ({again})",
        )
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            demand(
                sum(i.file_size for i in archive.infolist()) <= max(_UNPACKED, 100 * len(data)),
                "it would unpack to far more than it takes",
            )
            files = {
                name.removesuffix(".npy"): np.lib.format.read_array(
                    io.BytesIO(archive.read(name)), allow_pickle=False
                )
                for name in archive.namelist()
            }
        self.header: dict[str, Any] = json.loads(bytes(files.pop("header")))
        self.arrays, kind = (
            files,
            tuple(self.header.get(name) for name in ("format", "version", "guarantee")),
        )
        demand(
            kind == ("calipers-proof", VERSION, "float64-checked"),
            f"this checker proves calipers-proof, version {VERSION}, float64-checked, not {kind}: "
            f"{again}",
        )
        demand(
            self.header["arrays"]
            == {name: [v.dtype.str, list(v.shape)] for name, v in files.items()},
            "the arrays are not those that the header lists",
        )
        exact = [
            v.dtype.kind in "bf"
            or (v.dtype.kind in "iu" and (not v.size or int(abs(v).max()) <= 2**53))
            for v in files.values()
        ]
        demand(
            all(exact) and all(v.dtype.itemsize <= 8 for v in files.values()),
            "an array holds numbers that float64 would round",
        )
        demand(
            digest(self.header["network"], files) == self.header["model"],
            "the network is not the one that the header names: its hash differs",
        )
        demand(
            claimed(self.header, files) == self.header["claim"],
            "the claim is not the one that the header names: its hash differs",
        )
        shapes, self.nodes = (
            [tuple(int(n) for n in self.header["network"]["input"])],
            list[Operation](),
        )
        for k, facts in enumerate(self.header["network"]["nodes"], start=1):
            self.nodes.append(Operation(facts, self.named(f"net.{k}."), shapes))
            shapes.append(self.nodes[-1].shape)
        self.sizes, x = (
            [math.prod(shape) for shape in shapes],
            np.asarray(files["x"], np.float64).reshape(-1),
        )
        demand(
            x.size == self.sizes[0] and np.isfinite(x).all(),
            "the point is not an input of the network",
        )
        self.threat, goal, k = (
            Threat(self.header["threat"], x, self.named("threat.")),
            self.header["goal"],
            self.sizes[-1],
        )
        if goal["kind"] == "linear":
            self.spec, self.offsets, self.cases = (
                np.asarray(files[name], t)
                for name, t in (("spec", float), ("offsets", float), ("cases", int))
            )
        else:
            chosen, away = int(goal["class"]), goal["kind"] == "untargeted"
            demand(
                0 <= chosen < k and 1 < k <= _CLASSES and (away or goal["kind"] == "targeted"),
                f"class {chosen} is none of the network's {k}, or the goal is unknown",
            )
            self.spec, self.offsets = (
                (np.eye(k)[chosen] - np.delete(np.eye(k), chosen, 0)) * (1 if away else -1),
                np.zeros(k - 1),
            )
            self.cases = np.arange(k - 1) * away
        fits = (
            len(self.spec)
            and self.spec.shape == (len(self.spec), k)
            and self.offsets.shape == self.cases.shape == (len(self.spec),)
        )
        whole = (
            np.isfinite(self.spec).all()
            and np.isfinite(self.offsets).all()
            and set(self.cases.tolist()) == set(range(int(self.cases.max()) + 1))
        )
        demand(
            fits and whole,
            "the specification does not fit the network's outputs, holds what is no number, or "
            "leaves a case out",
        )

    def named(self, beginning: str) -> dict[str, Array]:
        """Return the arrays whose names begin so, by the rest of their names."""
        return {
            name.removeprefix(beginning): v
            for name, v in self.arrays.items()
            if name.startswith(beginning)
        }

    def places(self, name: str, size: int) -> Array:
        """Return the elements an array is about: in range; none twice in `place`s."""
        place = np.asarray(self.arrays[name], np.int64).reshape(-1)
        demand(
            ((place >= 0) & (place < size)).all(), f"{name} points past the end of what it is about"
        )
        demand(
            not name.endswith("place") or len(np.unique(place)) == len(place),
            f"{name} names an element twice",
        )
        return place


def digest(told: Any, arrays: dict[str, Array], beginnings: tuple[str, ...] = ("net.",)) -> str:
    """Return the SHA-256 of facts and arrays, by default a network's.

    Hashed are the facts as JSON with sorted keys, then name, type, shape and bytes of each array
    whose name begins with one of `beginnings`.
    """
    parts = [
        f"{key}:{v.dtype.str}:{list(v.shape)}:".encode() + v.tobytes()
        for key, v in sorted(arrays.items())
        if key.startswith(beginnings)
    ]
    return hashlib.sha256(
        b"".join([json.dumps(told, sort_keys=True, separators=(",", ":")).encode(), *parts])
    ).hexdigest()


def claimed(header: dict[str, Any], arrays: dict[str, Array]) -> str:
    """Return the hash of a claim: of all that says what is claimed."""
    return digest({name: header[name] for name in CLAIM[0]}, arrays, CLAIM[1])


def seal(data: bytes) -> bytes:
    """Return what the last bytes of a file have to be."""
    return hashlib.sha256(data[:-SEAL]).hexdigest().encode()


def covered(low: Array, high: Array, begin: Array, end: Array) -> bool:
    """Return whether leaves leave no gap in the box from `begin` to `end`.

    `low` and `high` (P, keys) are the bounds of the leaves, a column for each element that is split
    anywhere. Recursively, a value of one key that no leaf lies across divides the leaves into two
    groups, one on either side, until a group holds a leaf that is all of its box. Where there is no
    such value the answer is no: a cover may be refused by mistake, but a gap is never accepted.
    """
    lots = [(low, high, begin, end)]
    while lots:
        low, high, begin, end = lots.pop()
        if ((low <= begin) & (high >= end)).all(1).any():
            continue
        for k in np.flatnonzero((low > begin).any(0) & (high < end).any(0)):
            at = np.unique(low[(low[:, k] > begin[k]) & (low[:, k] < end[k]), k])
            across = np.searchsorted(np.sort(low[:, k]), at) - np.searchsorted(
                np.sort(high[:, k]), at, side="right"
            )
            if (across == 0).any():
                break
        else:
            return False
        value = at[across == 0][(across == 0).sum() // 2]
        below, middle = high[:, k] <= value, np.where(np.arange(len(begin)) == k, value, np.nan)
        if below.all() or not below.any() or (low[~below, k] < value).any():
            return False
        lots += [
            (low[below], high[below], begin, np.fmin(end, middle)),
            (low[~below], high[~below], np.fmax(begin, middle), end),
        ]
    return True


class Rows(NamedTuple):
    """The rows (R,) that one sweep carries back.

    They are at `place` in `block`; each is about the `part (R,)` of the threat set, and within its
    `cuts`: by value number the places, lower ends, upper ends and multipliers.
    """

    block: int
    place: slice
    part: Array
    cuts: dict[int, tuple[Any, ...]]


class Prover:
    """The boxes proved so far; `good` says which leaves of a block are proved."""

    def __init__(self, proof: Proof) -> None:
        self.proof, self.nodes, self.whole, self.good = (
            proof,
            proof.nodes,
            list[Box](),
            dict[int, Array](),
        )
        numbers = {
            name: int(name.split(".")[1].removeprefix("cut"))
            for name in proof.arrays
            if ".cut" in name and name.endswith(".place")
        }
        numbers |= {name: 0 for name in proof.arrays if name.endswith(".part.place")}
        keys = sorted(
            {(n, int(e)) for name, n in numbers.items() for e in proof.places(name, proof.sizes[n])}
        )
        self.keys, free = {key: k for k, key in enumerate(keys)}, (-np.inf, np.inf)
        self.edge = [
            np.array([proof.threat.box[side][0, e] if n == 0 else free[side] for n, e in keys])
            for side in (0, 1)
        ]
        self.leaves: dict[int, list[list[Array]]] = {int(c): [] for c in proof.cases}

    def run(self) -> ProofVerdict:
        """Bound all values and prove the leaves, pass by pass; then look for gaps."""
        blocks, reasons = self.proof.header["blocks"], list[str]()
        for turn in sorted({0} | {int(b["pass"]) for b in blocks}):
            self._begin(f"pass{turn}")
            for number in range(len(self.nodes) + 1):
                self._settle(
                    number,
                    f"pass{turn}",
                    [
                        j
                        for j, b in enumerate(blocks)
                        if (b["pass"], b["kind"], b.get("number")) == (turn, "box", number)
                    ],
                )
            self.whole = self.whole if self.parts else self.boxes
            reasons += [
                self._leaves(j)
                for j, b in enumerate(blocks)
                if (b["pass"], b["kind"]) == (turn, "leaf")
            ]
        for case, held in self.leaves.items():
            low, high = (
                np.concatenate([np.zeros((0, len(self.keys))), *(leaves[side] for leaves in held)])
                for side in (0, 1)
            )
            reasons += (
                []
                if covered(low, high, *self.edge)
                else [f"case {case}: its {len(low)} leaves do not cover the whole threat set"]
            )
        return ProofVerdict(
            not any(reasons),
            next(filter(None, reasons), ""),
            self.proof.header,
            sum(map(len, self.good.values())),
        )

    def _begin(self, turn: str) -> None:
        """Begin with the box of the whole threat set, or with those of its parts."""
        x, ends, held = (
            self.proof.threat.x,
            self.proof.threat.box,
            self.proof.named(f"{turn}.part."),
        )
        self.parts = held and (
            self.proof.places(f"{turn}.part.place", x.size),
            *(np.asarray(held[name], np.float64) for name in ("low", "high")),
        )
        if self.parts:
            place, low, high = self.parts
            demand(
                low.shape == high.shape == (len(low), len(place)) and (low <= high).all(),
                f"{turn}: parts that do not fit, or end before they begin",
            )
            ends = np.repeat(ends[0], len(low), 0), np.repeat(ends[1], len(low), 0)
            ends[0][:, place], ends[1][:, place] = low, high
        self.boxes, self.planes, self.reach = [ends], dict[int, list[Array]](), dict[int, Array]()
        self.offsets = (
            np.where(ends[0] == x, 0.0, -above(x - ends[0])),
            np.where(ends[1] == x, 0.0, above(ends[1] - x)),
        )

    def _settle(self, number: int, turn: str, blocks: list[int]) -> None:
        low, high = self._interval(self.nodes[number - 1], number) if number else self.boxes.pop()
        if self.whole:
            low, high = np.fmax(low, self.whole[number][0]), np.fmin(high, self.whole[number][1])
        self.boxes.append(
            (np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high))
        )
        for j in blocks:
            self._narrow(number, j)
        for k, node in enumerate(self.nodes, start=1):
            if max(node.inputs) == number and not node.affine:
                self.planes[k] = node.planes(
                    [self.boxes[i] for i in node.inputs],
                    [self.proof.arrays.get(f"{turn}.{k}.{side}") for side in ("low", "high")],
                )

    def _interval(self, node: Operation, number: int) -> Box:
        boxes = [self.boxes[i] for i in node.inputs]
        if not node.affine:
            _, least, _, most = node.planes(boxes, [None, None], flat=True)
            return least, most

        def through(values: list[Array], weigh: Any = np.asarray) -> Any:
            return sum(forward(x, weigh) for (forward, _), x in zip(node.maps, values, strict=True))

        middles = [(low + high) / 2 for low, high in boxes]
        radii = [
            np.maximum(high - c, c - low) for c, (low, high) in zip(middles, boxes, strict=True)
        ]
        self.reach[number] = sizes = through([self._size(i) for i in node.inputs], np.abs) + np.abs(
            node.constant
        )
        middle, reach = (
            through(middles) + node.constant,
            through(radii, np.abs) + 4 * g(max(node.wide) + _OWN) * sizes + TINY,
        )
        return middle - reach, middle + reach

    def _size(self, number: int) -> Array:
        return np.maximum(np.abs(self.boxes[number][0]), np.abs(self.boxes[number][1]))

    def _shares(self, rows: int) -> list[slice]:
        step = max(1, _HELD // max(*self.proof.sizes, *(node.long for node in self.nodes)))
        return [slice(begin, begin + step) for begin in range(0, rows, step)]

    def _narrow(self, number: int, j: int) -> None:
        """Narrow a value's box: each row bounds one end of one element of a part."""
        proof, ends = self.proof, [end.copy() for end in self.boxes[number]]
        element, upper = (
            proof.places(f"b{j}.element", proof.sizes[number]),
            np.asarray(proof.arrays[f"b{j}.upper"], bool),
        )
        part = proof.places(f"b{j}.part", len(ends[0])) if self.parts else np.zeros_like(element)
        demand(
            upper.shape == element.shape == part.shape,
            f"block {j}: each row is about one end of one element of one part",
        )
        for rows in self._shares(len(element)):
            a, side, place = (
                np.zeros((len(element[rows]), ends[0].shape[1])),
                upper[rows],
                (part[rows], element[rows]),
            )
            a[np.arange(len(a)), place[1]] = np.where(side, -1.0, 1.0)
            bound = self._sweep(number, a, Rows(j, rows, place[0], {}))
            bound = np.where(np.isnan(bound), -np.inf, bound)
            np.maximum.at(ends[0], tuple(v[~side] for v in place), bound[~side])
            np.minimum.at(ends[1], tuple(v[side] for v in place), -bound[side])
        self.boxes[number] = ends[0], ends[1]

    def _leaves(self, j: int) -> str:
        """Prove a block of leaves; return what failed, "" if nothing did.

        Note also which region, a part and its cuts, each leaf is about, for the search for gaps.
        """
        proof, arrays, cuts = self.proof, self.proof.named(f"b{j}."), dict[int, tuple[Any, ...]]()
        case, weights = np.asarray(arrays["case"], int), np.asarray(arrays["weights"], np.float64)
        part = (
            proof.places(f"b{j}.part", len(self.boxes[0][0])) if self.parts else np.zeros_like(case)
        )
        good = (
            weights.shape == (len(case), len(proof.spec))
            and (np.isfinite(weights) & (weights >= 0)).all()
            and set(case.tolist()) <= set(self.leaves)
        )
        demand(
            good and part.shape == case.shape,
            f"block {j}: weights of directions are numbers of at least 0, one for each, and cases "
            "are those of the goal",
        )
        demand(
            not (weights * (proof.cases != case[:, None])).any(),
            f"block {j}: a leaf weighs directions of another case",
        )
        for n in (n for n in range(1, len(self.nodes) + 1) if f"cut{n}.place" in arrays):
            low, high, beta = (
                np.asarray(arrays[f"cut{n}.{name}"], np.float64) for name in ("low", "high", "beta")
            )
            cuts[n] = proof.places(f"b{j}.cut{n}.place", proof.sizes[n]), low, high, beta
            fits = (
                low.shape == high.shape == beta.shape == (len(case), len(cuts[n][0]))
                and (low <= high).all()
                and np.isfinite(beta).all()
            )
            demand(fits, f"block {j}: a cut that does not fit its leaves, or ends before it begins")
            demand(
                np.isfinite(np.where(beta > 0, low, np.where(beta < 0, high, 0.0))).all(),
                f"block {j}: a multiplier whose sign is that of no constraint",
            )
        ends, bounds = (
            [np.full((len(case), len(self.keys)), free) for free in (-np.inf, np.inf)],
            np.empty(len(case)),
        )
        for n, held in {
            **cuts,
            **({0: (self.parts[0], *(end[part] for end in self.parts[1:]))} if self.parts else {}),
        }.items():
            columns = [self.keys[n, int(e)] for e in held[0]]
            ends[0][:, columns], ends[1][:, columns] = held[1:3]
        for rows in self._shares(len(case)):
            w, p, mine = (
                weights[rows],
                part[rows],
                {n: (place, *(v[rows] for v in cut)) for n, (place, *cut) in cuts.items()},
            )
            bound = (
                self._sweep(len(self.nodes), w @ proof.spec, Rows(j, rows, p, mine))
                + w @ proof.offsets
            )
            lost = (
                dot(w @ np.abs(proof.spec), of(self._size(len(self.nodes)), p))
                + w @ np.abs(proof.offsets)
                + np.abs(bound)
            )
            bounds[rows] = bound - 2 * g(len(proof.spec) + 8) * lost
        for c in set(case.tolist()):
            self.leaves[c].append([end[case == c] for end in ends])
        self.good[j], worst = bounds > 0, int(np.argmin(bounds > 0))
        return (
            ""
            if self.good[j].all()
            else f"leaf {worst} of block {j} (case {case[worst]}): its bound is "
            f"{bounds[worst]:.6g}, not above 0"
        )

    def _sweep(self, number: int, a: Array, rows: Rows) -> Array:
        """Return lower bounds (R,) of <a, value `number`> for rows of a block.

        They hold within the rows' cuts, over their parts of the threat set.
        """
        part, cuts = rows.part, rows.cuts
        pending, deep = {number: a}, 2 * len(self.nodes) + _OWN
        total: Any = np.zeros(len(a))
        lost = total
        for k in (k for k in range(number, 0, -1) if k in pending):
            a, node = pending.pop(k), self.nodes[k - 1]
            if k in cuts:  # in this branch beta (z - end) >= 0
                place, low, high, beta = cuts[k]
                gain, a = beta * np.where(beta > 0, low, np.where(beta < 0, high, 0.0)), a.copy()
                a[:, place] -= beta
                total, lost = total + gain.sum(1), lost + g(deep + len(place)) * np.abs(gain).sum(1)
            if node.affine:
                gains, sizes, backs = (
                    a @ node.constant,
                    dot(np.abs(a), of(self.reach[k], part)),
                    [back(a) for _, back in node.maps],
                )
            else:
                gains, sizes, backs = self._nonlinear(k, a, rows)
            total, lost = (
                total + gains,
                lost
                + g(16) * dot(np.abs(a), of(self._size(k), part))
                + g(node.long + deep) * sizes,
            )
            for i, back in zip(node.inputs, backs, strict=True):
                pending[i] = pending[i] + back if i in pending else back
        a, x = pending.get(0, np.zeros((1, self.proof.sizes[0]))), self.proof.threat.x
        fall = self.proof.threat.fall(
            a, of(self.offsets[0], part), of(self.offsets[1], part), not self.parts
        )
        sizes = (
            dot(np.abs(a), of(self._size(0), part))
            + np.abs(a) @ np.abs(x)
            + np.abs(fall)
            + np.abs(total)
        )
        lost = (1 + 1e-6) * (lost + 2 * g(x.size + deep) * sizes) + TINY * (
            1 + sum(float(self._size(i).sum()) for i in range(number + 1))
        )
        return np.asarray(total + a @ x - fall - lost)

    def _nonlinear(self, k: int, a: Array, rows: Rows) -> tuple[Array, Array, list[Array]]:
        """Carry coefficients back through operation `k`, a nonlinear one.

        Where a coefficient is positive the lower hyperplane is used, where it is negative the upper
        one. Rows may have slopes of their own, and boxes that their cuts make smaller. Returns the
        constants, a bound on the sizes of all terms (for the rounding errors), and the coefficients
        for each input.
        """

        def wide(end: Array) -> Array:
            return np.array(np.broadcast_to(of(end, part), (len(a), end.shape[1])))

        node, own, part = self.nodes[k - 1], f"b{rows.block}.{k}.", rows.part
        planes, held = [of(v, part) for v in self.planes[k]], self.proof.named(own)
        if held:
            given, boxes = (
                list[Array | None]([None, None]),
                [(wide(low), wide(high)) for low, high in (self.boxes[i] for i in node.inputs)],
            )
            for side in (s for s in ("low", "high") if s in held):
                given[side == "high"] = slopes = np.full((len(a), node.size), np.nan)
                slopes[:, self.proof.places(f"{own}place", node.size)] = held[side][rows.place]
            for (low, high), (place, begin, end, _) in (
                (box, rows.cuts[i])
                for i, box in zip(node.inputs, boxes, strict=True)
                if i in rows.cuts
            ):
                low[:, place] = np.maximum(low[:, place], begin)
                high[:, place] = np.maximum(np.minimum(high[:, place], end), low[:, place])
            planes = node.planes(boxes, given)
        low, low_at, high, high_at = planes
        up, down, backs, sizes = (
            np.maximum(a, 0),
            np.minimum(a, 0),
            list[Array](),
            dot(np.abs(a), np.maximum(np.abs(low_at), np.abs(high_at))),
        )
        for n, term in enumerate(node.terms):
            u, d = (up, down) if term is None else (up[:, term[0]], down[:, term[0]])
            back, size = (
                u * low[n] + d * high[n],
                np.maximum(np.abs(low[n]), np.abs(high[n])) * (u - d),
            )
            if term is not None:
                back, size = (gathered(v, term[1], node.wide[n] + 1)[:, :-1] for v in (back, size))
            backs.append(back)
            sizes = sizes + dot(size, of(self._size(node.inputs[n]), part))
        return dot(up, low_at) + dot(down, high_at), sizes, backs


def prove(data: bytes, claim: str = "", model: str = "") -> ProofVerdict:
    """Return whether the claim of a proof file holds.

    The file's hashes must begin with `claim` and `model`: then it is the claim, or about the
    network, that was asked for. Raises nothing: a file that makes no sense proves nothing.
    """
    try:
        with np.errstate(all="ignore"):
            proof = Proof(data)
            demand(
                proof.header["claim"].startswith(claim),
                f"it is another claim than {claim[:12]}: {proof.header['claim']}",
            )
            demand(
                proof.header["model"].startswith(model),
                f"it is about another network than {model[:12]}: {proof.header['model']}",
            )
            return Prover(proof).run()
    except Exception as error:  # a file that is damaged or forged may raise anything
        return ProofVerdict(
            False,
            str(error)
            if isinstance(error, Rejected)
            else f"the file cannot be read ({type(error).__name__}: {error})",
            {},
        )


def said(verdict: ProofVerdict) -> str:
    """Return what is proved, in lines that name it, or why nothing is."""
    if not verdict.proved:
        return f"NOT proved: {verdict.reason}"
    words = {
        "untargeted": "no class but {} wins",
        "targeted": "class {} does not win",
        "linear": "the linear specification holds",
    }
    claim, about = verdict.claim, verdict.claim.get("about", {})
    what = words[claim["goal"]["kind"]].format(claim["goal"].get("class"))
    told = (
        ", ".join(
            f"{ascii(str(name))[1:-1]} {ascii(str(value))[1:-1]}" for name, value in about.items()
        )
        if isinstance(about, dict)
        else ""
    )
    where = (
        f"within {claim['threat']['norm']} {claim['threat']['radius']:.9g} of the point "
        f"({verdict.leaves} leaves)"
    )
    return f"proved: {what} {where}\n  claim {claim['claim']}\n  model {claim['model']}" + (
        f"\n  it says of itself: {told}" if told else ""
    )


def main(words: list[str]) -> int:
    """Print what each file proves; return 1 if any does not."""
    parser = argparse.ArgumentParser(
        prog="checker.py", description="Prove again what proof files of calipers claim."
    )
    parser.add_argument("files", nargs="+", metavar="proof.npz")
    parser.add_argument(
        "--claim",
        default="",
        help="the claim that was asked for: its hash, or the first 16 digits of it or more",
    )
    parser.add_argument("--model", default="", help="the network that was asked about, likewise")
    options = parser.parse_args(words)
    if any(0 < len(text) < 16 for text in (options.claim, options.model)):
        parser.error("of a hash at least 16 digits are needed")
    good = True
    for path in options.files:
        try:
            verdict = prove(Path(path).read_bytes(), options.claim, options.model)
        except (OSError, MemoryError, ValueError) as error:
            verdict = ProofVerdict(False, f"the file cannot be read ({error})", {})
        print(f"{ascii(path)[1:-1]}: {said(verdict)}")
        good = good and verdict.proved
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
