"""The command line, asked in this process: what a terminal would show, without the second and a
half that importing torch takes.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from calipers.cli import app


class Shown(NamedTuple):
    """What a call ended with and printed."""

    returncode: int
    stdout: str
    stderr: str


def calipers(folder: Path, *words: str) -> Shown:
    """Run the command line in the folder; an error that it does not turn into a message is the
    test's.
    """
    # Warnings are errors among the tests; a terminal only shows them.
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("default")
        result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Shown(result.exit_code, result.stdout, result.stderr)
