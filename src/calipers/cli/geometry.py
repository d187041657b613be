"""The command `geometry`: why a model is fragile at some points.

It shows their linear regions, their gradients, and what each tool proves or finds about them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from calipers.cli.options import Options
from calipers.errors import BadInput

Ladder = Annotated[
    str | None,
    typer.Option(
        "--ladder",
        "-l",
        help="Tools, separated by semicolons, attacks first: the rungs of each point's ladder. "
        "Default: from intervals to attacks.",
    ),
]
Slices = Annotated[
    int, typer.Option(help="Draw the first N points in the plane of their nearest example.")
]


def run(options: Options, ladder: str | None, slices: int, exact: bool) -> None:
    """Measure, print a table for each model, and write the page."""
    from calipers.api.geometry import local_geometry
    from calipers.interchange import load_data
    from calipers.report.render import render_geometry
    from calipers.threats.ball import Ball

    options.check()
    threat, classifiers = options.threat(), options.classifiers()
    assert isinstance(threat, Ball)
    if slices < 0:  # before the work, not after it
        raise BadInput(f"the number of slices is 0 or more, got {slices}")
    tools = None if ladder is None else [part.strip() for part in ladder.split(";") if part.strip()]
    x, y = load_data(options.data, options.labels, options.limit)
    found = []
    for classifier in classifiers:
        told = None if options.quiet or not sys.stderr.isatty() else _told(classifier.name)
        result = local_geometry(
            classifier,
            x,
            y,
            threat,
            tools=tools,
            exact=exact and (options.seconds or True),
            seed=options.seed,
            progress=told,
        )
        found.append(result if options.report == "none" else result.drawn(slices))
        print(result, end="\n\n")
    if options.report != "none":
        print(render_geometry(found, options.report))


def _told(name: str) -> Callable[[str], None]:
    """Return a function that prints the progress of a model to standard error."""

    def tell(words: str) -> None:
        print(f"{name}: {words}", file=sys.stderr)

    return tell
