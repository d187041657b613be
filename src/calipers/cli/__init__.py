"""The command line of calipers.

`commands` holds the commands, `options` the options that they share.
"""

from calipers.cli.commands import app, main

__all__ = ["app", "main"]
