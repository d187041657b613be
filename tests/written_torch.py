"""How do people write an operation in torch? A table of ways, each with parameters drawn at and beyond their usual range."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from nets import Apply
from torch import Tensor, nn
from torch.nn import functional as F
from written import NotWritten

Shape = tuple[int, ...]
ODD = (0, 1, -1, 2, 0.5, -0.3, 0.3, 3, 1e-3, -1e-3, 30.0, -7, 1e3, 0.0, 1.0)


class Draw:
    """Random parameters, shapes and weights."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.said: list[Any] = []

    def one(self, *choices: Any) -> Any:
        """One of some choices, remembered."""
        self.said.append(self.random.choice(choices))
        return self.said[-1]

    def odd(self) -> Any:
        """A number that somebody may write."""
        return self.one(*ODD)

    def some(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A constant tensor."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale

    def image(self, rank: int = 2) -> Shape:
        """Channels and places."""
        return (
            self.random.choice([1, 2, 4]),
            *(self.random.choice([3, 4, 5] if rank < 3 else [2, 3]) for _ in range(rank)),
        )

    def any(self) -> Shape:
        """Any shape of a point."""
        return self.random.choice([(3,), (4,), (2, 3), (2, 3, 3), (1, 5), (1, 1, 4)])

    def axis(self, shape: Shape) -> int:
        """An axis of a batch that is not the batch, counted from either end."""
        place = self.random.randrange(1, len(shape) + 1)
        return int(self.one(place, place - len(shape) - 1))


Way = Callable[[Draw], tuple[Shape, Callable[[Tensor], Tensor] | nn.Module]]


def plain(*functions: Callable[[Tensor], Tensor]) -> Way:
    """One of some functions without parameters, on any shape."""
    return lambda d: (d.any(), d.random.choice(functions))


def each(build: Callable[[Draw], Callable[[Tensor], Tensor]]) -> Way:
    """A function of each element, with parameters."""
    return lambda d: (d.any(), build(d))


def made(build: Callable[[Draw, Shape], Any], shape: Callable[[Draw], Shape]) -> Way:
    """A function or layer that depends on the shape."""

    def way(d: Draw) -> tuple[Shape, Any]:
        size = shape(d)
        return size, build(d, size)

    return way


def bound(
    function: Callable[..., Tensor], *args: Any, **options: Any
) -> Callable[[Tensor], Tensor]:
    """The function with its arguments."""
    return lambda t: function(t, *args, **options)


def clamps(d: Draw) -> Callable[[Tensor], Tensor]:
    """Clamps with ends in any order, of any type, or left out."""
    low, high = d.one(None, *ODD, -1e30), d.one(None, *ODD, 1e30)
    if low is None and high is None:
        low = 0.25
    return bound(d.random.choice([torch.clamp, torch.clip]), low, high)


def clamps_by_tensors(d: Draw, shape: Shape) -> Callable[[Tensor], Tensor]:
    """Clamps with an end for each element, in any order, or left out."""
    low, high = (d.some(*d.random.choice([shape, shape[-1:], ()])) for _ in range(2))
    which = d.one("both", "both", "low", "high")
    return bound(
        torch.clamp,
        None if which == "high" else low,
        None if which == "low" else high,
    )


def choices(d: Draw) -> Callable[[Tensor], Tensor]:
    """By a comparison with a number, between functions that meet there or do not."""
    c, k = float(d.one(0, 0, 0.3, -1, 2)), float(d.odd())
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: torch.where(t > c, t, c + k * (t - c)),
        lambda t: torch.where(t < c, k * t + (1 - k) * c, t),
        lambda t: torch.where(c >= t, torch.exp(t - c) - 1, t - c),
        lambda t: torch.where(t > 0, t, torch.zeros(())),
        lambda t: torch.where(t >= 0, torch.tanh(t), k * torch.sin(t)),
        lambda t: torch.where(t <= 0, 0.0, t.square() * k),
        lambda t: torch.where(t > c, t, k),
        lambda t: torch.where(t.abs() < 1, 0.5 * t.square(), t.abs() - 0.5),
        lambda t: torch.where(t > c, 1.0, 0.0) * t,
    ]
    return d.random.choice(ways)


def powers(d: Draw) -> Callable[[Tensor], Tensor]:
    """x to a constant, of all x or of positive ones."""
    p = d.one(0, 1, 2, 3, 4, 5, 0.5, 1.5, -1, -2, -3, -0.5, 0.3, 2.5, 1.0, 8)
    safe = d.one(True, True, False)
    return lambda t: (t.square() + 0.2 if safe else t) ** p


def near_a_pole(d: Draw) -> Callable[[Tensor], Tensor]:
    """Functions that are not defined everywhere, near or far from where they are not."""
    f = d.random.choice(
        [
            torch.log,
            torch.sqrt,
            torch.rsqrt,
            torch.reciprocal,
            torch.log1p,
            lambda t: 1 / t,
            lambda t: 2.5 / (t + 1),
        ]
    )
    shift = d.one(0.0, 1e-6, 0.5, 2, -1)
    inner = d.random.choice([torch.square, torch.relu, torch.abs, torch.exp, lambda t: t])
    return lambda t: f(inner(t) + shift)


def arithmetic(d: Draw) -> Callable[[Tensor], Tensor]:
    """With a constant, in every order."""
    c = d.odd()
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: t + c, lambda t: c - t, lambda t: t - c, lambda t: t * c, lambda t: c * t, lambda t: t / (c or 2), lambda t: -t, lambda t: torch.rsub(t, c),
        lambda t: torch.add(t, t.relu(), alpha=c), lambda t: torch.sub(t, torch.tanh(t), alpha=c), lambda t: torch.add(t, 1.5, alpha=c),
        lambda t: t * (t > 5).to(t.dtype).mean() if c is None else t * torch.tensor(c, dtype=t.dtype), lambda t: torch.rsub(t, 1, alpha=2),
    ]  # fmt: skip
    return d.random.choice(ways)


def pairs(d: Draw) -> Callable[[Tensor], Tensor]:
    """Of a number and another, or a constant."""
    c = d.odd()
    other = d.random.choice(
        [
            lambda t: t.flip(1),
            lambda t: t.relu(),
            lambda t: t.tanh() * c,
            lambda t: t * 0 + c,
            lambda t: torch.tensor(c, dtype=t.dtype),
        ]
    )
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.mul, torch.maximum, torch.minimum, torch.sub, torch.add, lambda a, b: a / (1.5 + b.square()), lambda a, b: a / b, torch.max, torch.min,
        lambda a, b: torch.addcmul(a, a, b), lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a * a.sigmoid(), lambda a, b: a * b * a, torch.hypot,
        lambda a, b: torch.where(torch.arange(a.shape[-1]) > 0, a, b.expand(a.shape)), lambda a, b: a.masked_fill(torch.arange(a.shape[-1]) == 0, float(c)),
    ]  # fmt: skip
    f = d.random.choice(ways)
    return lambda t: f(t, other(t))


def convolution(d: Draw, shape: Shape) -> nn.Module:
    """Any convolution."""
    rank, channels = len(shape) - 1, shape[0]
    groups = d.one(1, channels)
    kernel = d.one(1, 2, min(3, *shape[1:]))
    mode = d.one("zeros", "zeros", "reflect", "replicate", "circular")
    padding = d.one("same", "valid", 0, 1, kernel - 1)
    stride = 1 if padding == "same" else d.one(1, 2)
    dilation = d.one(1, 1, 2) if kernel == 2 and min(shape[1:]) > 2 else 1
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return layer(
        channels,
        groups * 2,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=d.one(True, False),
        padding_mode=mode,
    )


def transposed(d: Draw, shape: Shape) -> nn.Module:
    """Any transposed convolution."""
    rank, channels = len(shape) - 1, shape[0]
    stride, groups = d.one(1, 2, 3), d.one(1, channels)
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    extra = d.one(0, stride - 1)
    return layer(
        channels,
        groups,
        d.one(1, 2, 3),
        stride,
        d.one(0, 0, 1) if extra == 0 else 0,
        extra,
        groups,
        d.one(True, False),
        d.one(1, 1, 2),
    )


def pools(d: Draw, shape: Shape) -> nn.Module:
    """Any pooling."""
    rank, kernel = len(shape) - 1, d.one(1, 2, 2, 3) if min(shape[1:]) > 2 else 2
    stride, padding, ceil = d.one(None, 1, 2), d.one(0, kernel // 2), d.one(True, False)
    kind = d.one("max", "average", "adaptive average", "adaptive max", "lp")
    if kind == "max":
        return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1](
            kernel, stride, padding, d.one(1, 1, 2), ceil_mode=ceil
        )
    if kind == "average" and rank == 1:
        return nn.AvgPool1d(kernel, stride, padding, ceil, d.one(True, False))
    if kind == "average":
        divisor = d.one(None, None, 1, 3, -2)
        return (nn.AvgPool2d, nn.AvgPool3d)[rank - 2](
            kernel, stride, padding, ceil, d.one(True, False), divisor
        )
    if kind == "lp":
        return (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)[rank - 1](d.one(1, 2), kernel, stride)
    sizes = tuple(d.random.choice([1, 2, n]) for n in shape[1:])
    table = (
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    )
    return table[kind == "adaptive max"][rank - 1](sizes if rank > 1 else sizes[0])


def norms(d: Draw, shape: Shape) -> nn.Module:
    """Any normalisation, with statistics and eps at the edge."""
    channels, eps, affine = shape[0], d.one(1e-5, 0.0, 0.1, 1e-12, 10), d.one(True, False)
    kind = d.one(
        "batch",
        "batch",
        "layer",
        "group",
        "instance",
        "instance tracked",
        "rms",
        "local response",
        "normalize",
    )
    if kind == "layer":
        return nn.LayerNorm(shape[-d.random.choice([1, len(shape)]) :], eps, affine)
    if kind == "group":
        return nn.GroupNorm(d.one(1, channels), channels, eps, affine)
    if kind == "rms":
        return nn.RMSNorm(shape[-1], eps)
    if kind == "local response":
        return nn.LocalResponseNorm(2)
    if kind == "normalize":
        return Apply(bound(F.normalize, dim=1, p=d.one(1.0, 2.0)))
    rank = len(shape) - 1
    if kind.startswith("instance"):
        layer: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1](
            channels, eps, 0.1, affine, kind != "instance"
        )
    else:
        layer = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](
            channels, eps, 0.1, affine
        )
    if layer.running_var is not None:
        layer.running_mean.copy_(d.some(channels).float())
        layer.running_var.copy_(
            d.some(channels).square().float() * d.one(1.0, 1e-9, 1e6) + (1e-6 if eps == 0 else 0)
        )
    return layer


def paddings(d: Draw, shape: Shape) -> Callable[[Tensor], Tensor]:
    """Padding by any mode, negative sizes too."""
    if d.one(True, False):
        return bound(F.pad, (d.one(0, 1, 2, -1), d.one(0, 1)), "constant", d.odd())
    mode, rank = d.one("reflect", "replicate", "circular"), len(shape) - 1
    return bound(F.pad, (1, d.one(0, 1)) * rank, mode)


def moves(d: Draw, shape: Shape) -> Callable[[Tensor], Tensor]:
    """What moves, copies, picks and joins elements."""
    axis, n = d.axis(shape), len(shape)
    size = shape[axis - 1 if axis > 0 else axis]
    at = d.random.randrange(size)
    order = [0, *d.random.sample(range(1, n + 1), n)]
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.permute(order), lambda t: t.transpose(1, axis), lambda t: t.flatten(1), lambda t: t.reshape(len(t), -1), lambda t: t.view(t.shape[0], -1),
        lambda t: t.flip(axis), lambda t: t.roll(d.random.choice([1]), axis), lambda t: t.select(axis, at), lambda t: t.narrow(axis, at, size - at),
        lambda t: torch.cat([t, -t], axis), lambda t: torch.stack([t, t * 2], axis), lambda t: t.index_select(axis, torch.tensor([at, 0, at])),
        lambda t: t.unsqueeze(axis), lambda t: t.unsqueeze(1).expand(-1, 2, *shape), lambda t: t.repeat(1, 2, *[1] * (n - 1)), lambda t: t[:, at % shape[0]],
        lambda t: t[..., ::2], lambda t: t[:, [at % shape[0], 0]], lambda t: t[:, None, ..., -1:], lambda t: torch.cat(t.chunk(2, axis)[::-1], axis),
        lambda t: torch.cat([p * (k + 1) for k, p in enumerate(t.split(1, axis))], axis), lambda t: sum(t.unbind(axis)), lambda t: t.movedim(1, -1),
        lambda t: t[..., torch.arange(shape[-1]) != 1], lambda t: t.unfold(-1, 2, 1) if shape[-1] > 1 else t, lambda t: t.squeeze(), lambda t: t.tile(2),
        lambda t: t.diagonal(0, -2, -1) if n > 1 else t, lambda t: torch.tril(t) if n > 1 else t, lambda t: t.swapaxes(1, axis), lambda t: torch.atleast_2d(t),
    ]  # fmt: skip
    return d.random.choice(ways)


def reductions(d: Draw, shape: Shape) -> Callable[[Tensor], Tensor]:
    """Sums, means, variances, extremes, norms along axes."""
    axis, keep = d.axis(shape), d.one(True, False)
    ways: list[Callable[[Tensor], Tensor]] = [
        bound(torch.mean, axis, keep), bound(torch.sum, axis, keep), bound(torch.logsumexp, axis, keep), bound(torch.amax, axis, keep),
        lambda t: t.var(axis, keepdim=keep, correction=d.random.choice([0])), lambda t: t.std(axis, keepdim=keep, correction=0), bound(torch.amin, axis, keep),
        lambda t: t.flatten(1).mean(1, keepdim=True), lambda t: t.flatten(1).sum(1), lambda t: t.norm(dim=axis), bound(torch.cumsum, axis),
        bound(torch.prod, axis), lambda t: t.max(axis).values, lambda t: t.mean(tuple(range(1, t.dim()))), lambda t: t.sum(tuple(range(1, t.dim()))),
        lambda t: t.abs().sum(axis), lambda t: t.square().mean(axis).sqrt(),
    ]  # fmt: skip
    return d.random.choice(ways)


def products(d: Draw, shape: Shape) -> Callable[[Tensor], Tensor]:
    """Products of matrices, of what depends on the point and of constants; attention."""
    n, m = shape
    w, square, scale = d.some(m, 3), d.some(n, n), d.one(None, 1.0, 0.1, -2.0)
    mask = torch.zeros(n, n, dtype=torch.float64) if d.one(True, False) else d.some(n, n)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: t @ w, lambda t: square @ t, lambda t: t @ t.transpose(1, 2), lambda t: torch.einsum("bij,jk->bik", t, w), lambda t: t.mT @ t,
        lambda t: torch.einsum("bij,bkj->bik", t, t), lambda t: torch.einsum("bij,jk,kl->bil", t, w, w.T), lambda t: torch.bmm(t, t.mT),
        lambda t: F.linear(t, w.T),
        lambda t: F.scaled_dot_product_attention(t, 2 * t, t, scale=scale), lambda t: F.scaled_dot_product_attention(t, t, t, attn_mask=mask),
        lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True), lambda t: (t @ t.mT).softmax(-1) @ t,
        lambda t: torch.baddbmm(t @ w, t, w.expand(len(t), -1, -1)),
        lambda t: torch.matmul(t, t[:, 0, :, None]), lambda t: torch.outer(t[:, 0, 0], torch.ones(3, dtype=t.dtype)),
    ]  # fmt: skip
    return d.random.choice(ways)


def softmaxes(d: Draw, shape: Shape) -> Callable[[Tensor], Tensor]:
    """Along any axis, of small and large numbers."""
    f, axis, c = (
        d.random.choice([F.softmax, F.log_softmax, F.softmin, F.glu, torch.logsumexp]),
        d.axis(shape),
        d.one(1, 1, 30.0, -3),
    )
    return lambda t: f(c * t, dim=axis)


def resized(d: Draw, shape: Shape) -> Callable[[Tensor], Tensor] | nn.Module:
    """Images made larger, smaller, or shuffled."""
    mode, rank = d.one("nearest", "linear", "linear", "nearest-exact", "bicubic"), len(shape) - 1
    if d.one(True, False, False) and rank == 2:
        return (
            nn.PixelUnshuffle(1)
            if shape[0] != 4
            else nn.PixelShuffle(2)
            if d.one(True, False)
            else nn.ChannelShuffle(2)
        )
    if mode == "linear":
        mode = ("linear", "bilinear", "trilinear")[rank - 1]
    align = d.one(True, False) if "linear" in mode or mode == "bicubic" else None
    factor = d.one(2, 1.5, 0.7, 3)
    return bound(
        F.interpolate,
        scale_factor=factor,
        mode=mode,
        align_corners=align,
        recompute_scale_factor=d.one(True, None),
    )


class First(nn.Module):
    """The first result of a recurrent layer, or attention to itself."""

    def __init__(self, layer: nn.Module, *, itself: bool = False) -> None:
        super().__init__()
        self.layer, self.itself = layer, itself

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x, x, x) if self.itself else self.layer(x)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result


def sequences(d: Draw, shape: Shape) -> nn.Module:
    """Recurrent layers, attention and transformers over (time, features)."""
    features = shape[1]
    kind = d.one("lstm", "gru", "rnn", "attention", "transformer")
    if kind == "attention":
        return First(
            nn.MultiheadAttention(features, d.one(1, 2), bias=d.one(True, False), batch_first=True),
            itself=True,
        )
    if kind == "transformer":
        return nn.TransformerEncoderLayer(
            features,
            2,
            3,
            0.0,
            d.one("relu", "gelu"),
            batch_first=True,
            norm_first=d.one(True, False),
        )
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
    return First(
        layer(
            features,
            2,
            d.one(1, 1, 2),
            bias=d.one(True, False),
            batch_first=True,
            bidirectional=d.one(True, False),
        )
    )


def with_slopes(d: Draw, shape: Shape) -> nn.Module:
    """PReLU with weights of any sign."""
    layer = nn.PReLU(d.one(1, shape[0]))
    layer.weight.data = torch.as_tensor([float(d.odd()) for _ in range(len(layer.weight))])
    return layer


IMAGES = [lambda d: d.image(1), lambda d: d.image(2), lambda d: d.image(3)]


def _image(d: Draw) -> Shape:
    return d.random.choice(IMAGES)(d)


WAYS: dict[str, Way] = {
    "activation": plain(
        F.relu,
        F.relu6,
        F.silu,
        F.mish,
        F.selu,
        F.gelu,
        torch.tanh,
        torch.sigmoid,
        torch.erf,
        torch.atan,
        F.logsigmoid,
        F.hardswish,
        F.hardsigmoid,
        F.softsign,
        torch.exp,
        torch.expm1,
        torch.sin,
        torch.cos,
        torch.abs,
        torch.square,
        torch.neg,
        F.tanhshrink,
        torch.sinh,
        torch.cosh,
        torch.tan,
        torch.log2,
        torch.exp2,
        torch.sign,
        torch.floor,
        torch.round,
        torch.positive,
        F.relu_,
        bound(F.gelu, approximate="tanh"),
        bound(F.dropout, training=False),
        torch.special.expit,
    ),
    "clamp": each(clamps),
    "clamp once more": each(clamps),
    "clamp by tensors": made(clamps_by_tensors, lambda d: d.any()),
    "choice": each(choices),
    "hardtanh": each(lambda d: bound(F.hardtanh, *sorted([float(d.odd()), float(d.odd()) + 1e-3]))),
    "leaky relu": each(lambda d: bound(F.leaky_relu, d.odd())),
    "prelu": made(with_slopes, lambda d: d.any()),
    "softplus": each(
        lambda d: bound(
            F.softplus, d.one(1, 0.5, 3, 30, 1e-3, -1), d.one(20, 0, -2.0, 5.0, 100, -0.5)
        )
    ),
    "elu": each(lambda d: bound(d.random.choice([F.elu, F.celu]), d.odd() or 0.7)),
    "shrink": each(lambda d: bound(d.random.choice([F.softshrink, F.hardshrink]), abs(d.odd()))),
    "threshold": each(lambda d: bound(F.threshold, d.odd(), d.odd())),
    "power": each(powers),
    "pole": each(near_a_pole),
    "arithmetic": each(arithmetic),
    "pair": each(pairs),
    "linear": made(
        lambda d, shape: nn.Linear(shape[-1], d.one(1, 3), bias=d.one(True, False)),
        lambda d: d.any(),
    ),
    "convolution": made(convolution, _image),
    "convolution once more": made(convolution, _image),
    "transposed convolution": made(transposed, _image),
    "pool": made(pools, _image),
    "pool once more": made(pools, _image),
    "norm": made(norms, _image),
    "norm once more": made(norms, lambda d: d.image(2)),
    "padding": made(paddings, _image),
    "moves": made(moves, lambda d: d.any()),
    "moves once more": made(moves, _image),
    "reduction": made(reductions, lambda d: d.any()),
    "matrix product": made(products, lambda d: (d.one(2, 3), d.one(2, 4))),
    "softmax": made(softmaxes, lambda d: d.any()),
    "resized": made(resized, _image),
    "sequence": made(sequences, lambda d: (d.one(1, 2), d.one(2, 4))),
}
"""By name: a drawn shape of a point, and what is done to a batch of such points."""

SPREAD = (1.0, 1.0, 4.0, 0.1, 30.0)


def module(name: str, seed: int) -> tuple[nn.Sequential, Shape, str]:
    """Return a model in float64 around one operation, the shape of its points, and what was drawn: a scaling, the operation, and a dense layer to classes."""
    d = Draw(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape, op = WAYS[name](d)
        scale, shift = d.one(*SPREAD), float(d.some(1))
        body = [Apply(lambda t: t * scale + shift), op if isinstance(op, nn.Module) else Apply(op)]
        if d.random.random() < 0.3:
            body.append(
                Apply(
                    d.random.choice(
                        [
                            torch.relu,
                            torch.tanh,
                            lambda t: F.leaky_relu(t, 0.2),
                            lambda t: t.square() * 0.1,
                            torch.sigmoid,
                        ]
                    )
                )
            )
        front = (
            nn.Sequential(*body, Apply(lambda t: t.flatten(1) if t.dim() > 1 else t[:, None]))
            .double()
            .eval()
        )
        with torch.no_grad():
            width = front(torch.full((2, *shape), 0.4, dtype=torch.float64)).shape[-1]
        whole = nn.Sequential(*front, nn.Linear(width, d.random.choice([2, 3]))).double().eval()
    return whole, shape, f"{name}: {d.said}"


def written(name: str, seed: int) -> tuple[nn.Module, Shape, str, Callable[[Tensor], Tensor]]:
    """Return the model, its shape, what was drawn, and itself as the one that is asked."""
    try:
        model, shape, said = module(name, seed)
    except Exception as error:  # whatever torch says to parameters that it does not take
        raise NotWritten(str(error)) from error
    return model, shape, said, model
