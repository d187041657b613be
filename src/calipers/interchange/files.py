"""Is there such a file, and what does it say? The first question to every file that comes in."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from calipers.errors import BadInput
from calipers.interchange.archives import check_growth, growth


def existing(source: str | Path, what: str) -> Path:
    """Return the path of a file or folder to read, or raise `BadInput`."""
    path = Path(source)
    if not _there(path):
        shown = str(source) if len(str(source)) < 300 else f"{str(source)[:300]}..."
        where = Path.cwd().name or "/"
        raise BadInput(
            f"there is no file {shown} to read {what} from (looked in {where}/). Check the path."
        )
    if not path.is_file() and not path.is_dir():
        raise BadInput(
            f"{source} is no ordinary file, but a device or a pipe. Copy what it gives to a file "
            "first."
        )
    return path


def is_file(path: Path) -> bool:
    """Is there an ordinary file of this name? No name is too long or too odd to ask."""
    return _there(path) and path.is_file()


def is_archive(path: Path) -> bool:
    """Is there an ordinary file of this name that begins as a zip archive does?"""
    if not is_file(path):
        return False
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # names that no file system takes
        return False


def content(path: Path) -> bytes:
    """Return what a file holds, unpacked where its name ends in .gz; at most a hundredfold of what
    it takes.
    """
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as packed:
            data = packed.read(growth(path) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read ({error}); is the file complete?") from error
    check_growth(path, len(data))
    return data
