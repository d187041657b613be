"""The display of a run's progress: one counter for the whole run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from calipers.progress import Progress, Watch

_WIDEST = 34  # characters of a tool's text that are shown


@contextmanager
def shown(progress: Watch | bool | None, name: str) -> Iterator[Watch | None]:
    """Yield the receiver of a run's progress.

    For True it is a bar on a terminal or in a notebook, which goes when the run ends, and plain
    lines on standard error elsewhere; a function of the caller's own is yielded as it is.
    """
    if progress is None or isinstance(progress, bool):
        from rich.console import Console

        console = Console(stderr=True) if progress else None
        if console is None:
            yield None
        elif console.is_terminal or console.is_jupyter:
            with _bars(console) as bars:
                yield _Bar(bars, name)
        else:
            yield Lines(name, sys.stderr)
    else:
        yield progress


def _bars(console: Any) -> Any:
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} decided"),
        SpinnerColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    return Bars(*columns, console=console, transient=True)


class _Bar:
    """Shows the progress of a run as a single bar."""

    def __init__(self, bars: Any, name: str) -> None:
        self.bars, self.task = bars, bars.add_task(name, total=None, stage="")

    def __call__(self, now: Progress) -> None:
        """Move the bar."""
        self.bars.update(self.task, completed=now.decided, total=now.points, stage=_stage(now))


class Lines:
    """Writes a line where a stage begins, and at each quarter of its points."""

    def __init__(self, name: str, file: TextIO) -> None:
        self.name, self.file, self.last = name, file, ("", -1)

    def __call__(self, now: Progress) -> None:
        """Write a line, if there is something to tell."""
        here = (now.stage, int(4 * now.share))
        if now.stage and here != self.last:
            self.last = here
            told = f"{now.decided} of {now.points} decided; {_stage(now)}"
            print(f"{self.name}: {told}", file=self.file, flush=True)


def _stage(now: Progress) -> str:
    """Return the tool at work, with its share of the points and its steps."""
    name = now.stage if len(now.stage) <= _WIDEST else f"{now.stage[: _WIDEST - 2]} …"
    return f"{name}: {now.share:.0%}, step {now.steps:,}" if name else "the points themselves"


__all__ = ["Lines", "shown"]
