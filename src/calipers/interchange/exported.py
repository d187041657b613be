"""A module that runs the program of a .pt2 file.

It carries out the program's list of operations, one after another, on tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import BadInput, BadModel

GRAD, AUTOCAST = (
    "torch.ops.higher_order.wrap_with_set_grad_enabled",
    "torch.ops.higher_order.wrap_with_autocast",
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file, and whether it is a parameter."""

    tensor: Tensor
    parameter: bool


@dataclass(frozen=True)
class Ref:
    """A reference by name to a value that was computed before."""

    name: str


@dataclass(frozen=True)
class StoredCall:
    """One operation and its arguments.

    It is a function `run`, or a `block` of operations with gradients or autocast turned on or off.
    `results` are the names of the outputs, nested as these are (`several`: of a tuple or list). The
    values named in `last` are not used after this call.
    """

    target: str
    run: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    results: tuple[Any, ...]
    several: bool = False
    block: Block | None = None
    last: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Operations in order, from the names of their inputs to their outputs."""

    inputs: tuple[str, ...]
    calls: tuple[StoredCall, ...]
    outputs: tuple[Any, ...]
    single: bool = False


@dataclass(frozen=True, eq=False)
class ExportedFile:
    """What a file says, apart from the weights.

    `held` says where each input comes from that is not the argument: the kind and name of a tensor,
    or a constant. `shape` is that of the argument: for each axis a number, or the name of a free
    size, whose least and largest values are in `ranges`.
    """

    source: str
    block: Block
    argument: str
    held: dict[str, Any]
    shape: tuple[int | str, ...]
    ranges: dict[str, tuple[int | None, int | None]]
    hashed: str

    def digest(self) -> str:
        """Return a hash of everything but the weights."""
        return self.hashed

    def __deepcopy__(self, memo: object) -> ExportedFile:
        return self


class Exported(nn.Module):
    """The program of a .pt2 file, as a module on its argument (N, *D).

    Tensors that the program creates follow the module: its device and, where the module was
    converted, its dtype.
    """

    def __init__(self, program: ExportedFile, held: Mapping[tuple[str, str], StoredTensor]) -> None:
        super().__init__()
        self.program, self.places = program, dict[str, str]()
        for k, (name, source) in enumerate(program.held.items()):
            if not isinstance(source, tuple):
                continue
            if source not in held:
                raise BadInput(
                    f"{program.source}: the {source[0][:-1]} {source[1]} is not in the archive; is "
                    "it complete?"
                )
            one, self.places[name] = held[source], f"tensor_{k}"
            if one.parameter and one.tensor.is_floating_point():
                self.register_parameter(self.places[name], nn.Parameter(one.tensor))
            else:
                self.register_buffer(self.places[name], one.tensor)
        anchor = self._anchor()
        self.own = anchor.dtype if anchor is not None else None

    def _anchor(self) -> Tensor | None:
        """Return a floating-point tensor that stands for the module, or None."""
        return next(
            (t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()), None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the program's output."""
        self._check(x)
        known = {
            name: getattr(self, self.places[name]) if name in self.places else source
            for name, source in self.program.held.items()
        }
        known[self.program.argument] = x
        anchor = self._anchor()
        result = _Execution(self.own, x.dtype if anchor is None else anchor.dtype, x.device)(
            self.program.block, known
        )[0]
        if not isinstance(result, Tensor):
            raise BadModel(f"{self.program.source} returns no tensor")
        return result

    def _check(self, x: Tensor) -> None:
        """Raise `BadModel` for inputs of a shape that was not exported."""
        shape, free = self.program.shape, dict[str, int]()
        if x.dim() != len(shape):
            raise BadModel(
                f"{self.program.source} was exported for inputs of {len(shape)} axes (the first is "
                f"the batch), got {x.dim()}"
            )
        for axis, (told, n) in enumerate(zip(shape, x.shape, strict=True)):
            if isinstance(told, str) and type(n) is not int:
                continue
            low, high = (
                self.program.ranges.get(told, (None, None))
                if isinstance(told, str)
                else (told, told)
            )
            fits = (low is None or low <= 2 != told or n >= low) and (high is None or n <= high)
            if not fits or (isinstance(told, str) and free.setdefault(told, n) != n):
                cure = (
                    "; export it with a free batch: dynamic_shapes=({0: "
                    "torch.export.Dim('batch')},)"
                    if axis == 0
                    else ""
                )
                raise BadModel(
                    f"{self.program.source} was exported for inputs of shape "
                    f"({', '.join(map(str, shape))}), got {tuple(x.shape)}{cure}"
                )

    def extra_repr(self) -> str:
        """Return what tells this program from others with the same weights."""
        return f"{self.program.source}, {self.program.digest()}"


class _Execution:
    """Carries out blocks of operations.

    `own` is the dtype of the file's numbers; `dtype` and `device` are what stands for it now.
    """

    def __init__(self, own: torch.dtype | None, dtype: torch.dtype, device: torch.device) -> None:
        self.own, self.dtype, self.device = own, dtype, device

    def __call__(self, block: Block, known: dict[str, Any]) -> list[Any]:
        for call in block.calls:
            arguments = [self._value(a, known) for a in call.arguments]
            if call.block is None:
                assert call.run is not None
                result = call.run(
                    *arguments, **{name: self._value(a, known) for name, a in call.named.items()}
                )
            else:
                mode, rest = self._mode_of(call.target, arguments)
                with mode:
                    result = self(call.block, dict(zip(call.block.inputs, rest, strict=True)))
                result = result[0] if call.block.single else result
            _bind(known, call.results, tuple(result) if call.several else (result,))
            for name in call.last:
                del known[name]
        return [self._value(a, known) for a in block.outputs]

    def _mode_of(
        self, target: str, arguments: list[Any]
    ) -> tuple[contextlib.AbstractContextManager[Any], list[Any]]:
        """Return the context that a block runs in, and its other arguments."""
        if target == GRAD:
            return torch.set_grad_enabled(arguments[0]), arguments[1:]
        kind, dtype, enabled, cache = arguments[:4]
        return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache), arguments[
            4:
        ]

    def _value(self, argument: Any, known: dict[str, Any]) -> Any:
        """Return the value of an argument."""
        if isinstance(argument, Ref):
            return known[argument.name]
        if isinstance(argument, torch.dtype):
            return self.dtype if argument == self.own else argument
        if isinstance(argument, torch.device):
            return self.device
        return [self._value(a, known) for a in argument] if isinstance(argument, list) else argument


def _bind(known: dict[str, Any], names: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    """Store results under their names."""
    for name, value in zip(names, values, strict=False):
        if isinstance(name, tuple):
            _bind(known, name, tuple(value))
        elif name is not None:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise BadModel(f"the size {name} of the exported program is out of all bounds")
            known[name] = value
