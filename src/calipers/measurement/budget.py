"""How much may the lower jaw cost? As long as it proves points, what it takes; else a share of what
the attacks took, and a few seconds at least.

A certifier has its turn where the plan puts it, if a trial fits the time that attacks have taken by
then: what it proves nobody has to attack. Else it waits for the end, when they have taken more.
Before its turn it forecasts its own cost, so that what is hopeless is not begun. Processor seconds
count.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from calipers.problem.interrupts import Limit, OutOfTime, limited
from calipers.problem.tools import Forecast

FLOOR = 3.0  # seconds that every turn has, however short the attacks were
_FIRST = (1, 3, 12)  # points dealt at first: one too dear for its turn spoils no more than itself
# times the time of a turn that a forecast may ask for: forecasts have been seen to be 2.2 times too
# high
_OVER = 2.0
_ROOM = 0.5  # share of the memory

End = Literal["through", "nothing", "time", "cost", "hopeless", "memory"]
"""Why a turn ended: all points were dealt; a trial proved none; its time was up; or it was not
begun, for one of three reasons.
"""


@dataclass(frozen=True)
class Turn:
    """What a turn of a certifier came to: why it `end`ed, the places `left`, whether it `proved`
    any, and the forecast for a point, if there was one.
    """

    end: End
    left: list[int]
    proved: bool = False
    seconds: float | None = None
    held: int = 0
    hopeless: str = ""

    @property
    def worth_waiting(self) -> bool:
        """May more time, after the attacks, help?"""
        return self.end in ("time", "cost")

    @property
    def too_dear(self) -> bool:
        """Did the time or the memory end it? Then something cheaper may have more to say."""
        return self.end in ("time", "cost", "memory")

    def fact(self, points: int) -> dict[str, object]:
        """Return what the record keeps of a certifier that was not run on all of its points."""
        seconds = None if self.seconds is None else self.seconds * len(self.left)
        told = {
            "points": len(self.left),
            "open": points,
            "proved": self.proved,
            "seconds": seconds,
            "why": self.end,
        }
        return {
            **told,
            **({"held": self.held} if self.end == "memory" else {}),
            **({"reason": self.hopeless} if self.end == "hopeless" else {}),
        }


def memory() -> int:
    """Return how many bytes the machine has; much where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**62


@dataclass
class Purse:
    """What both jaws have taken so far, in processor seconds: `attacks`, and `spent` by turns of
    certifiers that proved nothing.
    """

    share: float
    clock: Callable[[], float] = time.process_time
    room: Callable[[], int] = memory
    attacks: float = 0.0
    spent: float = 0.0
    leash: Limit | None = field(default=None, init=False)
    _allowed: float = field(default=0.0, init=False)

    @property
    def allowance(self) -> float:
        """How long a turn may take without proving anything."""
        return max(FLOOR, self.share * self.attacks - self.spent)

    def proved(self) -> None:
        """Something was proved: whoever has the turn may go on as long again."""
        if self.leash is not None:
            self.leash.ends = self.clock() + self._allowed

    def turn(
        self,
        places: list[int],
        trial: int | None,
        deal: Callable[[list[int]], object],
        settled: Callable[[list[int]], bool],
        forecast: Callable[[], Forecast | None],
        *,
        block: int,
        last: bool,
    ) -> Turn:
        """Deal places, in their order, to a certifier as long as that is worth it.

        `trial` points of which none is `settled` end it (None: no number does). With `last` it
        begins if a single point may be had in its time, else only if the whole trial may.
        """
        begun, self._allowed = self.clock(), self.allowance
        self.leash = Limit(self.clock, begun + self._allowed)
        end: End = "through"
        left, told, proved = list(places), None, False
        try:
            with limited(self.leash):
                told = forecast()
                end = self._refused(told, 1 if last else min(len(places), trial or sum(_FIRST)))
                while left and end == "through":
                    chunk = left[: self._size(len(places) - len(left), block, proved, told)]
                    deal(chunk)
                    left = left[len(chunk) :]
                    if settled(chunk):
                        proved = True
                        self.proved()
                    elif not proved and trial is not None and len(places) - len(left) >= trial:
                        end = "nothing" if left else "through"
        except OutOfTime as up:
            if up.limit is not self.leash:
                raise
            end, proved = "time", proved or settled(places)
        finally:
            self.leash = None
            self.spent += 0.0 if proved else self.clock() - begun
        if told is None:
            return Turn(end, left, proved)
        return Turn(end, left, proved, told.seconds, told.held, told.hopeless)

    def _refused(self, told: Forecast | None, points: int) -> End:
        """Say why a turn is not begun; "through" where it is."""
        if told is None:
            return "through"
        if told.held > _ROOM * self.room():
            return "memory"
        if told.hopeless and told.seconds * points > FLOOR:
            return "hopeless"
        return (
            "cost"
            if told.seconds * points > self._allowed * (_OVER if points == 1 else 1.0)
            else "through"
        )

    def _size(self, done: int, block: int, proved: bool, told: Forecast | None) -> int:
        """Return how many points are dealt next: at first few, and where nothing is proved no more
        than fit the time.
        """
        if proved:
            return block
        reached, size = 0, block
        for few in _FIRST:
            if done == reached:
                size = few
                break
            reached += few
        assert self.leash is not None
        fits = (
            size if told is None or told.seconds <= 0 else min(size, self.leash.left / told.seconds)
        )
        return max(1, int(fits))


def as_told(turn: Turn) -> dict[str, Any]:
    """Return the turn as JSON keeps it."""
    return dataclasses.asdict(turn)
