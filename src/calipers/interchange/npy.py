"""Safe reading of .npy and .npz files from untrusted sources.

Only plain numbers are read, and their count is compared with the bytes that are there before they
are read.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from calipers.errors import BadInput, typed
from calipers.interchange.archives import Archive

Array = NDArray[Any]
_DTYPES = {
    np.dtype(name)
    for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_AXES = 32


class NpyFile:
    """An .npy file, or an .npz archive of them, opened for reading.

    An .npy file is `single`, and its array has the name "". Raises `BadInput` for any other file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror})") from error
        self.single = self._file.read(6) == np.lib.format.MAGIC_PREFIX
        self._file.seek(0)
        self._archive = None if self.single else self._opened()

    def _opened(self) -> Archive:
        """Return the archive; raise `BadInput` where the file is none."""
        if self._file.read(2) != b"PK":
            self._file.close()
            raise BadInput(
                f"{self.path} cannot be read as arrays. Give an .npz with x and y, or an .npy of "
                "plain numbers."
            )
        try:
            return Archive(self.path)
        except BadInput:
            self._file.close()
            raise

    @property
    def names(self) -> list[str]:
        """The arrays' names; none for an .npy file."""
        return (
            []
            if self._archive is None
            else [n.removesuffix(".npy") for n in self._archive.names if n.endswith(".npy")]
        )

    def array(self, name: str) -> Array:
        """Return an array of numbers in the machine's byte order."""
        if self._archive is None:
            return self._read(
                self._file.read(_HEAD), os.fstat(self._file.fileno()).st_size, f"{self.path}"
            )
        data = self._archive.read(f"{name}.npy")
        return self._read(data[:_HEAD], len(data), f"{self.path}: {name}", data)

    def _read(
        self, begin: bytes | bytearray, size: int, where: str, data: bytearray | None = None
    ) -> Array:
        """Return the array whose header and size are given."""
        head = io.BytesIO(begin)  # so that no header can claim more than this
        shape, fortran, dtype = _header(head, where)
        count, room = math.prod(shape), size - head.tell()
        if count * dtype.itemsize != room:
            raise BadInput(
                f"{where} says that it holds {count * dtype.itemsize:,} bytes of numbers, but "
                f"{room:,} are there; is it complete?"
            )
        if data is None:
            self._file.seek(head.tell())
            flat = np.fromfile(self._file, dtype, count)
        else:
            flat = np.frombuffer(memoryview(data)[head.tell() :], dtype)
        if len(flat) != count:
            raise BadInput(f"{where} ends too early; is it complete?")
        native = flat if dtype.isnative else flat.astype(dtype.newbyteorder("="))
        return native.reshape(shape, order="F" if fortran else "C")

    def __enter__(self) -> NpyFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._archive is not None:
            self._archive.close()


_HEAD = 2**17  # bytes of a member that are searched for its header


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and dtype of an array, from its header."""
    try:
        version = np.lib.format.read_magic(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if version not in _HEADERS:
                raise ValueError(
                    f"version {version[0]}.{version[1]} of the format, in which no plain numbers "
                    "are kept"
                )
            shape, fortran, dtype = _HEADERS[version](file)
    except Exception as error:  # for an odd header, NumPy raises whatever its parser does
        raise BadInput(f"{where} cannot be read as an array ({typed(error)})") from error
    if dtype.newbyteorder("=") not in _DTYPES or dtype.shape:
        kind = (
            "Python objects, which are pickles and never read"
            if dtype.hasobject
            else f"the type {str(dtype)[:60]}"
        )
        raise BadInput(
            f"{where} holds {kind}. Save plain numbers: bool, integers or floats of at most 64 "
            "bits."
        )
    if len(shape) > _AXES or any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        raise BadInput(f"{where} has the shape {str(shape)[:60]}, which no array of points has")
    return shape, fortran, dtype


def array_of(path: Path, names: tuple[str, ...]) -> Array:
    """Return the array of an .npy file, or the one meant in an archive.

    In an archive that is the first that has one of the names, or the only one.
    """
    with NpyFile(path) as file:
        if file.single:
            return file.array("")
        found = next(
            (name for name in names if name in file.names),
            file.names[0] if len(file.names) == 1 else None,
        )
        if found is None:
            raise BadInput(f"{path} holds no array {' or '.join(names)}")
        return file.array(found)
