"""Identity of the program that a model computes, part by part.

Every part that can change an output is included, under a name that distinguishes it from an earlier
version. Parts are the classes of all modules, the byte code of `forward` and of whatever it can
reach, attributes, hooks, closures, defaults, globals that are read, modules held in lists, the
graphs of exported, scripted and imported programs, and all weights. What belongs to Python, torch
or NumPy is identified by its name. Values that a call of the model itself changes (counters,
caches, what hooks collect) are left out. What cannot be inspected, such as a session of another
runtime, is identified by its type: there only the model's outputs tell versions apart (see
measurement/probe.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from calipers.models.canonical import code_bytes, global_names, hashed, plain, room_of, told, words

_WEIGHT = "weights of "
_PYTHON = "the version of Python (byte code of two versions cannot be compared)"
_MOST = 50_000  # parts; beyond that nothing is inspected further
_TOLD = 4  # differences that are listed
_UNREAD = frozenset(
    {
        "__init__",
        "__new__",
        "__repr__",
        "__str__",
        "__del__",
        "__init_subclass__",
        "__class_getitem__",
        "extra_repr",
        "__reduce__",
    }
)
_LOCKED = frozenset(
    "io _io logging multiprocessing pathlib random threading _thread weakref time asyncio "
    "concurrent socket ssl subprocess".split()
)
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_EVERY_MODULE = frozenset(
    {
        *nn.Module().__dict__,
        "_backward_pre_hooks",
        "_compiled_call_impl",
        "_is_torch_compile",
        "_forward_hooks_with_kwargs",
    }
)
# what these add to a module only checks or speeds up, and differs between processes
_COMPILERS = "torch._dynamo", "torch.export"
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class Identity:
    """A program by its parts: name to value.

    Short values are kept as they are, others hashed. `digest` identifies the whole.
    """

    parts: Mapping[str, str] = field(repr=False)

    @functools.cached_property
    def digest(self) -> str:
        """The hash of all parts."""
        return hashlib.sha256(
            json.dumps(sorted(self.parts.items())).encode("utf-8", "surrogatepass")
        ).hexdigest()[:16]

    def differences(self, then: Mapping[str, str]) -> str:
        """Return in words what differs from the parts of an earlier program."""
        names = [*then, *(n for n in self.parts if n not in then)]
        said = [
            _difference(n, then.get(n), self.parts.get(n))
            for n in names
            if then.get(n) != self.parts.get(n)
        ]
        said.sort(key=lambda text: (not text.startswith(_PYTHON[:23]), text.startswith(_WEIGHT)))
        more = f" and {len(said) - _TOLD} more" if len(said) > _TOLD else ""
        return "; ".join(said[:_TOLD]) + more


def _difference(name: str, before: str | None, now: str | None) -> str:
    """Return in words how one part differs."""
    if before is None or now is None:
        return f"{name} is {'new' if before is None else 'gone'}"
    return f"{name} differs" if "#" in (before[:1], now[:1]) else f"{name} was {before}, is {now}"


def identify(
    module: nn.Module, extra: Mapping[str, object], call: Callable[[], None] | None = None
) -> Identity:
    """Return the identity of a module.

    `extra` are facts that belong to it. `call` runs it once or more: parts that this changes are
    left out.
    """
    walk = _ModuleWalk(module)
    parts = walk.parts
    if call is not None and walk.may_change:
        call()
        after = _ModuleWalk(module).parts
        parts = {name: value for name, value in parts.items() if after.get(name) == value}
    if any(value.startswith("#") and name.startswith("code of ") for name, value in parts.items()):
        parts[_PYTHON] = ".".join(map(str, sys.version_info[:2]))
    for name, value in extra.items():
        if value is not None:
            parts[name] = told(value, plain(value) or b"")
    return Identity(parts)


class _ModuleWalk:
    """A traversal of everything that a module refers to.

    `may_change` is False where only layers of torch were found.
    """

    def __init__(self, root: nn.Module) -> None:
        self.parts: dict[str, str] = {}
        self.may_change = False
        self.places: dict[int, str] = {}
        # visited objects are kept alive, so that no other object gets the same address
        self.kept: list[object] = []
        self.mentioned: set[str] = {"forward"}
        self.methods: list[tuple[str, str, Any]] = []
        self.module("", root)
        self._reachable()

    def put(self, name: str, value: str) -> None:
        """Add a part; a second one of the same name is numbered."""
        unique, n = name, 1
        while unique in self.parts:
            n += 1
            unique = f"{name} ({n})"
        self.parts[unique] = value

    def known(self, name: str, value: object) -> bool:
        """Return whether this very object has been visited before.

        If so, a part that says where is added; else the object gets its place.
        """
        place = self.places.get(id(value))
        if place is None:
            self.places[id(value)] = name
            self.kept.append(value)
            return len(self.parts) > _MOST
        if place != name:
            self.put(name, f"the same as {place}")
        return True

    # ---- modules
    # ----------------------------------------------------------------------------------------------

    def module(self, path: str, root: nn.Module) -> None:
        """Add a module and all that it holds, under the path that leads to it."""
        if path and self.known(path, root):
            return
        inside = [
            (".".join(filter(None, (path, name))), m)
            for name, m in root.named_modules(remove_duplicate=False)
        ]
        fresh = [(name, m) for name, m in inside if m is root or not self.known(name, m)]
        if not path:
            self.known("the model", root)
        for name, m in fresh:
            self._one(name, m)

    def _one(self, path: str, m: nn.Module) -> None:
        """Add one module without its children."""
        label, kind = path or "the model", type(m)
        self.put(f"type of {label}", _name_of(kind))
        if isinstance(m, fx.GraphModule):
            self._graph(label, m)
        elif isinstance(m, torch.jit.ScriptModule):
            self._script(label, m)
        else:
            mine = room_of(kind.__module__) != "library"
            self.may_change |= mine
            held = {} if kind.__module__.startswith(_COMPILERS) else m.__dict__
            for key, value in held.items():
                if key not in _EVERY_MODULE and (mine or not key.startswith("_")):
                    self.value(_under(path, key), value)
            self.classes(kind)
        for tensors in (
            m.named_parameters(recurse=False, remove_duplicate=False),
            m.named_buffers(recurse=False, remove_duplicate=False),
        ):
            for key, tensor in tensors:
                self.put(f"{_WEIGHT}{_under(path, key)}", f"#{hashed(plain(tensor) or b'')}")
        self._packed(path, m)
        for key, what in _HOOKS.items():
            for i, hook in enumerate(getattr(m, key, {}).values(), 1):
                if not str(getattr(hook, "__module__", "")).startswith(_COMPILERS):
                    self.may_change = True
                    self.value(f"{what} {i} of {label}", hook)

    def _packed(self, path: str, m: nn.Module) -> None:
        """Add the packed weights of quantised layers.

        They are neither parameters nor buffers.
        """
        if "quantized" not in type(m).__module__:
            return
        held: dict[str, Any] = {}
        m._save_to_state_dict(held, "", True)
        for key, value in held.items():
            if key not in m._parameters and key not in m._buffers:
                self.put(f"{_WEIGHT}{_under(path, key)}", f"#{hashed(plain(value) or b'')}")

    def _graph(self, label: str, m: fx.GraphModule) -> None:
        """Add a traced graph and the functions that it calls."""
        self.put(f"program of {label}", f"#{hashed(_ADDRESS.sub('', str(m.graph)).encode())}")
        for node in m.graph.nodes:
            if isinstance(node.target, types.FunctionType):
                self.value(f"call {node.name} of {label}", node.target)

    def _script(self, label: str, m: torch.jit.ScriptModule) -> None:
        """Add a scripted program and its constants."""
        try:
            code, constants = m.code_with_constants
            self.put(
                f"program of {label}",
                f"#{hashed(code.encode() + (plain(dict(constants.const_mapping)) or b''))}",
            )
        except RuntimeError:  # a module without a forward of its own
            self.put(f"program of {label}", "none")

    # ---- values
    # ----------------------------------------------------------------------------------------------

    def value(self, name: str, value: Any) -> None:
        """Add anything that a module, a function or a class refers to."""
        data = plain(value)
        if data is not None:
            self.put(name, told(value, data))
        elif isinstance(value, nn.Module):
            self.module(name, value)
        elif not self.known(name, value):
            self._opened(name, value)

    def _opened(self, name: str, value: Any) -> None:
        """Add the contents of a container, a function, a class or an object."""
        if isinstance(value, dict):
            for i, (key, item) in enumerate(value.items()):
                self.value(
                    f"{name}[{key!r}]" if isinstance(key, str | int) else f"{name}[{i}]", item
                )
        elif isinstance(value, list | tuple | set | frozenset):
            for i, item in enumerate(value):
                self.value(f"{name}[{i}]", item)
        elif isinstance(value, types.FunctionType):
            self.function(name, value)
        elif isinstance(value, types.MethodType | functools.partial):
            for part in ("__func__", "__self__", "func", "args", "keywords"):
                if hasattr(value, part):
                    self.value(
                        name if part in ("__func__", "func") else f"{name} {part.strip('_')}",
                        getattr(value, part),
                    )
        elif isinstance(value, staticmethod | classmethod | property | functools.cached_property):
            self.value(
                name,
                getattr(value, "fget", None)
                or getattr(value, "func", None)
                or getattr(value, "__func__", None),
            )
        elif isinstance(value, type):
            self.put(name, _name_of(value))
            self.classes(value)
        elif isinstance(value, types.ModuleType):
            self.put(name, value.__name__)
        elif isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
            self.value(name, value.__wrapped__)
        else:
            self._instance(name, value)

    def function(self, name: str, f: types.FunctionType) -> None:
        """Add what a function does and everything that it reads.

        Closure, defaults, and where the code is the user's own, globals.
        """
        room = room_of(f.__globals__.get("__name__"), f.__code__.co_filename)
        if room == "library":
            self.put(f"code of {name}", f"{f.__module__}.{f.__qualname__}")
        else:
            self.put(f"code of {name}", f"#{hashed(code_bytes(f.__code__))}")
            self.mentioned |= words(f.__code__)
            self.may_change = True
        for cell, held in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if cell != "__class__" and (inside := _contents(held)) is not held:
                self.value(f"{cell} in {name}", inside)
        for key, default in [
            *enumerate(f.__defaults__ or (), 1),
            *(f.__kwdefaults__ or {}).items(),
        ]:
            self.value(f"default {key} of {name}", default)
        for key, held in vars(f).items():
            if key != "__wrapped__" and room != "library":
                self.value(f"{name}.{key}", held)
        if room == "own":
            for key in sorted(global_names(f.__code__)):
                if key in f.__globals__:
                    self._global(key, f.__globals__[key], f)

    def _global(self, key: str, value: object, reader: types.FunctionType) -> None:
        """Add a global that a function reads; of the user's modules, members."""
        if not isinstance(value, types.ModuleType):
            self.value(f"global {key}", value)
        elif room_of(value.__name__) == "own":
            for word in sorted(words(reader.__code__)):
                if word in vars(value):
                    self.value(f"global {key}.{word}", vars(value)[word])

    def classes(self, kind: type) -> None:
        """Add what a class and its bases define, except those of libraries.

        Methods are added once some code mentions them.
        """
        for one in kind.__mro__:
            if room_of(one.__module__) == "library" or self.places.get(id(one), "").startswith(
                "class "
            ):
                continue
            self.places[id(one)] = f"class {one.__qualname__}"
            self.kept.append(one)
            for key, value in vars(one).items():
                if isinstance(
                    value,
                    types.FunctionType
                    | staticmethod
                    | classmethod
                    | property
                    | functools.cached_property,
                ):
                    if key not in _UNREAD:
                        self.methods.append((f"{one.__qualname__}.{key}", key, value))
                elif not (
                    key.startswith(("__", "_abc_"))
                    or isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType)
                ):
                    self.value(f"{one.__qualname__}.{key}", value)

    def _reachable(self) -> None:
        """Add the methods that any code found so far mentions.

        Repeated until nothing new is found.
        """
        while True:
            ready = [
                key in self.mentioned or (key.startswith("__") and key.endswith("__"))
                for _, key, _ in self.methods
            ]
            if not any(ready):
                return
            named = [m for m, now in zip(self.methods, ready, strict=True) if now]
            self.methods = [m for m, now in zip(self.methods, ready, strict=True) if not now]
            for name, _, method in named:
                self.value(name, method)

    def _instance(self, name: str, value: Any) -> None:
        """Add an object by its type and state."""
        kind = type(value)
        self.put(f"type of {name}", _name_of(kind))
        root = kind.__module__.partition(".")[0]
        if isinstance(
            value, torch._ops.OpOverload | torch._ops.OpOverloadPacket | types.BuiltinFunctionType
        ):
            self.put(
                name, f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
            )
            owner = getattr(value, "__self__", None)
            if plain(owner) is not None or (
                room_of(type(owner).__module__) != "library"
                and "pybind11" not in type(owner).__name__
            ):
                self.value(f"{name} self", owner)
        elif isinstance(value, torch.jit.ScriptFunction):
            self.put(f"program of {name}", f"#{hashed(str(value.code).encode())}")
        elif root == "calipers":
            # a classifier, possibly of this very module
            if isinstance(getattr(value, "module", None), nn.Module):
                for key in ("module", "mean", "std", "samples"):
                    self.value(f"{name}.{key}", getattr(value, key))
            elif hasattr(value, "digest"):
                self.put(name, str(value.digest()))
        elif root == "torch" and not kind.__module__.startswith("torch.distributions"):
            return
        elif root not in _LOCKED and not isinstance(value, Enum):
            self.classes(kind)
            for key, held in _state(value):
                self.value(f"{name}.{key}", held)


def _state(value: object) -> Iterator[tuple[str, object]]:
    """Yield the state of an object: its attributes.

    Where it has none, what a copy would be made of.
    """
    held = getattr(value, "__dict__", None)
    slots = [slot for one in type(value).__mro__ for slot in _listed(getattr(one, "__slots__", ()))]
    if held or slots:
        yield from (held or {}).items()
        yield from (
            (s, getattr(value, s))
            for s in slots
            if s not in ("__dict__", "__weakref__") and hasattr(value, s)
        )
        return
    try:
        made = value.__reduce_ex__(4)
    except Exception:  # sessions, locks, handles: only the model's outputs tell
        return
    if isinstance(made, str):
        yield "name", made
    else:
        yield from (
            (f"state {i}", list(part) if i >= 3 else part)
            for i, part in enumerate(made[1:], 1)
            if part is not None
        )


def _listed(slots: Any) -> list[str]:
    """Return `__slots__` as a list."""
    return [slots] if isinstance(slots, str) else list(slots)


def _contents(cell: Any) -> Any:
    """Return the content of a closure cell, or the cell if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty
        return cell


def _name_of(kind: type) -> str:
    """Return a class's name.

    Of the user's own classes without the module, which has another name when it is run than when it
    is imported.
    """
    return (
        kind.__qualname__
        if room_of(kind.__module__) == "own"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def _under(path: str, key: str) -> str:
    """Return the path of an attribute."""
    return f"{path}.{key}" if path else key
