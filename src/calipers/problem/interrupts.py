"""Ctrl-C and time limits that keep the results found so far.

At an interrupt a tool hands over all that it holds before it ends. Long computations call
`give_way` between their steps. Limits belong to the context of the caller: tools need not know of
them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(eq=False)
class Limit:
    """A moment, `ends`, on some clock."""

    clock: Callable[[], float]
    ends: float

    @property
    def left(self) -> float:
        """How much time is left; not above 0 once it is over."""
        return self.ends - self.clock()


class OutOfTime(KeyboardInterrupt):
    """The time of `limit` is over.

    It is a `KeyboardInterrupt`, so that tools hand over what they hold, as at Ctrl-C.
    """

    def __init__(self, limit: Limit) -> None:
        super().__init__("the time is up")
        self.limit = limit


_limits: ContextVar[tuple[Limit, ...]] = ContextVar("limits", default=())


@contextlib.contextmanager
def limited(*limits: Limit) -> Iterator[None]:
    """Apply these limits, too, to everything inside.

    Not around a `yield`: what is set there also holds for the code that is yielded to.
    """
    before = _limits.set((*_limits.get(), *limits))
    try:
        yield
    finally:
        _limits.reset(before)


_steps: ContextVar[Callable[[], None] | None] = ContextVar("steps", default=None)


@contextlib.contextmanager
def counted(step: Callable[[], None]) -> Iterator[None]:
    """Call `step` at every step that a tool takes inside.

    Not around a `yield`, as for `limited`.
    """
    before = _steps.set(step)
    try:
        yield
    finally:
        _steps.reset(before)


def give_way() -> None:
    """Raise `OutOfTime` if the time of any limit is over, and count the step.

    The outermost limit comes first.
    """
    if (step := _steps.get()) is not None:
        step()
    for limit in _limits.get():
        if limit.left <= 0:
            raise OutOfTime(limit)


def over() -> bool:
    """Return whether the time of any limit is over."""
    return any(limit.left <= 0 for limit in _limits.get())


def shortened(share: float) -> contextlib.AbstractContextManager[None]:
    """Limit the inside to a share of the time that each limit leaves.

    The rest is needed to confirm what is found there.
    """
    return limited(
        *(Limit(limit.clock, limit.clock() + share * limit.left) for limit in _limits.get())
    )


def remaining(results: Iterator[Given], interrupt: KeyboardInterrupt) -> Iterator[Given]:
    """Yield what a tool still holds when its last result was interrupted.

    The tool receives the interrupt at the `yield` where it waits. The caller passes the interrupt
    on afterwards. A tool that has ended, by the interrupt or before it, holds nothing; nor does one
    that is no generator.
    """
    throw = getattr(results, "throw", None)
    if throw is None:
        return
    with contextlib.suppress(KeyboardInterrupt, StopIteration):
        yield throw(interrupt)
        yield from results


def flattened(results: Iterator[Iterable[Given]]) -> Iterator[Given]:
    """Yield the members of each result, one after the other.

    After an interrupt come the rest of the result at hand and the results that the tool still
    holds, and the interrupt is passed on.
    """
    left = deque[Given]()
    try:
        for result in results:
            left.extend(result)
            while left:
                yield left.popleft()
    except KeyboardInterrupt as interrupt:
        yield from left
        for result in remaining(results, interrupt):
            yield from result
        raise


def relayed(results: Iterator[Given], use: Callable[[Given], Made | None]) -> Iterator[Made]:
    """Yield what `use` returns for each result, without None.

    After an interrupt inside `use` it is called again with the same result, so `use` must change
    nothing before it is sure to finish; then come the results that the tool still holds, and the
    interrupt is passed on.
    """
    held: list[Given] = []
    try:
        for result in results:
            held = [result]
            made = use(result)
            held.clear()
            if made is not None:
                yield made
    except KeyboardInterrupt as interrupt:
        for result in [*held, *remaining(results, interrupt)]:
            made = use(result)
            if made is not None:
                yield made
        raise
