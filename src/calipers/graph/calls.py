"""Readers of a call in an exported program.

They return its arguments, its keyword-only options, and the source line it comes from.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

_ROUNDED_ONCE = frozenset("add sub mul div sqrt rsqrt reciprocal".split())


def options(fx_node: fx.Node) -> dict[str, Any]:
    """Return the keyword-only arguments of a call, defaults filled in.

    Those that change no result are left out.
    """
    schema = getattr(fx_node.target, "_schema", None)
    options = {
        a.name: fx_node.kwargs.get(a.name, a.default_value)
        for a in (schema.arguments if schema is not None else ())
        if a.kwarg_only
    }
    return {
        name: value
        for name, value in options.items()
        if name not in ("memory_format", "dtype", "layout", "device", "pin_memory")
    }


def unread(fx_node: fx.Node) -> bool:
    """Return whether a call sets an option that builders do not see.

    Such an option is keyword-only, changes the result, and differs from its default; the alpha of
    add is an example.
    """
    schema = getattr(fx_node.target, "_schema", None)
    defaults = {
        a.name: a.default_value
        for a in (schema.arguments if schema is not None else ())
        if a.kwarg_only
    }
    return any(value != defaults[name] for name, value in options(fx_node).items())


def leaves(args: Any) -> list[Any]:
    """Return everything in nested lists and tuples, in order."""
    return [leaf for a in args for leaf in leaves(a)] if isinstance(args, (list, tuple)) else [args]


def place_of(fx_node: fx.Node) -> str:
    """Return the module path and the last source line outside torch.

    Both as far as the export recorded them.
    """
    stack = fx_node.meta.get("nn_module_stack") or {}
    path = [str(value[0]) for value in stack.values()]
    module = re.sub(r"^(network(\.of)?)?(\.|$)", "", path[-1] if path else "") or "the model"
    files = [
        line.strip()
        for line in (fx_node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File")
    ]
    own = [line for line in files if "/torch/" not in line]
    place = (
        (own or files or [""])[-1]
        .removeprefix("File ")
        .replace('"', "")
        .replace(", line ", ":")
        .split(", in ")[0]
    )
    return f"{module} ({place})" if place else module


def with_absolute_constants(args: Any) -> Any:
    """Return the arguments with constants replaced by absolute values."""
    if isinstance(args, (list, tuple)):
        return type(args)(with_absolute_constants(a) for a in args)
    return args.abs() if isinstance(args, Tensor) and args.is_floating_point() else args


def has_parameters_for(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> bool:
    """Return whether the function accepts all arguments of a call."""
    try:
        inspect.signature(function).bind(None, *args, **options)
    except TypeError:
        return False
    return True


def rounded_often(name: str, args: tuple[Any, ...], made: Any) -> bool:
    """Return whether float32 may give a different folded constant.

    That is, one that differs by more than a rounding or two.
    """
    once = name.split(".")[1:2] and name.split(".")[1] in _ROUNDED_ONCE
    return not _in_float32(made) and not (once and all(map(_in_float32, leaves(args))))


def _in_float32(value: Any) -> bool:
    return (
        not isinstance(value, Tensor)
        or not value.is_floating_point()
        or torch.equal(value.float().to(value.dtype), value)
    )
