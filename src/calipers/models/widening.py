"""Removal of casts to float32 inside a float64 copy of a model.

In a float32 model `x.float()` or `softmax(x, dtype=torch.float32)` changes nothing; in its float64
copy such a cast would round what the model itself does not round. There such casts lead to float64
instead.

Autocast leaves float64 alone: the copy would not round what the model rounds to half precision.
Such a copy is another network, and refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calipers.errors import BadModel

_CASTING = frozenset(
    "to type float softmax log_softmax sum mean cumsum cumprod prod norm vector_norm tensor "
    "as_tensor zeros ones full empty eye arange linspace zeros_like ones_like full_like empty_like "
    "new_zeros new_ones new_full new_tensor asarray".split()
)
"""Functions that take a dtype and return numbers of it."""


class _Widening(TorchFunctionMode):
    """A mode in which functions told float32 are told float64 instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function with float64 wherever float32 is asked for."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise BadModel(
                "a part of the model runs in half precision by autocast, which no copy in double "
                "precision does"
            )
        name = str(getattr(func, "__name__", ""))
        if name.removeprefix("linalg_") not in _CASTING:
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            return args[0].double()
        return func(*map(_wide, args), **{key: _wide(v) for key, v in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    """Return float64 for float32, and anything else unchanged."""
    return torch.float64 if value is torch.float32 else value


def widening(module: nn.Module) -> nn.Module:
    """Return the module; inside its calls casts to float32 go to float64.

    Whoever holds the module casts as usual: a number is looked at in float32 to tell whether
    float32 holds it.
    """
    forward = module.forward

    @functools.wraps(forward)
    def wide(*args: Any, **kwargs: Any) -> Any:
        with widened(True):
            return forward(*args, **kwargs)

    module.forward = wide
    return module


@contextlib.contextmanager
def widened(on: bool) -> Iterator[None]:
    """Turn casts to float32 into casts to float64, if `on`."""
    with _Widening() if on else contextlib.nullcontext():
        yield
