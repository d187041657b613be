"""Gaps between the bounds on a distance, and when they count as closed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calipers.record.bracket import Bracket
from calipers.threats.threat import Threat

# share of a distance within which its bounds count as equal: float32 examples lie beyond the
# decision boundary by up to that much, seldom by a tenth of it
MET = 1e-4
# share of the farthest corner's distance: if it is proved up to there, no example is left to find
_WHOLE = 1 - 1e-6


def gaps(bracket: Bracket, threat: Threat) -> NDArray[np.float64]:
    """Return (upper - lower) / upper of each point.

    It is 0 where the model is wrong at the point itself, and 1 where no example is known or nothing
    is proved. Where the distance is a count, a bracket is closed when no possible value lies
    inside: if 1 substitution is proved safe and 2 break the point, the distance is 2.
    """
    gap = np.ones_like(bracket.upper)
    known = np.isfinite(bracket.upper) & (bracket.upper > 0)
    gap[known] = 1 - bracket.lower[known] / bracket.upper[known]
    gap[bracket.upper == 0] = 0.0
    gap[known & (threat.next(torch.from_numpy(bracket.lower)).numpy() >= bracket.upper)] = 0.0
    return gap


def gap_between(lower: float, upper: float, threat: Threat) -> float:
    """Return the gap of one point: see `gaps`."""
    return float(gaps(Bracket(np.array([lower]), np.array([upper]), ("",), ("",)), threat)[0])


def met(bracket: Bracket, threat: Threat, widest: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return where the bracket needs no further search.

    Either both bounds agree within `MET`, or nothing adversarial is left in the whole box, whose
    farthest corner lies at `widest` (N,).
    """
    return (gaps(bracket, threat) <= MET) | (
        np.isinf(bracket.upper) & (bracket.lower >= widest * _WHOLE)
    )
