"""Bounds on the gradient of a polynomial score over a box.

The first bound needs only the weights, summed by degree; the second is the true maximum, by branch
and bound.

For z(x) = sum_a w_a x^a on |x_i| <= R, the sum of the partial derivatives' magnitudes is at most
sum_k k s_k R^(k-1), where s_k is the sum of |w_a| over the monomials of degree k: the partial
derivatives of each monomial add up to at most k |w_a| R^(k-1). So the bound holds for the l1 norm
of the gradient, and with it for every l_p norm. With s_k = the *Euclidean* length of the weights it
is false even for the l2 norm: x1^2 + x1 x2 has gradient (3, 1) R at (R, R).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calipers.errors import BadInput

Floats = NDArray[np.float64]
Boxes = tuple[Floats, Floats]
_UNIT = 2.0**-53


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A polynomial in d variables with T terms.

    It is the sum over the terms t of weights[t] * prod_i x_i ^ exponents[t, i]. Use `Polynomial.of`
    to write the terms as a dictionary.

    Args:
        exponents: (T, d), whole numbers >= 0, at least one term; stored as int64.
        weights: (T,), finite; stored as float64.

    Raises:
        BadInput: the shapes do not agree, an exponent is not a whole number >= 0, or a weight is
            not finite.

    Example:
        >>> z = Polynomial.of({(1, 0): 3.0, (3, 0): 2.0})  # 3 x1 + 2 x1^3
        >>> z.gradient(np.array([[2.0, 5.0]])).tolist()
        [[27.0, 0.0]]
        >>> z.degrees.tolist(), z.gradient_bound(2.0)
        ([0.0, 3.0, 0.0, 2.0], 27.0)
    """

    exponents: NDArray[np.int64]
    weights: Floats

    def __post_init__(self) -> None:
        exponents, weights = np.asarray(self.exponents), np.asarray(self.weights, dtype=np.float64)
        if exponents.ndim != 2 or not len(exponents) or weights.shape != exponents.shape[:1]:
            raise BadInput(
                "a polynomial has exponents (T, d) and weights (T,), at least one term; got "
                f"{exponents.shape} and {weights.shape}"
            )
        if (
            (exponents < 0).any()
            or (exponents != np.floor(exponents)).any()
            or not np.isfinite(weights).all()
        ):
            raise BadInput("exponents must be whole numbers >= 0 and weights finite")
        object.__setattr__(self, "exponents", exponents.astype(np.int64))
        object.__setattr__(self, "weights", weights)

    @classmethod
    def of(cls, terms: Mapping[tuple[int, ...], float]) -> Polynomial:
        """Return the polynomial with the given terms.

        Args:
            terms: the weight of each tuple of exponents: x1^2 + 3 x1 x2 is {(2, 0): 1, (1, 1): 3}.

        Raises:
            BadInput: there is no term, or the tuples differ in length.
        """
        if len({len(t) for t in terms}) != 1:
            raise BadInput("every term names an exponent for each feature")
        return cls(np.array(list(terms)), np.array(list(terms.values()), dtype=np.float64))

    def value(self, x: Floats) -> Floats:
        """Return z(x) for points x (M, d), as (M,)."""
        return self._monomials(x) @ self.weights

    def _monomials(self, x: Floats) -> Floats:
        x = np.asarray(x, dtype=np.float64)
        return np.asarray(np.prod(x[:, None, :] ** self.exponents, axis=2), dtype=np.float64)

    @cached_property
    def partials(self) -> tuple[Polynomial, ...]:
        """Partial derivatives, one polynomial for each of the d variables."""
        return tuple(self._partial(i) for i in range(self.exponents.shape[1]))

    def _partial(self, i: int) -> Polynomial:
        power, lower = self.exponents[:, i], self.exponents.copy()
        lower[:, i] = np.maximum(power - 1, 0)
        return Polynomial(lower, self.weights * power)

    def gradient(self, x: Floats) -> Floats:
        """Return the gradients (M, d) at points x (M, d)."""
        return np.stack([p.value(x) for p in self.partials], axis=1)

    @cached_property
    def degrees(self) -> Floats:
        """The sum s_k of |w_a| over the monomials of degree k, for k = 0, 1, ..."""
        return np.asarray(
            np.bincount(self.exponents.sum(1), weights=np.abs(self.weights)), dtype=np.float64
        )

    def gradient_bound(self, reach: float) -> float:
        """Return an upper bound of the gradient's l1 norm on |x_i| <= R.

        It is sum_k k s_k R^(k-1), with s_k as in `degrees`. The sum is rounded upward by more than
        its own rounding error; where all numbers in it are whole and nothing rounds, it is exact.

        Args:
            reach: R, the largest magnitude that any variable takes, finite and >= 0.

        Raises:
            BadInput: `reach` is negative or not finite.
        """
        if not 0 <= reach < math.inf:
            raise BadInput(f"the range of the features is a finite number >= 0, got {reach}")
        terms = [k * s * reach ** (k - 1) for k, s in enumerate(self.degrees.tolist()) if k and s]
        exact = math.fsum(terms)
        return (
            exact
            if _is_whole([*self.weights.tolist(), reach, *terms])
            else exact * (1 + (len(self.weights) + len(terms) * 4 + 8) * 2 * _UNIT)
        )

    def enclosure(self, low: Floats, high: Floats) -> Boxes:
        """Return bounds (M,) below and above z over boxes (M, d).

        Each monomial is bounded by itself with interval arithmetic; the sums are rounded outward.
        """
        floor, ceiling, size = np.zeros(len(low)), np.zeros(len(low)), np.zeros(len(low))
        for weight, exponents in zip(self.weights.tolist(), self.exponents, strict=True):
            a, b = np.full(len(low), weight), np.full(len(low), weight)
            for i in np.flatnonzero(exponents):
                a, b = _times((a, b), _power(low[:, i], high[:, i], int(exponents[i])))
            floor, ceiling, size = floor + a, ceiling + b, size + np.maximum(np.abs(a), np.abs(b))
        # Each monomial is a product with one factor, rounded once, for each unit of its degree;
        # then come the additions.
        room = (
            size * (2 * int(self.exponents.sum(1).max()) + len(self.weights) + 8) * 2 * _UNIT
            + 2.0**-1000
        )
        return floor - room, ceiling + room


def _is_whole(numbers: list[float]) -> bool:
    """Return whether arithmetic on these numbers does not round.

    It does not where all are whole and their magnitudes add up to less than 2^53.
    """
    return all(n == math.floor(n) for n in numbers) and sum(map(abs, numbers)) < 2.0**53


def _power(low: Floats, high: Floats, k: int) -> Boxes:
    ends = low**k, high**k
    floor, ceiling = np.minimum(*ends), np.maximum(*ends)
    return (
        (np.where((low < 0) & (high > 0), 0.0, floor), ceiling) if k % 2 == 0 else (floor, ceiling)
    )


def _times(p: Boxes, q: Boxes) -> Boxes:
    corners = np.stack([a * b for a in p for b in q])
    return corners.min(axis=0), corners.max(axis=0)


@dataclass(frozen=True)
class Maximum:
    """Bounds on the maximum of a function over a box.

    The maximum lies in [`lower`, `upper`]. `lower` is the function's value at `point`, computed in
    float64; `upper` is proved.
    """

    lower: float
    upper: float
    point: tuple[float, ...]


def largest_value(
    z: Polynomial, low: Floats, high: Floats, tolerance: float = 1e-6, most: int = 200_000
) -> Maximum:
    """Return bounds on the maximum of a polynomial over a box.

    Args:
        z: the polynomial, in d variables.
        low: the lower ends of the box, (d,).
        high: the upper ends of the box, (d,), no less than `low`.
        tolerance: the search ends when the bounds differ by no more than this, relative to the best
            value found.
        most: the number of boxes after which the search ends in any case.

    Returns:
        A `Maximum`. It holds the true maximum also where the search ended early.

    Raises:
        BadInput: the ends do not make a box.

    Example:
        >>> z = Polynomial.of({(1,): 3.0, (3,): 2.0})
        >>> found = largest_value(z, np.array([-1.0]), np.array([1.0]))
        >>> found.lower, found.point, found.upper < 5.00001
        (5.0, (1.0,), True)

    Cost and method: see `largest_gradient`.
    """
    sought = _Sought(lambda a, b: z.enclosure(a, b)[1], z.value, z.partials)
    return _search(sought, (low, high), tolerance, most)


def largest_gradient(
    z: Polynomial, low: Floats, high: Floats, tolerance: float = 1e-6, most: int = 200_000
) -> Maximum:
    """Return bounds on the largest gradient over a box, in the l1 norm.

    Interval branch and bound (Moore 1966): boxes whose upper bound exceeds the best value found are
    halved along their longest side, at most `most` of them. What is left open then counts in
    `upper`, so the answer is right in any case.

    Args:
        z: the polynomial, in d variables.
        low: the lower ends of the box, (d,).
        high: the upper ends of the box, (d,), no less than `low`.
        tolerance: the search ends when the bounds differ by no more than this, relative to the best
            value found.
        most: the number of boxes after which the search ends in any case.

    Returns:
        A `Maximum` of the gradient's l1 norm.

    Raises:
        BadInput: the ends do not make a box.

    Example:
        >>> z = Polynomial.of({(2, 0): 1.0, (1, 1): 1.0})  # gradient (2 x1 + x2, x1)
        >>> found = largest_gradient(z, np.array([-1.0, -1.0]), np.array([1.0, 1.0]))
        >>> found.lower, found.upper < 4.00001
        (4.0, True)

    Cost: exponential in d at worst.
    """

    def bound(a: Floats, b: Floats) -> Floats:
        ends = [
            np.maximum(np.abs(p), np.abs(q))
            for p, q in (part.enclosure(a, b) for part in z.partials)
        ]
        return np.asarray(
            np.sum(ends, axis=0) * (1 + (len(ends) + 2) * 2 * _UNIT), dtype=np.float64
        )

    return _search(
        _Sought(bound, lambda x: np.abs(z.gradient(x)).sum(axis=1)), (low, high), tolerance, most
    )


class _Sought(NamedTuple):
    """The function whose maximum is sought.

    `bound(low, high)` are upper bounds over boxes, `value` is the function at points, and
    `partials` are its partial derivatives where they are known.
    """

    bound: Callable[[Floats, Floats], Floats]
    value: Callable[[Floats], Floats]
    partials: tuple[Polynomial, ...] = ()


def _search(sought: _Sought, box: Boxes, tolerance: float, most: int) -> Maximum:
    bound, value, partials = sought
    lows, highs = (np.asarray(end, dtype=np.float64)[None] for end in box)
    if lows.shape != highs.shape or not (lows <= highs).all():
        raise BadInput("a box is low <= high in every feature")
    best, point, seen, dropped = -np.inf, lows[0], 0, -np.inf
    while len(lows) and seen < most:
        seen += len(lows)
        tried = np.concatenate([(lows + highs) / 2, lows, highs])
        values = value(tried)
        if values.max() > best:
            best, point = float(values.max()), tried[int(values.argmax())]
        upper = bound(lows, highs)
        enough = upper <= best + tolerance * max(abs(best), 1e-300)
        dropped = max(dropped, float(upper[enough].max(initial=-np.inf)))
        lows, highs = _halved(*_risen(partials, lows[~enough], highs[~enough]))
    still = float(bound(lows, highs).max(initial=-np.inf)) if len(lows) else -np.inf
    return Maximum(best, max(best, dropped, still), tuple(map(float, point)))


def _risen(partials: tuple[Polynomial, ...], low: Floats, high: Floats) -> Boxes:
    """Return the boxes reduced to where a maximum can be.

    Where a partial derivative keeps its sign over a box, only one end of that variable is left.
    """
    low, high = low.copy(), high.copy()
    for i, partial in enumerate(partials):
        least, most = partial.enclosure(low, high)
        low[:, i], high[:, i] = (
            np.where(least > 0, high[:, i], low[:, i]),
            np.where(most < 0, low[:, i], high[:, i]),
        )
    return low, high


def _halved(low: Floats, high: Floats) -> Boxes:
    if not len(low):
        return low, high
    row, side = np.arange(len(low)), (high - low).argmax(axis=1)
    middle = (low[row, side] + high[row, side]) / 2
    first, second = high.copy(), low.copy()
    first[row, side], second[row, side] = middle, middle
    return np.concatenate([low, second]), np.concatenate([first, high])


__all__ = ["Maximum", "Polynomial", "largest_gradient", "largest_value"]
