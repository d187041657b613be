"""What do operations and threats of a proof file mean? Read by `checker.py`, beside which this file stands. NumPy and the standard library only.

Affine operations state what they do and its transpose; functions of one number find, for any slope, the intercept that makes a line true; a threat set finds
how far a linear function can fall inside it; leaves whether they cover everything.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
UNIT, TINY = 2.0**-53, 1e-280  # rounding, and what underflow can lose


class Rejected(Exception):
    """The file is damaged, or says what cannot be right."""


def demand(good: Any, message: str) -> None:
    """Reject the file unless something holds."""
    if not good:
        raise Rejected(message)


def g(n: float) -> float:
    """Return the allowance for n roundings."""
    return n * UNIT / (1 - n * UNIT)


def above(value: Array) -> Array:
    """Return the next number."""
    return np.nextafter(value, np.inf)


def gathered(a: Array, index: NDArray[np.int64], size: int) -> Array:
    """Return (R, size): the columns of a (R, m) added up by their index."""
    order = np.argsort(index, kind="stable")
    keys, starts = np.unique(index[order], return_index=True)
    result = np.zeros((len(a), size))
    if len(keys):
        result[:, keys] = np.add.reduceat(a[:, order], starts, axis=1)
    return result


# ---- the network ------------------------------------------------------------------------------------------------------------------------------------


class Node:
    """One operation of the list. `forward (B, n) -> (B, m)` and `back (R, m) -> (R, n)` for each input, on flat numbers, are those of affine operations."""

    def __init__(self, facts: dict[str, Any], arrays: dict[str, NDArray[Any]], shapes: list[tuple[int, ...]]) -> None:
        self.kind, self.inputs, self.shape = str(facts["op"]), [int(i) for i in facts["inputs"]], tuple(int(n) for n in facts["shape"])
        demand(self.inputs and all(0 <= i < len(shapes) for i in self.inputs), f"an operation ({self.kind}) reads numbers that come after it")
        self.facts, self.size, self.wide = facts, math.prod(self.shape), [math.prod(shapes[i]) for i in self.inputs]
        self.input_shape = shapes[self.inputs[0]]
        whole = ("row", "column", "windows")
        self.held: dict[str, Any] = {k: np.asarray(v, np.int64 if k.startswith(whole) else np.float64) for k, v in arrays.items()}
        self.affine = self.kind in ("linear", "convolution", "scale", "sum", "reshape", "matrix")
        demand(self.affine or self.kind in ("pieces", "curve", "largest"), f"the operation {self.kind!r} is not known to this checker")
        self._fits()
        self.constant = self._constant()
        factor = self.held["scale"] if self.kind == "scale" else 1.0
        self.factors = facts["signs"] if self.kind == "sum" else [np.broadcast_to(factor, self.shape).reshape(-1)]

    def _fits(self) -> None:
        """Raise where shapes disagree, so that nothing is broadcast or read past an end."""
        h = self.held
        same = {"scale": self.wide[0], "sum": self.wide[-1], "reshape": self.wide[0], "pieces": self.wide[0], "curve": self.wide[0]}.get(self.kind, self.size)
        good = same == self.size and all(np.isfinite(v).all() for v in h.values()) and (len(self.inputs) == 1 or self.kind in ("sum", "matrix"))
        if self.kind == "linear":
            good &= h["weight"].shape == (self.shape[-1], self.input_shape[-1]) and self.shape[:-1] == self.input_shape[:-1]
        if self.kind == "sum":
            good &= len(self.facts["signs"]) == len(self.inputs) and set(self.wide) == {self.size}
        if self.kind == "largest":
            good &= h["windows"].ndim == 2 and len(h["windows"]) == self.size and h["windows"].min() >= 0 and h["windows"].max() <= self.wide[0]
            good &= bool((h["windows"] < self.wide[0]).any(1).all())
        if self.kind == "curve":
            good &= self.facts["function"] in ("tanh", "sigmoid")
        if self.kind == "pieces":
            good &= h["kinks"].shape == h["values"].shape and len(h["kinks"]) > 0 and bool((np.diff(h["kinks"]) > 0).all())
        demand(good, f"the shapes or numbers of an operation ({self.kind}) do not fit together")

    def _constant(self) -> Array:
        """Return b, flat: a bias for each output channel (first axis) or feature (last axis), a shift that broadcasts, or a constant for each number."""
        name = {"linear": "bias", "convolution": "bias", "scale": "shift", "matrix": "constant"}.get(self.kind)
        if name is None or (name == "bias" and name not in self.held):
            return np.zeros(self.size)
        b = self.held[name]
        shape = {"convolution": (-1, *[1] * (len(self.shape) - 1)), "matrix": self.shape}.get(self.kind, b.shape)
        return np.asarray(np.broadcast_to(b.reshape(shape), self.shape).reshape(-1))

    def _taps(self) -> list[tuple[Array, NDArray[np.int64]]]:
        """Return for each place of a kernel its weights (groups, m, c), and the input elements it meets (groups, c, places); padding is one past the end."""
        groups, places, weight = int(self.facts["groups"]), math.prod(self.shape[1:]), self.held["weight"]
        around = [(0, 0), *((p, p) for p in self.facts["padding"])]
        index = np.pad(np.arange(self.wide[0]).reshape(self.input_shape), around, constant_values=self.wide[0])
        spans = list(zip(self.facts["stride"], self.facts["dilation"], self.shape[1:], strict=True))
        found = []
        for tap in np.ndindex(*weight.shape[2:]):
            where = tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for t, (s, d, n) in zip(tap, spans, strict=True))
            w = weight[(slice(None), slice(None), *tap)].reshape(groups, self.shape[0] // groups, -1)
            found.append((w, index[(slice(None), *where)].reshape(groups, w.shape[2], places)))
        return found

    def forward(self, inputs: list[Array], absolute: bool) -> Array:
        """Return Wx + b, or |W|x."""
        weigh: Any = np.abs if absolute else np.asarray
        total = sum(self._through(k, x, weigh) for k, x in enumerate(inputs))
        return np.asarray(total if absolute else total + self.constant)

    def _through(self, k: int, x: Array, weigh: Any) -> Array:
        if self.kind == "linear":
            return np.asarray((x.reshape(len(x), -1, self.input_shape[-1]) @ weigh(self.held["weight"]).T).reshape(len(x), self.size))
        if self.kind == "convolution":
            around = np.vstack([x.T, np.zeros(len(x))])
            return np.asarray(sum(weigh(w) @ around[where].reshape(*where.shape[:2], -1) for w, where in self._taps()).reshape(self.size, -1).T)
        if self.kind == "matrix":
            row, column, value = (self.held[f"{name}{k}"] for name in ("row", "column", "value"))
            return gathered(x[:, column] * weigh(value), row, self.size)
        return np.asarray(x * weigh(self.factors[k]))

    def back(self, a: Array) -> list[Array]:
        """Return W^T a for each input."""
        if self.kind == "linear":
            return [(a.reshape(len(a), -1, self.shape[-1]) @ self.held["weight"]).reshape(len(a), -1)]
        if self.kind == "convolution":
            result, rows = np.zeros((self.wide[0] + 1, len(a))), np.ascontiguousarray(a.T)
            for w, where in self._taps():  # of one tap no two elements meet the same one
                result[where.reshape(-1)] += (w.transpose(0, 2, 1) @ rows.reshape(*w.shape[:2], -1)).reshape(-1, len(a))
            return [result[:-1].T]
        if self.kind == "matrix":
            parts = [[self.held[f"{name}{k}"] for name in ("row", "column", "value")] for k in range(len(self.inputs))]
            return [gathered(a[:, row] * value, column, wide) for (row, column, value), wide in zip(parts, self.wide, strict=True)]
        return [a * factor for factor in self.factors]

    # functions of one number: from a slope the intercept that makes a line true

    def value(self, t: Array) -> tuple[Array, Array]:
        """Return f(t), and the size of the terms that made it."""
        if self.kind == "curve":
            return np.tanh(t) if self.facts["function"] == "tanh" else 0.5 + 0.5 * np.tanh(t / 2), np.ones_like(t)
        kinks, values = self.held["kinks"], self.held["values"]
        piece = np.searchsorted(kinks, t, side="right")
        anchor = np.maximum(piece - 1, 0)
        slope, at, start = self._slopes()[piece], kinks[anchor], values[anchor]
        return start + slope * (t - at), np.abs(start) + np.abs(slope) * (np.abs(t) + np.abs(at))

    def _slopes(self) -> Array:
        """The slope of each piece; between kinks it joins their values, and is rounded."""
        kinks, values = self.held["kinks"], self.held["values"]
        return np.concatenate([[self.facts["left"]], np.diff(values) / np.diff(kinks), [self.facts["right"]]])

    def _extremes(self, m: Array, low: Array, high: Array) -> list[tuple[Array, Array]]:
        """Return f(t) - m t and its allowance wherever on [low, high] it can be least or largest."""
        inner: list[Array] = [np.full_like(m, kink) for kink in self.held["kinks"]] if self.kind == "pieces" else self._touching(m)
        found = []
        for t in (low, high, *(np.clip(t, low, high) for t in inner)):
            y, size = self.value(t)
            found.append((y - m * t, g(64) * (size + np.abs(m * t)) + TINY))
        return found

    def _touching(self, m: Array) -> list[Array]:
        """Return where f' = m, for slopes of at least 1e-6: there the place errs by less than 1e-9, and f - m t, flat there, by less than 1e-18."""
        wide = 1 if self.facts["function"] == "tanh" else 2  # sigmoid(t) = 1/2 + tanh(t / 2) / 2
        t = wide * np.arctanh(np.sqrt(np.clip(1 - wide**2 * m, 0, 1 - 1e-9)))
        return [-t, t]

    def range(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Return the least and the largest value."""
        ends = self._extremes(np.zeros_like(low), low, high)
        return np.min([v - room for v, room in ends], 0), np.max([v + room for v, room in ends], 0)

    def lines(self, low: Array, high: Array, below: Array | None, over: Array | None) -> tuple[Array, Array, Array, Array]:
        """Return slope and intercept of a line below and one above over [low, high]: of the slopes asked for where f bends there, else the chord's."""
        if self.kind == "pieces":
            kinks = self.held["kinks"]
            bends = np.logical_or.reduce([(low < kink) & (kink < high) for kink in kinks])
            straight = self._slopes()[np.searchsorted(kinks, low, side="right")]
        else:
            bends, straight = high > low, np.zeros_like(low)
        chord = np.where(bends, (self.value(high)[0] - self.value(low)[0]) / np.where(bends, high - low, 1.0), straight)
        slopes = [chord if m is None else np.where(bends & np.isfinite(m), m, chord) for m in (below, over)]
        if self.kind == "curve":
            slopes = [np.where(m < 1e-6, 0.0, m) for m in slopes]
        under, up = (self._extremes(m, low, high) for m in slopes)
        return slopes[0], np.min([v - room for v, room in under], 0), slopes[1], np.max([v + room for v, room in up], 0)


# ---- the threat ------------------------------------------------------------------------------------------------------------------------------------


class Threat:
    """All x + d with |w d|_p <= radius, low <= d <= high. Offsets are rounded outward."""

    def __init__(self, facts: dict[str, Any], x: Array, arrays: dict[str, NDArray[Any]]) -> None:
        self.norm, self.radius, self.x = facts["norm"], float(facts["radius"]), x
        self.weight = np.broadcast_to(np.asarray(arrays.get("weights", 1.0), np.float64), x.shape)
        good = self.norm in ("linf", "l2", "l1") and 0 <= self.radius < math.inf and ((self.weight > 0) & np.isfinite(self.weight)).all()
        demand(good, "the threat is none that this checker knows: linf, l2 or l1, a radius of at least 0, weights above 0")
        reach = above(self.radius / self.weight)
        low, high = -reach, reach.copy()
        if "low" in arrays:
            floor, ceiling = (np.broadcast_to(np.asarray(arrays[name], np.float64), x.shape) for name in ("low", "high"))
            demand(((floor <= x) & (x <= ceiling)).all(), "the point lies outside the threat's box")
            low, high = np.maximum(low, -above(x - floor)), np.minimum(high, above(ceiling - x))
        free = np.broadcast_to(np.asarray(arrays.get("mask", True), bool), x.shape)
        self.low, self.high = np.where(free, low, 0.0), np.where(free, high, 0.0)

    def box(self) -> tuple[Array, Array]:
        """Return the smallest box around the set."""
        return np.where(self.low < 0, -above(-self.x - self.low), self.x), np.where(self.high > 0, above(self.x + self.high), self.x)

    def fall(self, a: Array) -> Array:
        """Return no less than the maximum of <-a, d>, (R,). For l1 and l2 by the dual function, an upper bound at any multiplier."""
        if self.norm == "linf":
            return np.asarray((np.maximum(-a * self.low, -a * self.high)).sum(1) * (1 + g(self.x.size + 8)) + TINY)
        slope = np.abs(a) / self.weight
        cap = np.minimum(above(np.where(a < 0, self.high, -self.low) * self.weight), above(np.asarray(self.radius, np.float64)))
        if self.norm == "l1":
            order = np.argsort(-slope, axis=1)
            full = np.cumsum(np.take_along_axis(cap, order, 1), 1) >= self.radius
            tau = np.where(full.any(1), np.take_along_axis(np.take_along_axis(slope, order, 1), full.argmax(1)[:, None], 1)[:, 0], 0.0)
            value = tau * self.radius + (np.maximum(slope - tau[:, None], 0) * cap).sum(1)
            size = tau * self.radius + (slope * cap).sum(1) * 2
        else:
            scale = self._multiplier(slope, cap)
            move = np.where(scale > 0, np.minimum(slope / np.where(scale > 0, scale, 1.0), cap), cap)
            value = (move * (slope - scale * move / 2)).sum(1) + scale[:, 0] * self.radius**2 / 2
            size = 2 * (slope * move).sum(1) + scale[:, 0] * self.radius**2
        return np.asarray(value + g(self.x.size + 32) * size + TINY)

    def _multiplier(self, slope: Array, cap: Array) -> Array:
        """Return a multiplier near the best, (R, 1): with the k features of the largest slope / cap held at their cap, the others' share one multiplier."""
        ratio = slope / np.maximum(cap, 1e-300)
        order = np.argsort(-ratio, axis=1)
        ratio, slope, cap = (np.take_along_axis(v, order, 1) for v in (ratio, slope, cap))
        none = np.zeros((len(slope), 1))
        left = self.radius**2 - np.concatenate([none, np.cumsum(cap**2, 1)[:, :-1]], 1)
        rest = np.cumsum((slope**2)[:, ::-1], 1)[:, ::-1]
        scale = np.sqrt(rest / np.where(left > 0, left, 1.0))
        fits = (ratio <= scale) & (left > 0)
        first = np.take_along_axis(scale, fits.argmax(1)[:, None], 1)
        free = np.asarray(np.sum(cap**2, 1, keepdims=True) <= self.radius**2)
        return np.where(free | ~fits.any(1, keepdims=True), 0.0, first)


# ---- the leaves --------------------------------------------------------------------------------------------------------------------------------------


class Leaf(dict[tuple[int, int], tuple[float, float]]):
    """The ends that a leaf's cuts set, by number and element."""


def covered(leaves: list[Leaf]) -> bool:
    """Do the leaves leave no gap? Looks for a cut that parts them in two lots, one on each side, and so on until a lot holds a leaf without cuts."""
    lots = [leaves]
    while lots:
        lot = lots.pop()
        if any(not leaf for leaf in lot):
            continue
        parts = parted(lot)
        if parts is None:
            return False
        lots += parts
    return True


def parted(lot: list[Leaf]) -> list[list[Leaf]] | None:
    """Return the leaves below and those above a value of an element that all are cut at, without that cut; None if there is no such value."""
    counts = Counter(key for leaf in lot for key in leaf)
    for key in (key for key, count in counts.items() if count == len(lot)):
        for value in sorted({end for leaf in lot for end in leaf[key] if math.isfinite(end)}):
            below, over = [leaf for leaf in lot if leaf[key][1] <= value], [leaf for leaf in lot if leaf[key][0] >= value and not leaf[key][1] <= value]
            if below and over and len(below) + len(over) == len(lot):
                return [[_without(leaf, key, value, side) for leaf in part] for side, part in ((1, below), (0, over))]
    return None


def _without(leaf: Leaf, key: tuple[int, int], value: float, side: int) -> Leaf:
    ends = list(leaf[key])
    if ends[side] == value:
        ends[side] = -math.inf if side == 0 else math.inf
    rest = Leaf({k: v for k, v in leaf.items() if k != key})
    if ends != [-math.inf, math.inf]:
        rest[key] = (ends[0], ends[1])
    return rest
