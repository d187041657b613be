"""Brackets: lower and upper bounds on adversarial distances."""

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
    """Bounds lower <= d* <= upper on the adversarial distances d* of N points.

    Brackets are joined by taking the tighter bound at each end. The join is commutative,
    associative and idempotent, so that resuming, retrying, sharding and merging runs are one
    operation.

    Args:
        lower: (N,) float64, in native units. Nothing adversarial lies within that distance (closed
            ball); 0 claims nothing.
        upper: (N,) float64, in native units. An adversarial example is known at that distance;
            infinity where none is known.
        lower_tool: The repr of the tool that set each lower bound, "" where there is none.
        upper_tool: The same for each upper bound.

    Returns:
        A frozen dataclass.

    Raises:
        Contradiction: A lower bound is not below its upper bound (both may be 0: the point is
            misclassified), or one of them is NaN.

    Example:
        >>> from calipers.record.bracket import Bracket
        >>> from calipers.record.evidence import Evidence
        >>> proof = Evidence("a", "certificate", "CROWN()", 0.01)
        >>> found = Evidence("a", "witness", "PGD()", 0.03)
        >>> bracket = Bracket.of(["a"], [proof, found])
        >>> float(bracket.lower[0]), float(bracket.upper[0])
        (0.01, 0.03)
        >>> bracket.verdicts(0.02), bracket.verdicts(0.04)
        (['unknown'], ['broken'])
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
        """Return the bracket [0, infinity) for `n` points, which claims nothing."""
        return cls(np.zeros(n), np.full(n, np.inf), ("",) * n, ("",) * n)

    @classmethod
    def of(cls, names: Sequence[str], evidence: Iterable[Evidence]) -> Bracket:
        """Return the join of all facts about the points `names`.

        Facts about other points are skipped. Raises `Contradiction` where the bounds of a point
        cross.
        """
        growing = Growing(names)
        growing.add(evidence, check=False)
        return growing.bracket()

    def join(self, other: Bracket) -> Bracket:
        """Return the bracket with the tighter of both bounds at each end.

        Raises `Contradiction` where the bounds cross.
        """
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
        """Return the verdict of each point at a radius.

        A point is "broken" where `upper <= radius`, "robust" where `lower >= radius`, and else
        "unknown". The radius is one number or (N,), in native units.
        """
        r = np.broadcast_to(np.asarray(radius, dtype=np.float64), self.lower.shape)
        return [
            "broken" if up <= e else "robust" if low >= e else "unknown"
            for low, up, e in zip(self.lower, self.upper, r, strict=True)
        ]


class Growing:
    """A bracket of the points `names` that facts are joined to in place.

    `lower` (N,) and `upper` (N,) are as in `Bracket`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        n = len(names)
        self.lower, self.upper = np.zeros(n), np.full(n, np.inf)
        self._place = {name: i for i, name in enumerate(names)}
        self._lower_tool, self._upper_tool = [""] * n, [""] * n

    def add(self, evidence: Iterable[Evidence], *, check: bool = True) -> list[int]:
        """Join facts, and return the places whose bounds moved.

        Facts about other points are skipped. With `check`, raises `Contradiction` where the bounds
        of a point cross.
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
            self.bracket()  # raises, with a message that says what is wrong
        return moved

    def bracket(self, places: Sequence[int] | None = None) -> Bracket:
        """Return the bracket as it is now, of all points or of those at `places`."""
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
    """Return where the bounds do not cross.

    Written so that NaN in either bound counts as a contradiction too.
    """
    return np.asarray((lower < upper) | ((lower == 0) & (upper == 0)))


def _closer(value: float, tool: str, held: float, holder: str, *, sign: int) -> bool:
    """Return whether `value` is the tighter bound.

    `sign` is -1 for lower bounds and 1 for upper ones. Ties are decided by the tool's name, so that
    the result does not depend on the order of joining. Raises `Contradiction` for NaN.
    """
    if np.isnan(value):
        raise Contradiction(f"{tool} claims a distance that is not a number")
    if value != held:
        return sign * value < sign * held
    return bool(tool) and (not holder or tool < holder)
