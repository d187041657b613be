"""Modules and tensors that PyTorch does not register, and full copies.

Parameters, buffers and submodules are found by `nn.Module` itself. Some models also keep an
ensemble in a list, a filter bank as a plain attribute, or settings in an object of their own: all
these are found by searching the attributes.
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

_OWN = frozenset(vars(nn.Module()))  # attributes of every module, registered parts among them
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
_DEEPEST = 6  # levels of nested containers and objects


def loose(module: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Return the modules held without registration, and plain tensors.

    Modules come outermost first; the tensors are those of all modules.
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
    """Return a frozen copy of a network in a dtype.

    Its floating point parameters, buffers and plain tensors have the dtype, or each its own for
    None. Activations that a module has kept from an earlier call are copied without their graph.
    Raises whatever copying raises: for modules that hold a lock, a file or a stream, say.
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
    """Return the module, or a copy if its weights are inference tensors.

    Weights made in inference mode take no part in gradients. Raises `BadModel` where such a module
    cannot be copied.
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
    """Return a copy of a tensor, in the dtype if it is floating point."""
    copy_of = tensor.detach().clone()
    return copy_of.to(dtype) if dtype is not None and copy_of.is_floating_point() else copy_of


_DEFAULT_TYPE = threading.RLock()
"""Held while the default dtype is changed, which all threads share.

Two changes at a time would each restore the other's dtype.
"""


@contextlib.contextmanager
def made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Set the default dtype of new tensors.

    For those that code makes without naming a dtype: an initial state of zeros for a recurrent
    layer, say, or a matrix made in `forward`. None changes nothing.
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
