"""What stands in a zip archive from a stranger? Members whose sizes are looked at before anything
is unpacked.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from types import TracebackType

from calipers.errors import BadInput

# what may be unpacked from any file, in bytes, and otherwise so many times its size
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
"""What zipfile raises for bytes that are no archive, or a broken one; of what it cannot read (a
newer zip, a password) it says RuntimeError.
"""


class Archive:
    """A zip file opened to be read, stored or deflated, without a password; raises `BadInput` for
    any other.
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
        """The members, in the archive's order."""
        return list(self._members)

    def read(self, name: str) -> bytearray:
        """Return what a member holds, its checksum compared."""
        info = self._members[name]
        data = bytearray(info.file_size)
        view, place = memoryview(data), 0
        try:
            with self._zip.open(info) as member:
                while place < len(data) and (part := member.read(min(_CHUNK, len(data) - place))):
                    view[place : place + len(part)] = part
                    place += len(part)
                rest = member.read(1)  # at the end the checksum is compared
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
    """Refuse a packed file that would unpack to far more than what it takes on the disk."""
    if size > growth(path):
        told = f"more than {RATIO} times what it takes on the disk"
        raise BadInput(
            f"{path} would unpack to {size:,} bytes or more, {told}. If that is meant, store it "
            "unpacked."
        )
