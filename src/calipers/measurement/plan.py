"""Which tools are run, in what order, on which points?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from calipers.problem.tools import Attack, Certifier

_POINTS = {"attack": 256, "certifier": 256}


@dataclass(frozen=True)
class Stage:
    """One tool and the points it is for.

    `aim` "verdict": points whose verdict at the radius asked is open. "distance": every point the
    model gets right, to narrow its bracket; such a tool starts from what is known of the point.

    `audit`: the tool is tried on that many random points of those still open, and on the others
    only where it settles any of these. The record keeps how many were tried, so that a bound on
    what the audit may have missed can be stated. None tries all of them.

    `fallback`: only where the stage before it, a better tool, was too dear for its share of the
    time or the memory.

    `family`: attacks with a family that follow each other are no sequence but stand side by side
    (`measurement.portfolio`): each is tried on a sample of what is left, as large as its audit
    says, and what breaks most per second goes first. One that `waits` comes after all that do not.

    `near`: a deep search of a family, worth its time on points whose nearest known example lies
    beyond the radius by no more than that share of it; on others only where it breaks any of its
    sample that lie farther. With an audit of 0 it is for no others, and a few of the nearest
    decide; with `near` 0 no point counts as near, and its random sample alone decides.
    """

    tool: Attack | Certifier
    kind: Literal["attack", "certifier"]
    aim: Literal["verdict", "distance"] = "verdict"
    audit: int | None = None
    fallback: bool = False
    family: str = ""
    waits: bool = False
    near: float | None = None

    @property
    def name(self) -> str:
        """The tool's settings, which are its identity in the record."""
        return repr(self.tool)

    @property
    def by_the_clock(self) -> bool:
        """Has the tool so many seconds for a point? Then each point is recorded as tried once it is
        through, and its time is not begun anew.
        """
        return hasattr(self.tool, "seconds")

    def proving(self) -> Stage:
        """Return the stage with its tool writing proof files, if it can: its name in the record
        stays.
        """
        if not hasattr(self.tool, "proofs"):
            return self
        tool: Any = self.tool
        return dataclasses.replace(self, tool=dataclasses.replace(tool, proofs=True))

    @property
    def block(self) -> int:
        """How many points are dealt at once; a block is recorded as tried only when all of it
        is.
        """
        return _POINTS[self.kind]


@dataclass(frozen=True)
class Plan:
    """Stages in order, cheapest first, and a limit in seconds (None: no limit), which ends a tool
    inside a block too.

    `lower_share` bounds what certifiers may take that prove nothing: that share of the processor
    time of the attacks, a few seconds at least. None: whatever they take. `next_step` is the
    command (without the word calipers) that would settle more of what this plan leaves open;
    reports pass it on.
    """

    name: str
    stages: tuple[Stage, ...]
    next_step: str = ""
    seconds: float | None = None
    lower_share: float | None = None
