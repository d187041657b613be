"""Arrays, and data that hold arrays, as bytes of the record.

An array is kept in NumPy's own format (.npy), so that the bytes can be read without calipers.
"""

from __future__ import annotations

import io
import math
import zipfile
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.errors import RecordError
from calipers.record.proofs import contents, sealed

_ARRAY = "array"


def pack(array: NDArray[Any]) -> bytes:
    """Return the bytes of an array."""
    array = np.asarray(array, order="C")
    return _head(array.dtype.str, array.shape) + array.tobytes()


@lru_cache(maxsize=256)
def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def unpack(blob: bytes) -> NDArray[Any]:
    """Return the array that bytes hold.

    Raises `RecordError` where they hold none.
    """
    try:
        end = 10 + int.from_bytes(blob[8:10], "little")
        dtype, shape = _read_head(blob[:end])
        count = math.prod(shape)
        if len(blob) != end + count * dtype.itemsize:
            raise ValueError(f"{len(blob) - end} bytes for an array {shape} of {dtype}")
        return np.frombuffer(blob, dtype, count, end).reshape(shape).copy()
    except Exception as error:  # for malformed bytes NumPy raises whatever its parser does
        raise RecordError(
            f"the record holds an array that cannot be read ({type(error).__name__}): it is "
            "damaged, or was altered"
        ) from error


@lru_cache(maxsize=256)
def _read_head(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    buffer = io.BytesIO(head)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("another version of the format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
    if fortran or dtype.hasobject:
        raise ValueError("an array that calipers did not write")
    return dtype, shape


def pack_data(data: dict[str, Any]) -> bytes:
    """Return the bytes of nested dicts and lists of numbers, text and arrays."""
    arrays = dict[str, NDArray[Any]]()

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[name := f"{_ARRAY}{len(arrays)}"] = value
            return {_ARRAY: name}
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return sealed({"data": plain(data)}, arrays)


def unpack_data(blob: bytes) -> dict[str, Any]:
    """Return what `pack_data` packed.

    Raises `RecordError` where the bytes are not its own.
    """
    try:
        header, arrays = contents(blob)

        def full(value: Any) -> Any:
            if isinstance(value, dict):
                if value.keys() == {_ARRAY}:
                    return arrays[value[_ARRAY]]
                return {key: full(inner) for key, inner in value.items()}
            return [full(inner) for inner in value] if isinstance(value, list) else value

        data: dict[str, Any] = full(header["data"])
        return data
    except (ValueError, LookupError, TypeError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise RecordError(
            f"the record holds a question that cannot be read ({type(error).__name__}): it is "
            "damaged, or was altered"
        ) from error
