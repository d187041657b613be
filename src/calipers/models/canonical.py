"""Bytes that stand for a value, the same in every process.

Data by their content, code by what it executes; without addresses, paths or line numbers.
"""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
import types
from collections import OrderedDict, deque
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Room = Literal["library", "vendor", "own"]
"""Owner of a piece of code.

`library` code (Python, torch, NumPy, calipers) is identified by its name, `vendor` (installed
packages) and `own` code by its byte code.
"""

_LIBRARIES = frozenset(
    {"torch", "numpy", "calipers", "builtins", "functools", *sys.stdlib_module_names}
) - {"__main__"}
_DEEPEST = 20
_SHOWN = 48  # characters of a value that is shown rather than hashed
_SCALARS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_NAMED = (torch.dtype, torch.layout, torch.memory_format)
# flags of a function: whether it takes *arguments, yields or awaits; the other flags say how it was
# compiled
_KIND = 0x3FF
_GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})


def hashed(data: bytes) -> str:
    """Return a short hash of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def told(value: object, data: bytes) -> str:
    """Return what stands for plain data in an identity.

    The value itself where it is short, else a hash.
    """
    short = isinstance(value, _SCALARS) or (
        isinstance(value, tuple | list) and all(isinstance(v, _SCALARS) for v in value)
    )
    text = repr(value) if short else ""
    return text if 0 < len(text) <= _SHOWN else f"#{hashed(data)}"


def plain(value: object, depth: int = _DEEPEST) -> bytes | None:
    """Return the bytes of plain data, or None for anything else.

    Plain are numbers, text, tensors, arrays and containers of these; not what contains itself.
    """
    kind = type(value).__name__.encode()
    if isinstance(value, _SCALARS) and not isinstance(value, Enum):
        return kind + repr(value).encode("utf-8", "backslashreplace")
    if isinstance(value, Tensor):
        return b"tensor" + tensor_bytes(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
        return (
            b"array"
            + f"{value.dtype.str}{value.shape}".encode()
            + np.ascontiguousarray(value).tobytes()
        )
    if isinstance(value, (*_NAMED, range, slice)):
        return kind + repr(value).encode()
    if isinstance(value, Enum):
        return kind + value.name.encode()
    if depth <= 0:
        return None
    if isinstance(value, np.ndarray):
        return (
            _all([value.shape, *value.ravel()], depth, b"objects")
            if value.dtype.kind == "O"
            else None
        )
    if isinstance(value, set | frozenset):
        found = [plain(v, depth - 1) for v in value]
        return (
            None
            if None in found
            else b"set" + b"".join(sorted(_framed(d) for d in found if d is not None))
        )
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        return _all([v for item in value.items() for v in item], depth, b"dict")
    return _all(value, depth, kind) if isinstance(value, list | tuple | deque) else None


def _all(values: Any, depth: int, kind: bytes) -> bytes | None:
    """Return the bytes of a container, or None if an item is not plain."""
    found = []
    for value in values:
        data = plain(value, depth - 1)
        if data is None:
            return None
        found.append(_framed(data))
    return kind + b"(" + b"".join(found) + b")"


def _framed(data: bytes) -> bytes:
    """Return bytes after their length."""
    return len(data).to_bytes(8, "big") + data


def tensor_bytes(t: Tensor) -> bytes:
    """Return the content of a tensor of any kind and on any device.

    Dense, sparse or quantised; for a tensor without storage, its shape.
    """
    head = f"{tuple(t.shape)}{t.dtype}{t.layout}".encode()
    t = t.detach()
    if t.is_meta:
        return head
    if t.is_nested:
        return head + b"".join(map(tensor_bytes, t.unbind()))
    if t.is_quantized:
        scales = (
            (t.q_per_channel_scales(), t.q_per_channel_zero_points())
            if "channel" in str(t.qscheme())
            else ()
        )
        scheme = str(t.qscheme()) if scales else f"{t.qscheme()}{t.q_scale()!r}{t.q_zero_point()}"
        return head + scheme.encode() + b"".join(map(tensor_bytes, (t.int_repr(), *scales)))
    if t.layout != torch.strided:
        t = t.to_dense()
    flat = t.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return head + flat.view(torch.uint8).numpy().tobytes()


def code_bytes(code: types.CodeType) -> bytes:
    """Return what a function executes, without its place in a file.

    Its instructions, names and constants.
    """
    arguments = code.co_varnames[
        : code.co_argcount
        + code.co_kwonlyargcount
        + bool(code.co_flags & 4)
        + bool(code.co_flags & 8)
    ]
    counts = (
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags & _KIND,
    )
    head = plain(
        (
            code.co_code,
            code.co_exceptiontable,
            code.co_names,
            arguments,
            counts,
            code.co_freevars,
            code.co_cellvars,
        )
    )
    constants = [
        code_bytes(c) if isinstance(c, types.CodeType) else plain(c) or b"" for c in code.co_consts
    ]
    return (head or b"") + b"".join(map(_framed, constants))


def words(code: types.CodeType) -> set[str]:
    """Return all names that a function mentions.

    Including strings that could be names: what it may look up on other objects.
    """
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= words(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return found


def global_names(code: types.CodeType) -> set[str]:
    """Return the names that a function reads from its module."""
    found = {str(i.argval) for i in dis.get_instructions(code) if i.opname in _GLOBALS}
    return found.union(*(global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def room_of(module: str | None, file: str | None = None) -> Room:
    """Return whose code a module is, by its name and its file."""
    root = (module or "").partition(".")[0]
    if root in _LIBRARIES:
        return "library"
    if file is None:
        file = getattr(sys.modules.get(module or ""), "__file__", None)
    return "vendor" if file is not None and _installed(file) else "own"


@cache
def _installed(file: str) -> bool:
    """Return whether a file belongs to an installed package."""
    folders = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    parts = Path(file).parts
    return (
        "site-packages" in parts
        or "dist-packages" in parts
        or any(Path(folder) in Path(file).parents for folder in folders)
    )
