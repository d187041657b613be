"""What do the counted points say about the population? Confidence intervals for rates, curves and
the two-sided statement.

The intervals cover sampling only: that other points of the same population could have been drawn.
What attacks missed and certificates could not prove is the gap between the two jaws, and never
enters an interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Interval:
    """A rate `k / n` with the ends of its confidence interval."""

    rate: float
    low: float
    high: float
    confidence: float


def _proportion(
    k: int,
    n: int,
    confidence: float,
    method: Literal["wilson", "exact"],
    alternative: Literal["two-sided", "less", "greater"],
) -> Any:
    if not (0 <= k <= n and n > 0):
        raise ValueError(f"a rate needs 0 <= k <= n and n > 0, got k={k}, n={n}")
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence must lie strictly between 0 and 1 (usually 0.95), got {confidence}"
        )
    from scipy.stats import binomtest  # a second of import, paid only by who asks for an interval

    return binomtest(k, n, alternative=alternative).proportion_ci(
        confidence_level=confidence, method=method
    )


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of k successes in n points (Wilson 1927, without continuity
    correction).
    """
    ci = _proportion(k, n, confidence, "wilson", "two-sided")
    return Interval(k / n, float(ci.low), float(ci.high), confidence)


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the exact interval (Clopper and Pearson 1934); never covers less than stated, also for
    very small or very large counts.
    """
    ci = _proportion(k, n, confidence, "exact", "two-sided")
    return Interval(k / n, float(ci.low), float(ci.high), confidence)


def two_sided(
    certified: int, surviving: int, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return [L, U] that holds the true robust accuracy with the given confidence, whatever the
    attacks missed.

    L is the lower end of a one-sided Wilson interval of the certified count, U the upper end of one
    of the count that survived the attacks, at half the error each. Since certified <= robust <=
    surviving on every point, both ends are valid without any assumption about attack strength.
    """
    if certified > surviving:
        raise ValueError(
            f"{certified} points certified but only {surviving} survive the attacks: the two "
            "counts contradict"
        )
    one_sided = 1 - (1 - confidence) / 2
    low = _proportion(certified, n, one_sided, "wilson", "greater").low
    high = _proportion(surviving, n, one_sided, "wilson", "less").high
    return float(low), float(high)


def dkw_half_width(n: int, confidence: float = 0.95) -> float:
    """Return the half width of a simultaneous band around an empirical distribution function
    (Dvoretzky, Kiefer, Wolfowitz; Massart's constant).
    """
    if n < 1:
        raise ValueError(f"a band needs at least one point, got {n}")
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * n))


def most_missed(tried: int, of: int, confidence: float = 0.95) -> int:
    """Return the upper confidence bound of how many of `of` points a tool would settle that settled
    none of `tried` random ones of them.

    One-sided and exact for draws without replacement: the largest count k for which drawing `tried`
    points and meeting none of the k has a chance of more than 1 - confidence, C(of - k, tried) /
    C(of, tried).
    """
    if not 0 <= tried <= of:
        raise ValueError(f"an audit tries some of the points, got {tried} of {of}")
    missed, chance = 0, 1.0
    while missed < of - tried:
        chance *= (of - tried - missed) / (of - missed)
        if chance <= 1 - confidence:
            break
        missed += 1
    return missed
