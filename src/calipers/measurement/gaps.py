"""How far apart are the two ends of a distance, and when is there nothing left to look for between
them?
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calipers.problem.threat import Threat
from calipers.record.bracket import Bracket

# share of a distance within which both its ends count as one: examples of float32 overstep the
# boundary by up to that much, seldom by a tenth of it
MET = 1e-4
# share of the farthest corner's distance: proved up to there, no example is left to find
_WHOLE = 1 - 1e-6


def gaps(bracket: Bracket, threat: Threat) -> NDArray[np.float64]:
    """Return (upper - lower) / upper of each point: 0 where the model is wrong already, 1 where
    nothing is known.

    Where the threat counts, a bracket is as good as shut when no number lies inside: proved at 1
    switch and broken at 2, the distance is 2.
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
    """Return where both ends count as one, or nothing adversarial is left in the whole box, whose
    farthest corner lies at `widest` (N,).
    """
    return (gaps(bracket, threat) <= MET) | (
        np.isinf(bracket.upper) & (bracket.lower >= widest * _WHOLE)
    )
