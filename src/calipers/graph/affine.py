"""Affine operations and their adjoints.

Linear layers and convolutions have adjoints written by hand; all other operations use PyTorch's
vector-Jacobian product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from calipers.conv_gradient import BlockedAdjoint, few_channels
from calipers.graph.generic import Generic as Generic
from calipers.graph.kinds import Affine, Entry, Shape, Windowed, diagonal_entry
from calipers.graph.parameters import completed, require, require_numbers

# up to this many entries a window's transposed convolution runs as one matrix product
WINDOW_MATRIX = 2**20


@dataclass(frozen=True, eq=False)
class Linear(Affine):
    """A linear layer: x W^T + b over the last axis."""

    weight: Tensor
    bias: Tensor | None
    constant_terms: Tensor | None = None
    """As for `Scale`."""

    def value(self, *inputs: Tensor) -> Tensor:
        """Return x W^T + b: (M, ..., in) -> (M, ..., out)."""
        return functional.linear(inputs[0], self.weight, self.bias)

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return a W: (M, ..., out) -> (M, ..., in)."""
        return (a @ self.weight,)

    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return |W| r."""
        return functional.linear(inputs[0], self.weight.abs())

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Return weight and bias where they are the model's own, not folded."""
        if self.constant_terms is not None:
            return ()
        return tuple(t for t in (self.weight, self.bias) if t is not None)

    def longest_sum(self, shapes: list[Shape]) -> int:
        """Return the number of weights of one output."""
        return self.weight[0].numel()

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of its weights."""
        return Entry({"op": "linear"}, _given(weight=self.weight, bias=self.bias))

    def to(self, dtype: torch.dtype) -> Linear:
        """Return the layer in another dtype."""
        bias, constant_terms = (
            None if t is None else t.to(dtype) for t in (self.bias, self.constant_terms)
        )
        return Linear(self.weight.to(dtype), bias, constant_terms)


@dataclass(frozen=True, eq=False)
class Conv(Windowed):
    """A convolution in one, two or three dimensions."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    input_size: tuple[int, ...]
    constant_terms: Tensor | None = None
    """As for `Scale`."""

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )

    @property
    def _convolve(self) -> Callable[..., Tensor]:
        return (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.stride) - 1]

    def value(self, *inputs: Tensor) -> Tensor:
        """Return the convolution: (M, C, *size) -> (M, C', *size')."""
        return self._run(inputs[0], self.weight, self.bias)

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of the convolution with respect to its input.

        It takes the fastest of three ways (measured on a CPU, see PERFORMANCE.md).
        """
        if self._blocked is not None:
            return (self._blocked(a, self.input_size),)
        room = tuple(k - 1 - p for k, p in zip(self.weight.shape[2:], self.padding, strict=True))
        if (
            a.dtype == torch.float32
            and self.groups == 1
            and {*self.stride, *self.dilation} == {1}
            and min(room) >= 0
        ):
            return (self._convolve(a, self._flipped, None, padding=room),)
        return (self._input_gradient(a, self.input_size, self.padding),)

    @cached_property
    def _blocked(self) -> BlockedAdjoint | None:
        plain = (
            len(self.stride) == 2
            and self.groups == 1
            and set(self.dilation) == {1}
            and self.weight.dtype == torch.float32
        )
        return (
            BlockedAdjoint(self.weight, self.stride, self.padding)
            if plain and few_channels(self.weight.shape[1], self.stride)
            else None
        )

    @cached_property
    def _flipped(self) -> Tensor:
        return self.weight.flip(*range(2, self.weight.dim())).transpose(0, 1).contiguous()

    def _input_gradient(self, a: Tensor, size: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        """Return the input gradient as sums of products.

        The rounding allowances assume such sums. In float64 this is two to four times as fast on a
        CPU as the library's transposed convolution.
        """
        gradient = (conv1d_input, conv2d_input, conv3d_input)[len(self.stride) - 1]
        channels = self.weight.shape[1] * self.groups
        result: Tensor = gradient(
            (len(a), channels, *size),
            self.weight,
            a,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )  # type: ignore[no-untyped-call]
        return result

    def window(self, size: int, axis: int) -> int:
        """Return (size - 1) strides plus the extent of one kernel."""
        return (
            (size - 1) * self.stride[axis]
            + self.dilation[axis] * (self.weight.shape[2 + axis] - 1)
            + 1
        )

    def window_adjoint(self, a: Tensor) -> Tensor:
        """Return the transposed convolution without padding, for images only.

        Where the windows are small it is one matrix product, and the matrix is cached.
        """
        shape = tuple(a.shape[1:])
        size = tuple(self.window(n, axis) for axis, n in enumerate(shape[1:]))
        if a[0].numel() * self.weight.shape[1] * self.groups * size[0] * size[1] > WINDOW_MATRIX:
            return self._input_gradient(a, size, (0, 0))
        if shape not in self._matrices:
            eye = torch.eye(a[0].numel(), dtype=a.dtype, device=a.device).view(-1, *shape)
            self._matrices[shape] = self._input_gradient(eye, size, (0, 0)).flatten(1)
        return (a.flatten(1) @ self._matrices[shape]).view(len(a), -1, *size)

    @cached_property
    def _matrices(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return the convolution with |W| and no bias."""
        return self._run(inputs[0], self.weight.abs(), None)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Return weight and bias where they are the model's own, not folded."""
        if self.constant_terms is not None:
            return ()
        return tuple(t for t in (self.weight, self.bias) if t is not None)

    def longest_sum(self, shapes: list[Shape]) -> int:
        """Return the number of weights of one output."""
        return self.weight[0].numel()

    def windowed(self) -> Windowed | None:
        """Return the convolution itself."""
        return self

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of its weights, strides, paddings and dilations."""
        steps = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        facts = {"op": "convolution", **{k: list(v) for k, v in steps.items()}}
        return Entry({**facts, "groups": self.groups}, _given(weight=self.weight, bias=self.bias))

    def to(self, dtype: torch.dtype) -> Conv:
        """Return the convolution in another dtype."""
        bias, constant_terms = (
            None if t is None else t.to(dtype) for t in (self.bias, self.constant_terms)
        )
        return dataclasses.replace(
            self, weight=self.weight.to(dtype), bias=bias, constant_terms=constant_terms
        )


@dataclass(frozen=True, eq=False)
class Scale(Affine):
    """scale * x + shift, with constants that broadcast over the batch.

    Examples are batch norm in evaluation mode and arithmetic with constants.
    """

    scale: Tensor
    shift: Tensor
    constant_terms: Tensor | None = None
    """The total magnitude of the terms added up into the shift.

    It is given where it exceeds the shift's absolute value: when constants are folded, terms may
    cancel, and the rounding error is proportional to what cancelled.
    """

    diagonal: bool = True
    detour: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    """For batch norm, the magnitudes of its execution in several steps.

    These are the largest product of its factors, each at least 1, and the size of the mean that is
    subtracted before.
    """

    def value(self, *inputs: Tensor) -> Tensor:
        """Return scale * x + shift: (M, *shape) -> (M, *shape)."""
        return inputs[0] * self.scale + self.shift

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return scale * a: the matrix is diagonal, so its own transpose."""
        return (a * self.scale,)

    def slopes(self) -> tuple[Tensor, ...]:
        """Return the factor of each element of the input."""
        return (self.scale,)

    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return |scale| r."""
        return inputs[0] * self.scale.abs()

    def longest_sum(self, shapes: list[Shape]) -> int:
        """Return 1: each output is one product."""
        return 1

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of its factors and shift."""
        return diagonal_entry(_one(self.scale, shape).expand(shape), bias=_one(self.shift, shape))

    def to(self, dtype: torch.dtype) -> Scale:
        """Return the operation in another dtype."""
        made_of, detour = self.constant_terms, self.detour
        return dataclasses.replace(
            self,
            scale=self.scale.to(dtype),
            shift=self.shift.to(dtype),
            constant_terms=None if made_of is None else made_of.to(dtype),
            detour=None if detour is None else (detour[0].to(dtype), detour[1].to(dtype)),
        )


@dataclass(frozen=True, eq=False)
class Sum(Affine):
    """signs[0] * x_0 + signs[1] * x_1, both of one shape.

    Residual connections are sums of this kind.
    """

    signs: tuple[float, float]

    def __post_init__(self) -> None:
        require_numbers("a sum", first=self.signs[0], second=self.signs[1])

    def value(self, *inputs: Tensor) -> Tensor:
        """Return the weighted sum of two inputs (M, *shape)."""
        return self.signs[0] * inputs[0] + self.signs[1] * inputs[1]

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return a times the sign, for each input."""
        return tuple(a if sign == 1 else sign * a for sign in self.signs)

    def slopes(self) -> tuple[Tensor, ...]:
        """Return the factor of each element of each input."""
        # in float32 a factor would be rounded
        return (
            torch.tensor(self.signs[0], dtype=torch.float64),
            torch.tensor(self.signs[1], dtype=torch.float64),
        )

    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return |s_0| r_0 + |s_1| r_1."""
        return abs(self.signs[0]) * inputs[0] + abs(self.signs[1]) * inputs[1]

    def longest_sum(self, shapes: list[Shape]) -> int:
        """Return 2, the number of inputs."""
        return 2

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of its signs."""
        return diagonal_entry(*(torch.tensor(sign).expand(shape) for sign in self.signs))


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if value is not None}


def _one(value: Tensor, shape: Shape) -> Tensor:
    """Return a constant without its batch axis."""
    return value[0] if value.dim() > len(shape) else value


@dataclass(frozen=True)
class Call:
    """A call in the exported program, as the builders see it.

    `args` are all arguments, with constants in place; `variable` are the positions of those that
    depend on the input point, and `input_shapes` the shapes of these.
    """

    name: str
    run: Callable[..., Tensor]
    args: tuple[Any, ...]
    variable: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    absolute: Callable[..., Tensor] | None = None
    """The same operation with absolute constants, where that is known."""


def _linear(call: Call) -> Affine | None:
    if call.variable != (0,):
        return None
    weight, bias = call.args[1], call.args[2] if len(call.args) > 2 else None
    return Linear(weight, bias)


def _conv(call: Call) -> Affine | None:
    rank = call.args[1].dim() - 2
    bias, stride, padding, dilation, groups = completed(call.args[2:], (None, [1], [0], [1], 1))
    if call.variable != (0,) or isinstance(padding, str):
        return None
    every = [tuple(v) * (rank if len(v) == 1 else 1) for v in (stride, padding, dilation)]
    return Conv(call.args[1], bias, every[0], every[1], every[2], groups, call.input_shapes[0][1:])


def _batch_norm(call: Call) -> Affine | None:
    if call.name.startswith("aten.batch_norm") and call.args[5]:
        return None  # training statistics
    _, weight, bias, mean, var = call.args[:5]
    eps = call.args[7] if call.name.startswith("aten.batch_norm") else call.args[6]
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (1, -1, *[1] * (len(call.shape) - 1))
    made_of = (0 if bias is None else bias.abs()) + (mean * scale).abs()
    peak = (var + eps).rsqrt().clamp(min=1) * (1 if weight is None else weight.abs().clamp(min=1))
    # otherwise the sum under the root may be lost to rounding, or flushed to 0
    sound = (var >= 0) & (var + eps >= torch.finfo(torch.float32).tiny)
    detour = (torch.where(sound, peak, torch.inf).view(shape), mean.abs().view(shape))
    return Scale(scale.view(shape), shift.view(shape), made_of.view(shape), detour=detour)


def _constant(value: Any, call: Call) -> Tensor:
    return torch.as_tensor(value, dtype=call.dtype, device=call.device)


def _arithmetic(sign: float) -> Callable[[Call], Affine | None]:
    def build(call: Call) -> Affine | None:
        if call.variable == (0, 1):
            return (
                Sum((1.0, sign))
                if call.input_shapes[0] == call.input_shapes[1] == call.shape
                else None
            )
        one = torch.ones((), dtype=call.dtype, device=call.device)
        if call.input_shapes[0] != call.shape:
            return None
        if call.variable == (0,):
            return Scale(one, sign * _constant(call.args[1], call))
        return Scale(sign * one, _constant(call.args[0], call))

    return build


def _reversed_subtraction(call: Call) -> Affine | None:
    if call.variable != (0,) or call.input_shapes[0] != call.shape:
        return None
    return Scale(
        -torch.ones((), dtype=call.dtype, device=call.device), _constant(call.args[1], call)
    )


def _multiply(call: Call) -> Affine | None:
    if len(call.variable) != 1 or call.input_shapes[0] != call.shape:
        return None
    factor = _constant(call.args[1 - call.variable[0]], call)
    return Scale(factor, torch.zeros_like(factor))


def _divide(call: Call) -> Affine | None:
    if call.variable != (0,) or call.input_shapes[0] != call.shape:
        return None
    factor = 1 / _constant(call.args[1], call)
    return Scale(factor, torch.zeros_like(factor))


def _zeros(call: Call) -> Affine | None:
    zero = torch.zeros((), dtype=call.dtype, device=call.device)
    return Scale(zero, zero)


def _negative(call: Call) -> Affine | None:
    minus = -torch.ones((), dtype=call.dtype, device=call.device)
    return Scale(minus, torch.zeros_like(minus))


def _reshape(call: Call) -> Affine | None:
    shape = call.shape
    return Generic(lambda x: x.reshape(len(x), *shape), "reshape", call.input_shapes, diagonal=True)


def _move(call: Call) -> Affine | None:
    return Generic(
        lambda *inputs: call.run(*inputs).reshape(len(inputs[0]), *call.shape),
        call.name,
        call.input_shapes,
    )


def _average(call: Call) -> Affine | None:
    """Return average-pooling as an affine operation.

    A `divisor_override` may have any sign, but the weights are taken to be positive, so one that is
    not is refused.
    """
    divisor = (
        completed(call.args[1:], (None, [], 0, False, True, None))[5]
        if "adaptive" not in call.name
        else None
    )
    require(
        divisor is None or divisor > 0,
        "average-pooling",
        "a divisor above 0",
        divisor_override=divisor or 0,
    )
    return _move(call)


def _pad(call: Call) -> Affine | None:
    mode = call.args[2] if len(call.args) > 2 else "constant"
    return _move(call) if mode in ("constant", "reflect", "replicate", "circular") else None


def _weighted(call: Call) -> Affine | None:
    """Return a sum of products with constants, perhaps plus a constant.

    This covers whatever is affine in the one input that depends on the point.
    """
    absolute = call.absolute
    if absolute is None or len(call.input_shapes) != 1:
        return None

    def sizes(x: Tensor) -> Tensor:
        return (absolute(x) - absolute(torch.zeros_like(x[:1]))).reshape(len(x), *call.shape)

    return Generic(
        lambda x: call.run(x).reshape(len(x), *call.shape),
        call.name,
        call.input_shapes,
        sizes=sizes,
    )


_MOVES = (
    "aten.permute.default aten.transpose.int aten.slice.Tensor aten.select.int aten.cat.default "
    "aten.stack.default aten.adaptive_avg_pool1d.default aten.adaptive_avg_pool2d.default "
    "aten._adaptive_avg_pool2d.default aten.adaptive_avg_pool3d.default aten.mean.dim "
    "aten.sum.dim_IntList aten.flip.default aten.upsample_nearest1d.vec "
    "aten.upsample_nearest2d.vec aten.upsample_nearest3d.vec aten.upsample_linear1d.vec "
    "aten.upsample_bilinear2d.vec aten.upsample_trilinear3d.vec aten.upsample_nearest1d.default "
    "aten.upsample_nearest2d.default aten.upsample_bilinear2d.default aten.pixel_shuffle.default "
    "aten.pixel_unshuffle.default aten.roll.default aten.index_select.default aten.narrow.default "
    "aten.movedim.int aten.repeat.default aten.t.default aten.tile.default aten.index.Tensor "
    "aten.channel_shuffle.default aten.diagonal.default aten.mean.default aten.sum.default "
    "aten.unfold.default aten.im2col.default aten.cumsum.default"
)
_WEIGHTED = (
    "aten.conv_transpose1d.default aten.conv_transpose2d.input aten.conv_transpose3d.input "
    "aten.einsum.default aten.matmul.default aten.mm.default "
    "aten.bmm.default aten.addmm.default aten.baddbmm.default"
)
SHAPES = frozenset(
    "aten.expand.default aten.view.default aten._unsafe_view.default aten.reshape.default "
    "aten.flatten.using_ints aten.unsqueeze.default aten.squeeze.dim "
    "aten.squeeze.dims aten.unflatten.int".split()
)
"""Operations that may contain the batch size in their result's shape."""

AFFINE: dict[str, Callable[[Call], Affine | None]] = {
    "aten.linear.default": _linear,
    "aten.conv1d.default": _conv,
    "aten.conv2d.default": _conv,
    "aten.conv3d.default": _conv,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.add.Tensor": _arithmetic(1.0),
    "aten.sub.Tensor": _arithmetic(-1.0),
    "aten.add.Scalar": _arithmetic(1.0),
    "aten.sub.Scalar": _arithmetic(-1.0),
    "aten.rsub.Scalar": _reversed_subtraction,
    "aten.rsub.Tensor": _reversed_subtraction,
    "aten.mul.Tensor": _multiply,
    "aten.mul.Scalar": _multiply,
    "aten.div.Tensor": _divide,
    "aten.div.Scalar": _divide,
    "aten.neg.default": _negative,
    "aten.zeros_like.default": _zeros,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _move,
    **dict.fromkeys(_WEIGHTED.split(), _weighted),
    **dict.fromkeys(_MOVES.split(), _move),
    **dict.fromkeys(SHAPES, _reshape),
    "aten.expand.default": _move,
    **{f"aten.avg_pool{rank}d.default": _average for rank in (1, 2, 3)},
}
"""Builders by exported name.

A builder returns None where the call is not affine in the point, or not in a form it knows.
"""
