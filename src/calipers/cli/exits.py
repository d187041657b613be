"""Exit codes, and exceptions as messages on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from calipers.errors import CalipersError, Contradiction

EXIT_BAD_INPUT, EXIT_CONTRADICTION, EXIT_OPEN, EXIT_INTERRUPTED = 2, 3, 4, 130


@contextmanager
def errors() -> Iterator[None]:
    """Turn exceptions into a message and an exit code.

    Covers those of the package, of the operating system and Ctrl-C; any other is a bug and keeps
    its traceback.
    """
    try:
        yield
    except Contradiction as error:
        tell(f"contradiction: {error}")
        raise typer.Exit(EXIT_CONTRADICTION) from error
    except CalipersError as error:
        tell(f"calipers: {error}")
        raise typer.Exit(EXIT_BAD_INPUT) from error
    except (OSError, MemoryError) as error:
        tell(f"calipers: the system refuses ({error or 'out of memory'})")
        raise typer.Exit(EXIT_BAD_INPUT) from error
    except KeyboardInterrupt:
        print("calipers: interrupted before anything was measured", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def tell(message: str) -> None:
    """Print a message to standard error.

    Characters that cannot be printed are replaced: a message may quote a file, which must neither
    move the cursor nor fail to be encoded.
    """
    from calipers.report.wording import plain

    print("\n".join(map(plain, message.split("\n"))), file=sys.stderr)
