"""What does `python -m calipers.cli` run? The `calipers` command."""

from calipers.cli.commands import main

main()
