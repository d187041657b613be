"""Between which two numbers does each adversarial distance lie? The bracket, and its one
operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calipers.errors import Contradiction
from calipers.record.evidence import Evidence

Verdict = Literal["robust", "broken", "unknown", "invalid"]


@dataclass(frozen=True)
class Bracket:
    """lower <= d* <= upper for N points, with the tool that set each end.

    `lower` (N,) float64: nothing adversarial lies within that distance, closed ball (0 is the empty
    claim). `upper` (N,) float64: an adversarial example stands at that distance (infinity where
    none is known). Joining is commutative, associative and idempotent, so resuming, retrying,
    sharding and merging are one operation.
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    lower_tool: tuple[str, ...]
    upper_tool: tuple[str, ...]

    def __post_init__(self) -> None:
        wrong = np.flatnonzero(~_in_order(self.lower, self.upper))
        if wrong.size:
            i = int(wrong[0])
            raise Contradiction(
                f"point {i}: {self.lower_tool[i] or 'nobody'} certifies {self.lower[i]:.9g}, but "
                f"the witness of {self.upper_tool[i] or 'nobody'} stands at {self.upper[i]:.9g} "
                f"({wrong.size} of {len(self.lower)} points contradict). One of the two tools is "
                "wrong: replay both with `calipers check RECORD`, and please report it with the "
                "record."
            )

    @classmethod
    def open(cls, n: int) -> Bracket:
        """Return the bracket that claims nothing: [0, infinity) for `n` points."""
        return cls(np.zeros(n), np.full(n, np.inf), ("",) * n, ("",) * n)

    @classmethod
    def of(cls, names: Sequence[str], evidence: Iterable[Evidence]) -> Bracket:
        """Return the join of all facts about the points `names`; facts about other points are
        passed over.
        """
        growing = Growing(names)
        growing.add(evidence, check=False)
        return growing.bracket()

    def join(self, other: Bracket) -> Bracket:
        """Return the tighter of both at each end; raises `Contradiction` where the ends cross."""
        low = [
            _closer(b, q, a, p, sign=-1)
            for a, b, p, q in zip(
                self.lower, other.lower, self.lower_tool, other.lower_tool, strict=True
            )
        ]
        up = [
            _closer(b, q, a, p, sign=1)
            for a, b, p, q in zip(
                self.upper, other.upper, self.upper_tool, other.upper_tool, strict=True
            )
        ]
        return Bracket(
            np.where(low, other.lower, self.lower),
            np.where(up, other.upper, self.upper),
            tuple(
                q if take else p
                for take, p, q in zip(low, self.lower_tool, other.lower_tool, strict=True)
            ),
            tuple(
                q if take else p
                for take, p, q in zip(up, self.upper_tool, other.upper_tool, strict=True)
            ),
        )

    def verdicts(self, radius: NDArray[np.float64] | float) -> list[Verdict]:
        """Read the bracket at a radius: `upper <= radius` broken, `lower >= radius` robust, else
        unknown.
        """
        r = np.broadcast_to(np.asarray(radius, dtype=np.float64), self.lower.shape)
        return [
            "broken" if up <= e else "robust" if low >= e else "unknown"
            for low, up, e in zip(self.lower, self.upper, r, strict=True)
        ]


class Growing:
    """A bracket of the points `names` that facts are joined to as they come, in place: `lower (N,)`
    and `upper (N,)` as in `Bracket`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        n = len(names)
        self.lower, self.upper = np.zeros(n), np.full(n, np.inf)
        self._place = {name: i for i, name in enumerate(names)}
        self._lower_tool, self._upper_tool = [""] * n, [""] * n

    def add(self, evidence: Iterable[Evidence], *, check: bool = True) -> list[int]:
        """Join facts, those about other points passed over, and return the places whose ends moved;
        `check` raises `Contradiction` where the ends cross.
        """
        moved = list[int]()
        for fact in evidence:
            i = self._place.get(fact.point)
            if i is None:
                continue
            if fact.kind == "certificate" and _closer(
                fact.radius, fact.tool, self.lower[i], self._lower_tool[i], sign=-1
            ):
                self.lower[i], self._lower_tool[i] = fact.radius, fact.tool
                moved.append(i)
            if fact.kind == "witness" and _closer(
                fact.radius, fact.tool, self.upper[i], self._upper_tool[i], sign=1
            ):
                self.upper[i], self._upper_tool[i] = fact.radius, fact.tool
                moved.append(i)
        if check and any(not _in_order(self.lower[i], self.upper[i]) for i in moved):
            self.bracket()  # says what is wrong
        return moved

    def bracket(self, places: Sequence[int] | None = None) -> Bracket:
        """Return the bracket as it is now, of all points or of those at some places."""
        if places is None:
            ends = self.lower.copy(), self.upper.copy()
            return Bracket(*ends, tuple(self._lower_tool), tuple(self._upper_tool))
        index = np.asarray(places, dtype=np.int64)
        return Bracket(
            self.lower[index],
            self.upper[index],
            tuple(self._lower_tool[i] for i in places),
            tuple(self._upper_tool[i] for i in places),
        )


def _in_order(lower: NDArray[np.float64], upper: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Do the ends not cross? Written so that a NaN on either side is a contradiction too."""
    return np.asarray((lower < upper) | ((lower == 0) & (upper == 0)))


def _closer(value: float, tool: str, held: float, holder: str, *, sign: int) -> bool:
    """Is `value` the tighter end? Equal values are decided by the tool's name, so that the order of
    joining cannot be seen.
    """
    if np.isnan(value):
        raise Contradiction(f"{tool} claims a distance that is not a number")
    if value != held:
        return sign * value < sign * held
    return bool(tool) and (not holder or tool < holder)
