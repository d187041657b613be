"""Which parameters may an operation have? Asked where it is made, so that every reader of every
format gets the same answer.

The lines of an operation assume something of its parameters (corners in order, slopes that are
numbers). What lies outside is normalised by the operation itself where it has a meaning, and
refused here where it has none or where its bounds would not be proved.
"""

from __future__ import annotations

import math
from typing import Any

from calipers.errors import UnsupportedOp


def require(good: bool, what: str, wanted: str, **given: float) -> None:
    """Raise `UnsupportedOp` where parameters are not what an operation's bounds are proved for."""
    if not good:
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UnsupportedOp(
            f"no bounds for {what} with {values}: {wanted} is needed. Attacks work without them."
        )


def require_numbers(what: str, **given: float) -> None:
    """Raise `UnsupportedOp` where a parameter is not a finite number."""
    require(
        all(math.isfinite(value) for value in given.values()),
        what,
        "a finite number for each",
        **given,
    )


def argument(args: tuple[Any, ...], place: int, default: float) -> float:
    """Return an argument of a call, or its default where it is left out or None. Raises
    `UnsupportedOp` where it is no constant number.
    """
    given = default if len(args) <= place or args[place] is None else args[place]
    if not isinstance(given, int | float):
        raise UnsupportedOp(
            "no bounds for a function whose parameter is computed: write it as a number. Attacks "
            "work without them."
        )
    return float(given)


def completed(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an exported call, those left out at its end filled in from the
    operation's defaults.
    """
    return args + defaults[len(args) :]
