"""What does a module hold that PyTorch does not see? Networks in lists, tensors in plain
attributes; and a copy that takes them along.

Parameters, buffers and submodules are found by `nn.Module` itself. People also keep an ensemble in
a list, a filter bank as an attribute, settings in an object of their own: all that is found by
looking through the attributes.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import BadModel, first_line

_OWN = frozenset(vars(nn.Module()))  # what every module has, registered parts among them
_OPAQUE = (
    type,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    ModuleType,
    torch.jit.ScriptModule,
    str,
    bytes,
)
_DEEPEST = 6  # containers and objects within each other


def loose(module: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Return the modules that are held without being registered, outermost first, and the plain
    tensors of all modules.
    """
    seen = {id(part) for part in module.modules()}
    seen |= {id(t) for t in [*module.parameters(), *module.buffers()]}
    modules, tensors, waiting = list[nn.Module](), list[Tensor](), list(module.modules())
    while waiting:
        part = waiting.pop(0)
        for value in _held(vars(part), seen, 0, skip=_OWN):
            if isinstance(value, Tensor):
                tensors.append(value)
            else:
                modules.append(value)
                inner = [m for m in value.modules() if id(m) not in seen or m is value]
                seen |= {id(m) for m in inner} | {
                    id(t) for m in inner for t in [*m.parameters(False), *m.buffers(False)]
                }
                waiting += inner
    return modules, tensors


def _held(
    value: Any, seen: set[int], depth: int, skip: frozenset[str] = frozenset()
) -> Iterator[Any]:
    """Yield the modules and tensors in a value that were not seen before."""
    if depth > _DEEPEST or isinstance(value, _OPAQUE):
        return
    if isinstance(value, Tensor | nn.Module):
        if id(value) not in seen:
            seen.add(id(value))
            yield value
        return
    inside: Any = ()
    if isinstance(value, dict):
        inside = [v for k, v in value.items() if k not in skip]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif depth and hasattr(value, "__dict__"):
        inside = [vars(value)]
    if inside and id(value) not in seen:
        if depth:
            seen.add(id(value))
        for one in inside:
            yield from _held(one, seen, depth + 1)


def copied(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a frozen copy of a network whose floating point parameters, buffers and plain tensors
    have the given dtype, or each its own.

    Activations that a module has kept from an earlier call are copied without their graph. Raises
    whatever copying raises: of modules that hold a lock, a file or a stream, say.
    """
    modules, tensors = loose(network)
    with torch.inference_mode(False):
        plain = {id(t): _converted(t, dtype) for t in tensors}
        made: nn.Module = copy.deepcopy(network, plain)
        for part in [made, *loose(made)[0]] if modules else [made]:
            if dtype is not None:
                part.to(dtype)
            for parameter in part.parameters():
                parameter.requires_grad_(False)
    return made


def usable(module: nn.Module) -> nn.Module:
    """Return the module, or a copy of one whose weights were made in inference mode: such weights
    take no part in gradients.
    """
    if not any(t.is_inference() for t in [*module.parameters(), *module.buffers()]):
        return module
    try:
        return copied(module, None)
    except Exception as error:
        raise BadModel(
            "the model's weights were made in torch.inference_mode(), where nothing has "
            f"gradients, and it cannot be copied ({first_line(error)}). Build or load it outside."
        ) from error


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    copy_of = tensor.detach().clone()
    return copy_of.to(dtype) if dtype is not None and copy_of.is_floating_point() else copy_of


_DEFAULT_TYPE = threading.RLock()
"""Held by whoever has changed the default type, which all threads share: two at once would put back
each other's.
"""


@contextlib.contextmanager
def made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Let tensors that code makes without naming a type have this one.

    A state of zeros for a recurrent layer, say, or a matrix made in `forward`. None changes
    nothing.
    """
    if dtype is None:
        yield
        return
    with _DEFAULT_TYPE:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
