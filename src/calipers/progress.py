"""How far a run is: what the function `progress` of a call is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """The state of a whole run.

    `decided` of its `points` have a verdict; the tool `stage` is through with a `share` of the
    points that it was dealt; `steps` counts the steps of all tools so far, and grows while a tool
    is at work.
    """

    decided: int
    points: int
    stage: str = ""
    share: float = 0.0
    steps: int = 0


Watch = Callable[[Progress], None]
"""A receiver of progress. What it raises ends the run as an interrupt does."""


class Meter:
    """Counts what a run has done, and tells a watch.

    One meter serves all parts of a run. With `parts` a part's verdicts are not those of the whole,
    which are set by `settle` alone.
    """

    def __init__(self, points: int, watch: Watch | None, *, parts: bool = False) -> None:
        self.now, self.watch, self.parts = Progress(0, points), watch, parts
        self._dealt, self._done, self._thread = 0, 0, threading.get_ident()

    def stage(self, name: str, points: int) -> None:
        """Note that a stage begins, with that many points to deal."""
        self._dealt, self._done = points, 0
        self._tell(replace(self.now, stage=name, share=0.0))

    def done(self, points: int) -> None:
        """Note that the stage is through with so many more points."""
        self._done += points
        self.within(0)

    def within(self, points: int) -> None:
        """Note that so many points of the block at work have been answered."""
        share = min((self._done + points) / self._dealt, 1.0) if self._dealt else 1.0
        self._tell(replace(self.now, share=share))

    def decided(self, points: int) -> None:
        """Note how many points of this part of the run have a verdict."""
        if not self.parts:
            self.settle(points)

    def settle(self, points: int) -> None:
        """Note how many points of the whole run have a verdict."""
        self._tell(replace(self.now, decided=points))

    def step(self) -> None:
        """Note that a tool is about to take a step.

        Steps in other threads than the run's own are not counted.
        """
        if threading.get_ident() == self._thread:
            self._tell(replace(self.now, steps=self.now.steps + 1))

    def _tell(self, now: Progress) -> None:
        if now != self.now:
            self.now = now
            if self.watch is not None:
                self.watch(now)


def meter(progress: Meter | Watch | None, points: int) -> Meter:
    """Return the meter of the run, or a new one for so many points."""
    return progress if isinstance(progress, Meter) else Meter(points, progress)


__all__ = ["Meter", "Progress", "Watch", "meter"]
