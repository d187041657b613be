"""Counts of passes through a model, each for one block of code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

# counts are few and short: one lock serves all of them
_lock = threading.Lock()


@dataclass
class Passes:
    """Passes through a model, counted in points."""

    forwards: int = 0
    backwards: int = 0


class PassCounter:
    """Receiver of all passes through one model.

    It holds no total: whoever wants to know what something costs opens a count around it. Counts
    may be nested, each one counts all that is inside it. They belong to the context that opened
    them, so that threads that share a model do not count for one another, but workers that run in
    a copy of the context (`LocalThreads`) do.

    Example:
        >>> counter = PassCounter()
        >>> with counter.counting() as spent:
        ...     counter.add(forwards=3)
        >>> counter.add(forwards=4)
        >>> spent
        Passes(forwards=3, backwards=0)
    """

    def add(self, forwards: int = 0, backwards: int = 0) -> None:
        """Add passes to all counts that are open here."""
        with _lock:
            for counter, passes in _open.get():
                if counter is self:
                    passes.forwards += forwards
                    passes.backwards += backwards

    @contextlib.contextmanager
    def counting(self) -> Iterator[Passes]:
        """Count the passes made inside.

        Not around a `yield`: what is counted there includes the work of the code yielded to.
        """
        passes = Passes()
        token = _open.set((*_open.get(), (self, passes)))
        try:
            yield passes
        finally:
            _open.reset(token)


def shared_out(passes: int, places: Tensor) -> Tensor:
    """Return the passes (P,) that each of `places (P,)` is charged.

    Equal shares, but for one more for the first ones: their sum is exactly what was spent.
    """
    share, rest = divmod(passes, len(places))
    return share + (torch.arange(len(places), device=places.device) < rest).to(places)


_open: ContextVar[tuple[tuple[PassCounter, Passes], ...]] = ContextVar("open", default=())
