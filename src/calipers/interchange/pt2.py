"""Safe reading of .pt2 archives: the program's JSON and raw tensors.

Nothing is unpickled, compiled or evaluated. torch.export.load unpickles sample inputs and marked
weights, evaluates symbolic expressions and guards, and writes names into code: whoever wrote the
file could run any code that way. Here the archive of torch.export.save (2.9 or later) is opened as
a zip file, tensors are taken from their raw bytes, and the graph becomes a list of known operations
(`exported.py`). Sample inputs, metadata and guards are not looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calipers.errors import BadInput, CalipersError, typed
from calipers.interchange.archives import Archive
from calipers.interchange.exported import Exported, StoredTensor
from calipers.interchange.pt2_graph import DTYPES, program_of

_AGAIN = "Write it again with torch.export.save(program, path), torch 2.9 or later."
_SCHEMA = 8  # major version of the program's JSON
_PICKLED = "is stored as a pickle, and unpickling a file runs its author's code: it is not read"
_ROOM = 2**24  # elements that a tensor may have beyond its stored bytes, as expanded ones do


def load_exported(path: Path) -> Exported:
    """Return the program of a .pt2 file as a module with its weights.

    Raises `BadInput` for anything that is not read in full.
    """
    try:
        with Archive(path) as archive:
            return _read(archive)
    except CalipersError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
        StopIteration,
    ) as error:
        raise BadInput(
            f"{path} cannot be read as an exported program ({typed(error)}). {_AGAIN}"
        ) from error


def _read(archive: Archive) -> Exported:
    """Return the program in an archive."""
    root = _root(archive)
    names = [
        name.removeprefix(f"{root}models/").removesuffix(".json")
        for name in archive.names
        if name.startswith(f"{root}models/")
    ]
    if len(names) != 1 or not names[0]:
        raise BadInput(f"{archive.path} holds {len(names)} programs; one is read. {_AGAIN}")
    text = archive.read(f"{root}models/{names[0]}.json")
    told = json.loads(text)
    major = told["schema_version"]["major"]
    if major != _SCHEMA:
        raise BadInput(
            f"{archive.path} is written in version {major} of torch's format, this reads version "
            f"{_SCHEMA}. {_AGAIN}"
        )
    held = {
        (kind, name): tensor
        for kind in ("weights", "constants")
        for name, tensor in _tensors(archive, f"{root}data/{kind}/", names[0], kind).items()
    }
    return Exported(program_of(told, archive.path.name), held)


def _root(archive: Archive) -> str:
    """Return the folder of all members, after checking the archive's layout."""
    if "serialized_exported_program.json" in archive.names:
        raise BadInput(
            f"{archive.path} is in torch's older format, whose weights are pickles. {_AGAIN}"
        )
    root = archive.names[0].partition("/")[0] + "/" if archive.names else ""
    layout = {
        name: archive.read(root + name).strip() if root + name in archive.names else b""
        for name in ("archive_format", "archive_version", "byteorder")
    }
    if layout["archive_format"] != b"pt2" or layout["archive_version"] != b"0":
        raise BadInput(
            f"{archive.path} is no archive of an exported program that is known here. {_AGAIN}"
        )
    if layout["byteorder"] not in (b"little", b""):
        raise BadInput(f"{archive.path} was written on a big-endian machine, which is not read")
    return root


def _tensors(archive: Archive, folder: str, model: str, kind: str) -> dict[str, StoredTensor]:
    """Return the tensors that a list of weights or constants names."""
    listed = f"{folder}{model}_{kind}_config.json"
    if listed not in archive.names:
        raise BadInput(
            f"{archive.path} lists no {kind}, or keeps them as a pickle, as torch before 2.9 did. "
            f"{_AGAIN}"
        )
    found = {}
    for name, facts in json.loads(archive.read(listed))["config"].items():
        where = f"{archive.path}: {kind[:-1]} {name}"
        if facts["use_pickle"]:
            raise BadInput(f"{where} {_PICKLED}. Save plain tensors.")
        if (
            not str(facts["path_name"]).startswith(("weight_", "tensor_"))
            or "/" in facts["path_name"]
            or facts["tensor_meta"] is None
        ):
            raise BadInput(f"{where} is an object, not a tensor: only tensors are read")
        found[name] = StoredTensor(
            _tensor(archive, folder + facts["path_name"], facts["tensor_meta"], where),
            facts["is_param"] is True,
        )
    return found


def _tensor(archive: Archive, member: str, facts: dict[str, Any], where: str) -> Tensor:
    """Return a tensor over the raw bytes of a member.

    Raises `BadInput` where these do not hold all of it.
    """
    whole: Callable[[Any], int] = lambda size: _whole(size, where)  # noqa: E731
    sizes, strides, offset = (
        [*map(whole, facts["sizes"])],
        [*map(whole, facts["strides"])],
        whole(facts["storage_offset"]),
    )
    dtype = DTYPES.get(facts["dtype"])
    if dtype is None or facts["layout"] != 7 or len(sizes) != len(strides):
        raise BadInput(f"{where} is no dense tensor of a known type")
    if member not in archive.names:
        raise BadInput(f"{where}: the archive holds no {member}; is it complete?")
    data = archive.read(member)
    count, rest = divmod(len(data), dtype.itemsize)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if rest or math.prod(sizes) > count + _ROOM or (math.prod(sizes) and last >= count):
        raise BadInput(
            f"{where} needs more numbers than the {count} that are stored for it; is the file "
            "complete?"
        )
    flat = torch.frombuffer(data, dtype=dtype) if count else torch.zeros(0, dtype=dtype)
    tensor = (
        flat.as_strided(sizes, strides, offset)
        if math.prod(sizes)
        else torch.zeros(sizes, dtype=dtype)
    )
    on_gpu = facts["device"]["type"] == "cuda" and torch.cuda.is_available()
    return tensor.cuda() if on_gpu else tensor


def _whole(size: dict[str, Any], where: str) -> int:
    """Return a size as an integer, or raise `BadInput`."""
    if type(size.get("as_int")) is not int or not 0 <= size["as_int"] < 2**40:
        raise BadInput(f"{where} has the size {size}, which is no number of elements")
    return int(size["as_int"])
