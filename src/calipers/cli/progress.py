"""Progress bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watching(name: str, points: int, quiet: bool) -> Iterator[Any]:
    """Show a bar for the stage at work; nothing where there is no terminal.

    It shows the points dealt, how many points of the run have a verdict, and the time left.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("points, {task.fields[settled]} decided"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress, name, points)


class _Bars:
    """Passes the progress of a run on to a display of bars."""

    def __init__(self, progress: Any, name: str, points: int) -> None:
        self.bars, self.name, self.total = progress, name, points
        self.task: Any = None

    def stage(self, name: str, points: int) -> None:
        """Begin a new bar in place of the last one."""
        if self.task is not None:
            self.bars.remove_task(self.task)
        short = name if len(name) < 34 else f"{name[:30]} …"
        self.task = self.bars.add_task(
            f"{self.name}: {short}", total=points, settled=f"0 of {self.total}"
        )

    def progress(self, done: int, settled: int) -> None:
        """Move the bar."""
        self.bars.update(self.task, advance=done, settled=f"{settled} of {self.total}")
