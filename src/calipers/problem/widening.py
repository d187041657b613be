"""Casts to single precision inside a model, which in a double copy of it would round what the model
itself does not round.

Of a model in single precision `x.float()` or `softmax(x, dtype=torch.float32)` changes nothing; of
its copy it would. There such casts lead to double precision instead.

Autocast leaves double precision alone: what the model rounds to half precision its copy would not.
Such a copy is another network, and refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from calipers.errors import BadModel

_CASTING = frozenset(
    "to type float softmax log_softmax sum mean cumsum cumprod prod norm vector_norm tensor "
    "as_tensor zeros ones full empty eye arange linspace zeros_like ones_like full_like empty_like "
    "new_zeros new_ones new_full new_tensor asarray".split()
)
"""Functions that are told a type, and make numbers of it."""


class _Widening(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, told double where it is told single precision."""
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
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def widened(on: bool) -> Iterator[None]:
    """Let what code casts to single precision become double, if `on`."""
    with _Widening() if on else contextlib.nullcontext():
        yield
