"""Confidence intervals for rates, curves and two-sided statements.

The intervals cover sampling only: other points of the same population could have been drawn. What
attacks missed and certificates could not prove is the gap between the upper and the lower bound,
and never enters an interval.
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
    # imported here because it takes a second, which only intervals need
    from scipy.stats import binomtest

    return binomtest(k, n, alternative=alternative).proportion_ci(
        confidence_level=confidence, method=method
    )


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of k successes in n points.

    Wilson 1927, without continuity correction.

    Args:
        k: Number of successes.
        n: Number of points, above 0.
        confidence: Confidence level, strictly between 0 and 1.

    Returns:
        The rate k / n and the two ends of its interval.

    Raises:
        ValueError: Unless 0 <= k <= n, n > 0 and 0 < confidence < 1.

    Example:
        >>> from calipers.record import wilson
        >>> interval = wilson(45, 50)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.786, 0.957)
    """
    ci = _proportion(k, n, confidence, "wilson", "two-sided")
    return Interval(k / n, float(ci.low), float(ci.high), confidence)


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the exact confidence interval of k successes in n points.

    Clopper and Pearson 1934. Its coverage is never below the stated level, also for very small or
    very large counts.

    Args:
        k: Number of successes.
        n: Number of points, above 0.
        confidence: Confidence level, strictly between 0 and 1.

    Returns:
        The rate k / n and the two ends of its interval.

    Raises:
        ValueError: Unless 0 <= k <= n, n > 0 and 0 < confidence < 1.

    Example:
        >>> from calipers.record import clopper_pearson
        >>> interval = clopper_pearson(45, 50)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.782, 0.967)
    """
    ci = _proportion(k, n, confidence, "exact", "two-sided")
    return Interval(k / n, float(ci.low), float(ci.high), confidence)


def two_sided(
    certified: int, surviving: int, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return a confidence interval [L, U] for the true robust accuracy.

    It holds whatever the attacks missed. L is the lower end of a one-sided Wilson interval of the
    certified count, U the upper end of one of the count that survived the attacks, at half the
    error each. Since certified <= robust <= surviving on every point, both ends are valid without
    any assumption on the strength of the attacks.

    Args:
        certified: Number of points that were proved robust.
        surviving: Number of points that no attack broke.
        n: Number of points, above 0.
        confidence: Confidence level of the whole interval, strictly between 0 and 1.

    Returns:
        The pair (L, U).

    Raises:
        ValueError: If more points are certified than survive, a count lies outside 0..n, n is not
            above 0, or the confidence does not lie strictly between 0 and 1.

    Example:
        >>> from calipers.record import two_sided
        >>> low, high = two_sided(40, 60, 100)
        >>> round(low, 3), round(high, 3)
        (0.309, 0.691)
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
    """Return the half width of a band around an empirical distribution.

    The band is simultaneous: it holds at all arguments at once (Dvoretzky, Kiefer and Wolfowitz
    1956, with Massart's constant).

    Args:
        n: Number of points, at least 1.
        confidence: Confidence level, strictly between 0 and 1.

    Returns:
        sqrt(log(2 / (1 - confidence)) / (2 n)).

    Raises:
        ValueError: If n is below 1.

    Example:
        >>> from calipers.record import dkw_half_width
        >>> round(dkw_half_width(1000), 4)
        0.0429
    """
    if n < 1:
        raise ValueError(f"a band needs at least one point, got {n}")
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * n))


def most_missed(tried: int, of: int, confidence: float = 0.95) -> int:
    """Return an upper confidence bound on how many points an audit missed.

    A tool that settled none of `tried` random points was not run on the rest of the `of` points:
    the bound says how many of them it would settle. It is one-sided and exact for draws without
    replacement: the largest count k for which drawing `tried` points and meeting none of the k has
    a probability of more than 1 - confidence, C(of - k, tried) / C(of, tried).

    Args:
        tried: Number of points that were tried.
        of: Number of points they were drawn from.
        confidence: Confidence level.

    Returns:
        The bound, a number of points.

    Raises:
        ValueError: Unless 0 <= tried <= of.

    Example:
        >>> from calipers.record.estimates import most_missed
        >>> most_missed(32, 100)
        7
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
