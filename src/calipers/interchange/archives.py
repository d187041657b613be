"""Safe reading of zip archives from untrusted sources.

The sizes of all members are checked before anything is unpacked.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from types import TracebackType

from calipers.errors import BadInput

# a file may unpack to FREE bytes, or to RATIO times its own size if that is more
FREE, RATIO = 2**26, 100
_MOST = 100_000  # members
_CHUNK = 2**20
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
)
"""What zipfile raises for bytes that are no archive, or a damaged one. RuntimeError is for what it
cannot read: a newer format of zip, a password.
"""


class Archive:
    """A zip file opened for reading; stored or deflated, without a password.

    Raises `BadInput` for any other file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            self._members = {info.filename: info for info in self._zip.infolist()}
        except _DAMAGED as error:
            raise BadInput(
                f"{path} is no zip archive, or a damaged one ({error}); is the file complete?"
            ) from error
        try:
            self._check()
        except BadInput:
            self._zip.close()
            raise

    def _check(self) -> None:
        """Raise `BadInput` for members that are not read, or grow too much."""
        every = self._zip.infolist()
        if len(every) != len(self._members) or len(every) > _MOST:
            raise BadInput(f"{self.path} holds a member twice, or more than {_MOST} of them")
        for info in every:
            if info.flag_bits & 0x1:
                raise BadInput(
                    f"{self.path}: {info.filename} is encrypted; unpack the archive and save it "
                    "without a password"
                )
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadInput(
                    f"{self.path}: {info.filename} is packed by a method that is not read; only "
                    "stored and deflated members are"
                )
        check_growth(self.path, sum(info.file_size for info in every))

    @property
    def names(self) -> list[str]:
        """The members' names, in the archive's order."""
        return list(self._members)

    def read(self, name: str) -> bytearray:
        """Return the contents of a member, after comparing its checksum."""
        info = self._members[name]
        data = bytearray(info.file_size)
        view, place = memoryview(data), 0
        try:
            with self._zip.open(info) as member:
                while place < len(data) and (part := member.read(min(_CHUNK, len(data) - place))):
                    view[place : place + len(part)] = part
                    place += len(part)
                rest = member.read(1)  # reading to the end compares the checksum
        except _DAMAGED as error:
            raise BadInput(
                f"{self.path}: {name} cannot be unpacked ({error}); is the file complete?"
            ) from error
        if place != len(data) or rest:
            raise BadInput(
                f"{self.path}: {name} does not hold the {len(data)} bytes that it lists; is the "
                "file complete?"
            )
        return data

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def growth(path: Path) -> int:
    """Return how many bytes a packed file may unpack to."""
    return max(FREE, RATIO * path.stat().st_size)


def check_growth(path: Path, size: int) -> None:
    """Raise `BadInput` for a packed file that would unpack to far too much.

    The limit is `RATIO` times its size on the disk, but `FREE` bytes at least.
    """
    if size > growth(path):
        told = f"more than {RATIO} times what it takes on the disk"
        raise BadInput(
            f"{path} would unpack to {size:,} bytes or more, {told}. If that is meant, store it "
            "unpacked."
        )
