"""What becomes of the finds when Ctrl-C comes? Whoever was at work at that moment, a tool hands over all that it holds before it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def remaining(results: Iterator[Given], interrupt: KeyboardInterrupt) -> Iterator[Given]:
    """Yield what a tool still holds when its user was interrupted over its last result: the tool hears of it where it waits.

    The caller passes the interrupt on afterwards. A tool that has ended, by the interrupt or before it, holds nothing; nor does one that is no generator.
    """
    throw = getattr(results, "throw", None)
    if throw is None:
        return
    with contextlib.suppress(KeyboardInterrupt, StopIteration):
        yield throw(interrupt)
        yield from results


def relayed(results: Iterator[Given], use: Callable[[Given], Made | None]) -> Iterator[Made]:
    """Yield what `use` makes of each result, None left out.

    An interrupt inside `use` lets it begin again with the same result, so `use` changes nothing before it is sure to end; then come the results that the tool
    still holds, and the interrupt is passed on.
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
