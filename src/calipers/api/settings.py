"""The settings that all measuring calls share, and where former ones went."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypedDict, TypeVar

from calipers.measurement.plan import Plan
from calipers.problem.goals import Goal
from calipers.progress import Watch
from calipers.record.record import Record
from calipers.renamed import PARAMETERS

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


class Settings(TypedDict, total=False):
    """The keyword arguments of `measure`, `curve` and `distance`."""

    goal: Goal | None
    plan: str | Plan | None
    record: str | Path | Record | None
    progress: Watch | bool | None


def checked(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Let a function refuse keyword arguments that it does not have.

    It raises `TypeError` for them, as any function does, and says where a former one went.
    """
    kinds = inspect.signature(function).parameters.values()
    known = {p.name for p in kinds if p.kind is not p.VAR_KEYWORD}
    if len(known) < len(kinds):
        known |= set(Settings.__annotations__)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{function.__name__} has no setting {name!r}{_now(name)}")
        return function(*args, **kwargs)

    def _now(name: str) -> str:
        now = PARAMETERS.get(f"{function.__name__}({name})", PARAMETERS.get(name))
        return f": it is called {now} now" if now else f"; it has {', '.join(sorted(known))}"

    return call


__all__ = ["Settings", "checked"]
