"""The command line of calipers.

`commands` holds the commands, `options` the options that they share, `progress` the bars.
"""

from calipers.cli.commands import app, main

__all__ = ["app", "main"]
