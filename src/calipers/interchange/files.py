"""Is there such a file, and what does it say? The first question to every file that comes in."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from calipers.errors import BadInput


def existing(source: str | Path, what: str) -> Path:
    """Return the path of a file to read, or raise `BadInput`."""
    path = Path(source)
    if not path.exists():
        raise BadInput(f"there is no file {source} to read {what} from (looked in {Path.cwd().name or '/'}/). Check the path.")
    return path


def content(path: Path) -> bytes:
    """Return what a file holds, unpacked where its name ends in .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read ({error}); is the file complete?") from error
