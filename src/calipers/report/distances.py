"""Robust accuracy over the radius, and how the distances are distributed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calipers.record.estimates import dkw_half_width

Floats = NDArray[np.float64]
_BINS = 24


@dataclass(frozen=True, eq=False)
class Curve:
    """Robust accuracy over the radius, as two step functions read at `radii`.

    The true curve lies between them at every radius. `certified[i]` is the share of points with
    lower >= radii[i] and holds back to the previous knot; `attacked[i]` is the share with upper >
    radii[i] and holds on to the next. [certified - half_width, attacked + half_width] contains the
    population's whole curve at once: each side is a one-sided Dvoretzky-Kiefer-Wolfowitz band at
    half the error, which has the same constant as the two-sided one. `reach` is the end of the
    drawn range.
    """

    radii: Floats
    certified: Floats
    attacked: Floats
    half_width: float
    reach: float

    def at(self, radius: float) -> tuple[float, float]:
        """Return the certified and the attacked share at a radius."""
        behind = int(np.searchsorted(self.radii, radius, side="left"))
        before = int(np.searchsorted(self.radii, radius, side="right")) - 1
        certified = float(self.certified[behind]) if behind < len(self.radii) else 0.0
        return certified, float(self.attacked[max(before, 0)])


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of the lower and of the upper bounds on distances.

    Bounds that are no distance are counted apart: no witness, no certificate, misclassified at the
    point itself.
    """

    edges: Floats
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    no_witness: int
    no_certificate: int
    clean_errors: int


@dataclass(frozen=True)
class Quantile:
    """The distance below which the given share of points lies.

    It is between `lower` and `upper` for these points. `low` and `high` add sampling: they contain
    the population's quantile, for all shares at once.
    """

    share: float
    lower: float
    upper: float
    low: float
    high: float


def curve_of(
    lower: Floats, upper: Floats, seen: NDArray[np.bool_], radius: float, confidence: float
) -> Curve:
    """Return both step functions of N brackets.

    `seen` (N,) tells on which points the model was run; `radius` is the largest one asked.
    """
    n, reach = len(lower), _reach(lower, upper, radius)
    # A point on which the model is wrong, or was never run, is not robust at radius 0 either: its
    # lower bound of 0, which claims nothing, must not count there.
    claims = np.sort(np.where(seen & (upper > 0), lower, -1.0))
    ends = np.concatenate([lower, upper[np.isfinite(upper)], [0.0, reach]])
    radii = np.unique(np.append(ends, radius) if np.isfinite(radius) else ends)
    if not n:
        return Curve(radii, np.zeros(len(radii)), np.ones(len(radii)), 1.0, reach)
    certified = 1 - np.searchsorted(claims, radii, side="left") / n
    attacked = 1 - np.searchsorted(np.sort(upper), radii, side="right") / n
    return Curve(radii, certified, attacked, dkw_half_width(n, confidence), reach)


def _reach(lower: Floats, upper: Floats, radius: float) -> float:
    """Return how far a figure of these distances should extend.

    That is beyond the radius asked and beyond all bounds but the farthest 1 %.
    """
    ends = np.concatenate([lower, upper])
    ends = ends[np.isfinite(ends) & (ends > 0)]
    asked = 1.5 * radius if np.isfinite(radius) and radius > 0 else 0.0
    if not ends.size:
        return asked or 1.0
    far = 1.05 * float(np.quantile(ends, 0.99))
    # a radius that is only an upper limit for a search of distances would squash the figure
    return far if asked > 6 * far else max(asked, far)


def histogram_of(lower: Floats, upper: Floats, reach: float) -> Histogram:
    """Return the counts of both bounds in equal bins from 0 to `reach`.

    Bounds beyond `reach` fall into the last bin.
    """
    edges = np.linspace(0.0, reach, _BINS + 1)
    low, high = lower[lower > 0], upper[np.isfinite(upper) & (upper > 0)]
    counts = [np.histogram(np.minimum(ends, reach), bins=edges)[0] for ends in (low, high)]
    wrong = int(np.sum(upper == 0))
    return Histogram(
        edges,
        counts[0],
        counts[1],
        int(np.sum(np.isinf(upper))),
        int(np.sum(lower == 0)) - wrong,
        wrong,
    )


def quantiles_of(lower: Floats, upper: Floats, half_width: float) -> tuple[Quantile, ...]:
    """Return bounds on the 10 %, 50 % and 90 % quantiles of the distance.

    There are none without points.
    """
    if not len(lower):
        return ()
    low, high = np.sort(lower), np.sort(upper)
    return tuple(
        Quantile(
            q,
            _order(low, q),
            _order(high, q),
            _order(low, q - half_width),
            _order(high, q + half_width),
        )
        for q in (0.1, 0.5, 0.9)
    )


def _order(values: Floats, share: float) -> float:
    """Return the quantile of sorted values at `share`.

    That is the smallest value that at least `share` of the values do not exceed; 0 for shares of 0
    and less, infinity for shares above 1.
    """
    if share > 1:
        return math.inf
    return float(values[math.ceil(share * len(values) - 1e-9) - 1]) if share > 0 else 0.0
