"""The time that certifiers may take.

As long as a certifier proves points, it may take what it takes; else a share of the time that the
attacks took, and a few seconds at least.

A certifier has its turn where the plan puts it, if a trial fits the time that attacks have taken by
then: what it proves need not be attacked. Else it waits for the end, when attacks have taken more.
Before its turn it forecasts its own cost, so that what is hopeless is not begun. Times are
processor seconds.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from calipers.measurement.plan import Stage
from calipers.problem.interrupts import Limit, OutOfTime, limited
from calipers.problem.protocols import Forecast

FLOOR = 3.0  # seconds that every turn has, however short the attacks were
_FIRST = (1, 3, 12)  # points dealt at first: if one is too expensive, only few are held up
# factor by which the forecast of a single point may exceed the time of a turn: forecasts have been
# seen to be 2.2 times too high
_OVER = 2.0
_ROOM = 0.5  # share of the memory

End = Literal["through", "nothing", "time", "cost", "hopeless", "memory"]
"""Why a turn ended.

All points were dealt ("through"); a trial proved none ("nothing"); its time was up ("time"); or it
was not begun, for one of three reasons ("cost", "hopeless", "memory").
"""


@dataclass(frozen=True)
class Turn:
    """The outcome of a turn of a certifier.

    It holds why the turn ended (`end`), the places `left`, whether it `proved` any, and the
    forecast for a point, if there was one: `seconds`, bytes `held` at once, and why it is
    `hopeless`.
    """

    end: End
    left: list[int]
    proved: bool = False
    seconds: float | None = None
    held: int = 0
    hopeless: str = ""

    @property
    def worth_waiting(self) -> bool:
        """Whether more time, after the attacks, may help."""
        return self.end in ("time", "cost")

    @property
    def too_dear(self) -> bool:
        """Whether time or memory ended it, so that a cheaper tool may do more."""
        return self.end in ("time", "cost", "memory")

    def fact(self, points: int) -> dict[str, object]:
        """Return the record's note on a certifier that was not run on all points."""
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
    """Return the bytes of the machine's memory; 2^62 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**62


@dataclass
class Purse:
    """The processor seconds that attacks and certifiers have taken so far.

    `attacks` is the time of attacks, `spent` that of turns of certifiers that proved nothing.
    `share` is the share of the former that the latter may take.
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
        """The seconds that a turn may take without proving anything."""
        return max(FLOOR, self.share * self.attacks - self.spent)

    def proved(self) -> None:
        """Extend the current turn: something was proved.

        Its time begins again.
        """
        if self.leash is not None:
            self.leash.ends = self.clock() + self._allowed

    def turn(
        self,
        stage: Stage,
        places: list[int],
        deal: Callable[[list[int]], object],
        settled: Callable[[list[int]], bool],
        forecast: Callable[[], Forecast | None],
        *,
        last: bool,
    ) -> Turn:
        """Deal places, in their order, to a certifier as long as it is worthwhile.

        The turn ends after as many points as the stage's pilot, the trial, of which none is
        `settled` (None: no number ends it).
        With `last` it begins if a single point fits its time, else only if the whole trial does.
        """
        begun, self._allowed, trial = self.clock(), self.allowance, stage.pilot
        self.leash = Limit(self.clock, begun + self._allowed)
        end: End = "through"
        left, told, proved = list(places), None, False
        try:
            with limited(self.leash):
                told = forecast()
                end = self._refused(told, 1 if last else min(len(places), trial or sum(_FIRST)))
                while left and end == "through":
                    chunk = left[: self._size(len(places) - len(left), stage.block, proved, told)]
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
        """Return why a turn is not begun; "through" where it is."""
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
        """Return how many points are dealt next.

        They are few at first, and as long as nothing is proved no more than fit the time.
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
