"""Existence, kind and contents of files, checked for every reader."""

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
    """Return whether there is an ordinary file of this name.

    Any name may be asked about: one that no file system takes gives False.
    """
    return _there(path) and path.is_file()


def is_archive(path: Path) -> bool:
    """Return whether there is a file of this name that begins like a zip file."""
    if not is_file(path):
        return False
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _there(path: Path) -> bool:
    """Return whether a path exists; False for names that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):  # names that no file system takes
        return False


def content(path: Path) -> bytes:
    """Return the contents of a file, unpacked where its name ends in .gz.

    Raises `BadInput` where it cannot be read, or would unpack to more than a hundred times its size
    on the disk (and more than 64 MiB).
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
