"""What is known in a run: its evidence, joined as it comes.

The cost of adding a fact does not grow with the number of facts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from calipers.record.bracket import Bracket, Growing
from calipers.record.evidence import Evidence
from calipers.record.record import Key


class Known:
    """All evidence about the points `names`, asked at `radii` (N,).

    It also keeps what each tool has tried and settled. `facts` grows in place: others may hold the
    list.
    """

    def __init__(
        self, names: Sequence[str], radii: NDArray[np.float64], evidence: Iterable[Evidence] = ()
    ) -> None:
        self.names, self.radii, self.facts = names, radii, list[Evidence]()
        self._begin()
        self.add(evidence)

    def _begin(self) -> None:
        self._growing = Growing(self.names)
        self._settled = self.radii <= 0
        self._tried: dict[str, set[tuple[str, float]]] = {}
        self._ends: dict[str, dict[str, tuple[float, float]]] = {}
        self.settled = int(self._settled.sum())

    def add(self, evidence: Iterable[Evidence]) -> None:
        """Add facts; raises `Contradiction` where the bounds of a point cross."""
        evidence = list(evidence)
        self.facts += evidence
        for e in evidence:
            if e.kind == "attempt":
                self._tried.setdefault(e.tool, set()).add((e.point, e.radius))
            elif e.kind in ("certificate", "witness"):
                ends = self._ends.setdefault(e.tool, {})
                low, up = ends.get(e.point, (0.0, np.inf))
                ends[e.point] = (
                    (max(low, e.radius), up)
                    if e.kind == "certificate"
                    else (low, min(up, e.radius))
                )
        for i in self._growing.add(evidence):
            now = self._growing.upper[i] <= self.radii[i] or self._growing.lower[i] >= self.radii[i]
            self.settled += int(now) - int(self._settled[i])
            self._settled[i] = now

    def finish(self, over: AbstractSet[Key], tried: Sequence[Evidence]) -> None:
        """Note that a tool is done, and drop the facts that are now disregarded.

        `over` are the keys of those facts, `tried` the tool's attempts.
        """
        if over:
            kept = [e for e in self.facts if e.key not in over]
            self.facts.clear()
            self._begin()
            self.add(kept)
        self.add(tried)

    def bracket(self) -> Bracket:
        """Return the join of everything."""
        return self._growing.bracket()

    def bracket_of(self, places: Sequence[int]) -> Bracket:
        """Return the join of everything about the points at these places."""
        return self._growing.bracket(places)

    def tried(self, tool: str) -> Collection[tuple[str, float]]:
        """Return the points and radii that a tool was tried on to its end."""
        return self._tried.get(tool, ())

    def settled_by(self, tool: str, places: Iterable[int], radii: NDArray[np.float64]) -> int:
        """Count the places that this very tool has settled at these radii (N,)."""
        ends = self._ends.get(tool, {})
        held = ((i, ends.get(self.names[i])) for i in places)
        return sum(
            pair is not None and bool(pair[1] <= radii[i] or pair[0] >= radii[i])
            for i, pair in held
        )

    def narrowed_by(self, tool: str, places: Iterable[int]) -> bool:
        """Return whether this very tool has a bound for any of the places."""
        ends = self._ends.get(tool, {})
        return any(self.names[i] in ends for i in places)
