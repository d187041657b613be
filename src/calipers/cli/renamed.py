"""Commands that tell the new name of an option that was renamed."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from calipers.renamed import OPTIONS


class Command(TyperCommand):
    """A command that knows the former names of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line.

        Raises `typer.BadParameter` for the former name of an option, with its new name.
        """
        known = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        for word in args:
            old = word.partition("=")[0]
            if old in OPTIONS and old not in known and OPTIONS[old] in known:
                raise typer.BadParameter(f"{old} is called {OPTIONS[old]} now", ctx)
        return super().parse_args(ctx, args)
