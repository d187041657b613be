"""Run the `calipers` command, for `python -m calipers.cli`."""

from calipers.cli.commands import main

main()
