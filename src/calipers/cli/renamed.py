"""Old names of options: whoever types one is told what it is called now."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

RENAMED = {
    "--letters": "--one-hot",
    "--points": "--limit",
    "--resume": "--record",
    "--timeout": "--seconds",
    "--proof": "--proofs",
}


class Command(TyperCommand):
    """A command that knows the names its options had once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line; an old name is a usage error that tells the new one.

        Raises `typer.BadParameter`.
        """
        known = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        for word in args:
            old = word.partition("=")[0]
            if old in RENAMED and old not in known and RENAMED[old] in known:
                raise typer.BadParameter(f"{old} is called {RENAMED[old]} now", ctx)
        return super().parse_args(ctx, args)
