"""How steep can a polynomial score get? A bound from its weights by degree, and the true maximum
over a box beside it.

For z(x) = sum_a w_a x^a on |x_i| <= R the sum of the partial derivatives' magnitudes is at most
sum_k k s_k R^(k-1), with s_k = sum of |w_a| over the monomials of degree k: the partial derivatives
of each add up to at most k |w_a| R^(k-1). So the bound holds for the l1 norm of the gradient, and
with it for every l_p norm. With s_k = the *Euclidean* length of the weights it is false even for
the l2 norm: x1^2 + x1 x2 has gradient (3, 1) R at (R, R).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calipers.errors import BadInput

Floats = NDArray[np.float64]
Boxes = tuple[Floats, Floats]
_UNIT = 2.0**-53


@dataclass(frozen=True, eq=False)
class Polynomial:
    """Monomials `weights (T,)` times the product over features of x_i ^ `exponents (T, d)`, whole
    numbers >= 0; what has no term has no weight.

    >>> z = Polynomial.of({(1, 0): 3.0, (3, 0): 2.0})
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
        """Return the polynomial with those terms, exponents -> weight: x1^2 + 3 x1 x2 is {(2, 0):
        1, (1, 1): 3}.
        """
        if len({len(t) for t in terms}) != 1:
            raise BadInput("every term names an exponent for each feature")
        return cls(np.array(list(terms)), np.array(list(terms.values()), dtype=np.float64))

    def value(self, x: Floats) -> Floats:
        """Return z(x) for points x (M, d)."""
        return self._monomials(x) @ self.weights

    def _monomials(self, x: Floats) -> Floats:
        x = np.asarray(x, dtype=np.float64)
        return np.asarray(np.prod(x[:, None, :] ** self.exponents, axis=2), dtype=np.float64)

    @cached_property
    def partials(self) -> tuple[Polynomial, ...]:
        """The partial derivatives."""
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
        """s_k for k = 0, 1 ..: the sum of |w_a| over the monomials of degree k."""
        return np.asarray(
            np.bincount(self.exponents.sum(1), weights=np.abs(self.weights)), dtype=np.float64
        )

    def gradient_bound(self, reach: float) -> float:
        """Return sum_k k s_k R^(k-1) >= the l1 norm of the gradient wherever no |x_i| exceeds R =
        `reach`; rounded upward by more than its own error.
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

    def change_bound(self, x: Floats, radius: float) -> Floats:
        """Return how much z can change within linf radius of points x (M, d), (M,): radius * the
        gradient bound over what they can reach.
        """
        reach = np.abs(np.asarray(x, dtype=np.float64)).max(axis=1) + radius
        return np.array(
            [radius * self.gradient_bound(float(np.nextafter(r, np.inf))) for r in reach]
        )

    def enclosure(self, low: Floats, high: Floats) -> Boxes:
        """Return numbers (M,) below and above z over boxes (M, d): each monomial by itself, rounded
        outward.
        """
        floor, ceiling, size = np.zeros(len(low)), np.zeros(len(low)), np.zeros(len(low))
        for weight, exponents in zip(self.weights.tolist(), self.exponents, strict=True):
            a, b = np.full(len(low), weight), np.full(len(low), weight)
            for i in np.flatnonzero(exponents):
                a, b = _times((a, b), _power(low[:, i], high[:, i], int(exponents[i])))
            floor, ceiling, size = floor + a, ceiling + b, size + np.maximum(np.abs(a), np.abs(b))
        # Every monomial is a product of as many factors as its degree has, each rounded once; then
        # come the additions.
        room = (
            size * (2 * int(self.exponents.sum(1).max()) + len(self.weights) + 8) * 2 * _UNIT
            + 2.0**-1000
        )
        return floor - room, ceiling + room


def _is_whole(numbers: list[float]) -> bool:
    """Does arithmetic on these not round? Whole numbers of no more than 53 bits do not."""
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
    """The maximum of a function over a box lies in [`lower`, `upper`]: the first is attained at
    `point`, the second proved.
    """

    lower: float
    upper: float
    point: tuple[float, ...]


def largest_value(
    z: Polynomial, low: Floats, high: Floats, tolerance: float = 1e-6, most: int = 200_000
) -> Maximum:
    """Return the maximum of a polynomial over a box low <= x <= high (d,), to a relative tolerance;
    see `largest_gradient`.
    """
    return _search(
        lambda a, b: z.enclosure(a, b)[1], z.value, z.partials, low, high, tolerance, most
    )


def largest_gradient(
    z: Polynomial, low: Floats, high: Floats, tolerance: float = 1e-6, most: int = 200_000
) -> Maximum:
    """Return the maximum of the l1 norm of the gradient over a box low <= x <= high (d,), to a
    relative tolerance.

    Interval branch and bound (Moore 1966): boxes whose upper bound exceeds the best value found are
    halved along their longest side, at most `most` of them. What is left open then stands in
    `upper`, so the answer is right in any case. Cost: exponential in d at worst.
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
        bound, lambda x: np.abs(z.gradient(x)).sum(axis=1), (), low, high, tolerance, most
    )


def _search(
    bound: Callable[[Floats, Floats], Floats],
    value: Callable[[Floats], Floats],
    partials: tuple[Polynomial, ...],
    low: Floats,
    high: Floats,
    tolerance: float,
    most: int,
) -> Maximum:
    lows, highs = (np.asarray(end, dtype=np.float64)[None] for end in (low, high))
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
    """Return the boxes without what cannot hold a maximum: where a partial derivative keeps its
    sign only one end of that feature is left.
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
