"""Time that passes when a test says so: nothing here waits, and nothing depends on how busy a
machine is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """Tells `now`."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


AMPLE = 3600.0
"""Seconds for a search that ends by itself in a few, so that a busy machine changes no outcome."""
