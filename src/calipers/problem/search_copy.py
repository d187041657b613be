"""How can an attack's gradient come sooner? Copies of a network that compute the same, rearranged for the pass back to the input.

On a CPU the gradient of a convolution with few input channels is slow: its result has one to four channels where the vector units hold sixteen, and on
small networks it takes half of a step. `BlockedConvolution` computes it as a *forward* convolution whose outputs are whole blocks of pixels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LANES = 16  # outputs that a convolution computes at once, measured: blocks beyond it cost more in arithmetic than they save
_FEW_CHANNELS, _FEW_STRIDED = 4, 8  # up to these many channels the blocked gradient is faster (1.4 to 4.8 times), strided or not


def search_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a network of the same function and the given dtype that an attack asks for gradients; the network itself where nothing is to be gained.

    The copy is made of the present weights, and its parameters are frozen. Forward passes are the same, bit for bit, in the same dtype; gradients agree up to
    rounding.
    """
    parameters = list(network.parameters())
    here = bool(parameters) and parameters[0].device.type == "cpu"
    slow = [name for name, part in network.named_modules() if here and _gains(part)]
    if not slow and all(p.dtype == dtype for p in parameters):
        return network
    try:
        copied = copy.deepcopy(network).to(dtype).requires_grad_(False)
    except Exception:
        if any(p.dtype != dtype for p in parameters):
            raise
        return network  # a module that cannot be copied (it holds a lock, a file, a graph) is asked as it is
    for name in slow:
        path, _, last = name.rpartition(".")
        convolution = copied.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        if not name:
            return BlockedConvolution(convolution)
        setattr(copied.get_submodule(path), last, BlockedConvolution(convolution))
    return copied


def _gains(part: nn.Module) -> bool:
    """Is this a plain convolution of few channels? Not one with hooks or a computed weight: those run code of their own."""
    if type(part) is not nn.Conv2d or part._forward_pre_hooks or part._forward_hooks or part._backward_hooks or part._backward_pre_hooks:
        return False
    plain = part.groups == 1 and part.dilation == (1, 1) and part.padding_mode == "zeros" and not isinstance(part.padding, str)
    return plain and part.in_channels <= (_FEW_STRIDED if min(part.stride) > 1 else _FEW_CHANNELS)


class BlockedConvolution(nn.Module):
    """A convolution whose input gradient is a convolution too.

    The gradient at pixel q sums W[t]' g[o] over taps t and outputs o with q = s o + t - p. Pixels of one residue modulo r = s m meet the same taps, so with
    q = r u + phi the outputs are o = m u + (phi + p - t) / s: one convolution of g with stride m and C r^2 outputs, one group for each phi, whose results
    are then shuffled into place.
    """

    kernel: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        channels, (high, wide) = convolution.in_channels, convolution.stride
        self.blocks = _blocks(channels, high, wide)
        weight = convolution.weight.detach()
        rows, self.top = _taps(weight.shape[2], high, int(convolution.padding[0]), self.blocks[0])
        columns, self.left = _taps(weight.shape[3], wide, int(convolution.padding[1]), self.blocks[1])
        # (out, in, kh, kw), (rh, kh, Kh), (rw, kw, Kw) -> (in, rh, rw, out, Kh, Kw)
        kernel = torch.einsum("oiyx,ayY,bxX->iaboYX", weight.double(), rows.to(weight.device), columns.to(weight.device))
        self.register_buffer("kernel", kernel.flatten(0, 2).to(weight.dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        result: Tensor = _Blocked.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def input_gradient(self, g: Tensor, height: int, width: int) -> Tensor:
        """Return the gradient (N, C, height, width) of <g, output>."""
        (mh, mw), (sh, sw) = self.blocks, self.convolution.stride
        rh, rw = sh * mh, sw * mw
        bottom = (-(-height // rh) - 1) * mh + self.top + self.kernel.shape[2] - g.shape[2]
        right = (-(-width // rw) - 1) * mw + self.left + self.kernel.shape[3] - g.shape[3]
        # Negative room cuts outputs off that no pixel inside depends on.
        x = functional.conv2d(functional.pad(g, (-self.left, right, -self.top, bottom)), self.kernel, stride=(mh, mw))
        n, _, h, w = x.shape
        x = x.view(n, -1, rh, rw, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, h * rh, w * rw)
        return x[:, :, :height, :width]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocked: BlockedConvolution) -> Tensor:
        ctx.blocked, ctx.size = blocked, x.shape[2:]
        return blocked.convolution(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.blocked.input_gradient(gradients[0], *ctx.size), None


def _blocks(channels: int, high: int, wide: int) -> tuple[int, int]:
    """Return how many strides a block of pixels spans each way: doubled as long as all its outputs fit the lanes."""
    m = 1
    while channels * high * wide * (2 * m) ** 2 <= _LANES:
        m *= 2
    return m, m


def _taps(size: int, stride: int, padding: int, m: int) -> tuple[Tensor, int]:
    """Return (r, size, K), 1 where pixel phi of a block meets tap t through offset k of the window of outputs, and the first offset."""
    r = stride * m
    meets = [(phi, t, (phi + padding - t) // stride) for phi in range(r) for t in range(size) if (phi + padding - t) % stride == 0]
    first, last = min(k for *_, k in meets), max(k for *_, k in meets)
    taps = torch.zeros(r, size, last - first + 1, dtype=torch.float64)
    for phi, t, k in meets:
        taps[phi, t, k - first] = 1
    return taps, first
