"""How is calipers asked from a terminal? `commands` are the words, `options` what they share,
`progress` the bars.
"""

from calipers.cli.commands import app, main

__all__ = ["app", "main"]
