"""Proof files: how a proof is written as bytes.

A proof is an .npz archive of a header in JSON and arrays; the same proof gives the same bytes.
`checker.py` reads it.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.record.checker import SEAL, VERSION, claimed, digest, seal

Arrays = dict[str, NDArray[Any]]
_BEGINNING = (1980, 1, 1, 0, 0, 0)  # a fixed date: the bytes do not depend on the clock


def packed(claim: dict[str, Any], arrays: Arrays) -> bytes:
    """Return a proof as bytes.

    It is made of a claim (network, threat, goal, tool, blocks) and arrays; numbers are stored in
    the smallest type that holds them exactly.
    """
    held = {name: narrowed(value) for name, value in arrays.items()}
    listed = {name: [value.dtype.str, list(value.shape)] for name, value in held.items()}
    kind = {"format": "calipers-proof", "version": VERSION, "guarantee": "float64-checked"}
    header = {**kind, **claim, "model": digest(claim["network"], held), "arrays": listed}
    return sealed({**header, "claim": claimed(header, held)}, held)


def sealed(header: dict[str, Any], arrays: Arrays) -> bytes:
    """Return header and arrays as a file that ends with the hash of the rest."""
    text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in {"header": text, **arrays}.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(value), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", _BEGINNING), buffer.getvalue(), zipfile.ZIP_DEFLATED
            )
        archive.comment = bytes(SEAL)
    data = out.getvalue()
    return data[:-SEAL] + seal(data)


def about(data: bytes, **names: str) -> bytes:
    """Return the same proof with names of the files that it is about.

    No hash of the claim covers these names.
    """
    header, arrays = contents(data)
    return sealed({**header, "about": names}, arrays)


def contents(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """Return the header and the arrays of a proof's bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        arrays = {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(archive.read(name)), allow_pickle=False
            )
            for name in archive.namelist()
        }
    return json.loads(bytes(arrays.pop("header"))), arrays


def model_digest(network: dict[str, Any], arrays: Arrays) -> str:
    """Return the hash under which a proof names this network."""
    return digest(network, {name: narrowed(value) for name, value in arrays.items()})


def narrowed(value: NDArray[Any]) -> NDArray[Any]:
    """Return the same numbers in the smallest type that holds all exactly.

    NaN and infinity are held too.
    """
    value = np.asarray(value, order="C")
    if value.dtype == bool:
        return value
    for dtype in (np.uint8, np.int32) if value.dtype.kind in "iu" else (np.uint8, np.float32):
        with np.errstate(all="ignore"):
            small = value.astype(dtype)
        if np.array_equal(small.astype(value.dtype), value, equal_nan=dtype is np.float32):
            return np.asarray(small)
    return value
