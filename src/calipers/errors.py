"""What can go wrong, in words that say what to do: every exception of the package."""

from __future__ import annotations


class CalipersError(Exception):
    """Base class of every error that calipers raises on purpose."""


class BadInput(CalipersError, ValueError):
    """A model, data set, threat or option that cannot be measured as given."""


class BadModel(BadInput):
    """The model itself cannot be measured: wrong mode, wrong output, or not callable on these inputs."""


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
