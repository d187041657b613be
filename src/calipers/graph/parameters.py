"""Checks of an operation's parameters.

They are made in the operation's constructor, so that readers of all formats give the same answer.
The lines that bound an operation assume something of its parameters (corners in order, slopes that
are numbers). Parameters that do not satisfy this are normalised by the operation itself where they
have a meaning, and refused here where they have none or where the bounds would not be proven.
"""

from __future__ import annotations

import math
from typing import Any

from calipers.errors import UnsupportedOp


def require(good: bool, what: str, wanted: str, **given: float) -> None:
    """Raise `UnsupportedOp` unless the bounds are proven for the parameters."""
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
    """Return an argument of a call as a number.

    Where it is left out or None the default is returned. Raises `UnsupportedOp` where it is not a
    constant number.
    """
    given = default if len(args) <= place or args[place] is None else args[place]
    if not isinstance(given, int | float):
        raise UnsupportedOp(
            "no bounds for a function whose parameter is computed: write it as a number. Attacks "
            "work without them."
        )
    return float(given)


def completed(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a call, missing last ones set to defaults."""
    return args + defaults[len(args) :]
