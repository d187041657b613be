"""What can go wrong, in words that say what to do: every exception of the package."""

from __future__ import annotations


class CalipersError(Exception):
    """Base class of every error that calipers raises on purpose."""


class BadInput(CalipersError, ValueError):
    """A model, data set, threat or option that cannot be measured as given."""


class BadModel(BadInput):
    """The model itself cannot be measured: wrong mode, wrong output, or not callable on these
    inputs.
    """


class UnsupportedOp(CalipersError):
    """The lower jaw cannot bound an operation of the model; attacks still can be run."""


class CaptureError(CalipersError):
    """The model cannot be turned into a graph whose output equals the model's."""


class ToolFailed(CalipersError):
    """A certifier ended on an error that is not of its own making; what others find stands."""


class Contradiction(CalipersError):
    """A certificate stands above a witness: one of two tools is wrong."""


class RecordError(CalipersError):
    """A record file cannot be read, or answers another question."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or where it says nothing its type.

    Libraries go on with pages of listings. At most 200 characters.

    >>> first_line(ValueError("no such axis\\n  in node 7")), first_line(MemoryError())
    ('no such axis', 'MemoryError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def typed(error: BaseException) -> str:
    """Return the type of an error and the first line of what it says.

    >>> typed(KeyError("x")), typed(MemoryError())
    ("KeyError: 'x'", 'MemoryError')
    """
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"
