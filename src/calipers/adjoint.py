"""How does a gradient pass a convolution of few channels fastest? As a *forward* convolution whose
outputs are whole blocks of pixels.

On a CPU the library's own gradient of such a layer is slow: its result has one to four channels
where the vector units hold sixteen. Both jaws ask for it: an attack at every step, a backward sweep
for every row of bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# outputs that a convolution computes at once, measured: blocks beyond it cost more in arithmetic
# than they save
_LANES = 16
# up to these many channels the blocked gradient is faster (1.4 to 4.8 times), strided or not
_FEW_CHANNELS, _FEW_STRIDED = 4, 8


def few_channels(channels: int, stride: tuple[int, ...]) -> bool:
    """Is the blocked gradient faster than the library's, for so many input channels?"""
    return channels <= (_FEW_STRIDED if min(stride) > 1 else _FEW_CHANNELS)


class BlockedAdjoint:
    """The adjoint of a convolution with `weight (out, in, kh, kw)`: one group, no dilation.

    The gradient at pixel q sums W[t]' g[o] over taps t and outputs o with q = s o + t - p. Pixels
    of one residue modulo r = s m meet the same taps, so with q = r u + phi the outputs are o = m u
    + (phi + p - t) / s: one convolution of g with stride m and C r^2 outputs, one group for each
    phi, whose results are then shuffled into place.
    """

    def __init__(self, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        self.stride = stride
        self.span = _span(weight.shape[1], stride)
        (rows, self.top), (columns, self.left) = (
            _taps(weight.shape[2 + k], stride[k], padding[k], self.span) for k in range(2)
        )
        # (out, in, kh, kw), (rh, kh, Kh), (rw, kw, Kw) -> (in, rh, rw, out, Kh, Kw)
        kernel = torch.einsum(
            "oiyx,ayY,bxX->iaboYX",
            weight.double(),
            rows.to(weight.device),
            columns.to(weight.device),
        )
        self.kernel = kernel.flatten(0, 2).to(weight.dtype).contiguous()

    def __call__(self, g: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return W' g for g (M, out, h, w): (M, in, *size). Cost: up to four times the arithmetic
        of the convolution, at many times the speed.
        """
        m, (rh, rw) = self.span, (s * self.span for s in self.stride)
        bottom = (-(-size[0] // rh) - 1) * m + self.top + self.kernel.shape[2] - g.shape[2]
        right = (-(-size[1] // rw) - 1) * m + self.left + self.kernel.shape[3] - g.shape[3]
        # Negative room cuts outputs off that no pixel inside depends on.
        x = functional.conv2d(
            functional.pad(g, (-self.left, right, -self.top, bottom)), self.kernel, stride=m
        )
        n, _, h, w = x.shape
        x = x.view(n, -1, rh, rw, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, h * rh, w * rw)
        return x[:, :, : size[0], : size[1]]


def _span(channels: int, stride: tuple[int, ...]) -> int:
    """Return how many strides a block of pixels spans each way: doubled as long as all its outputs
    fit the lanes.
    """
    m = 1
    while channels * stride[0] * stride[1] * (2 * m) ** 2 <= _LANES:
        m *= 2
    return m


def _taps(size: int, stride: int, padding: int, m: int) -> tuple[Tensor, int]:
    """Return (r, size, K), 1 where pixel phi of a block meets tap t through offset k of the window
    of outputs, and the first offset.
    """
    r = stride * m
    meets = [
        (phi, t, (phi + padding - t) // stride)
        for phi in range(r)
        for t in range(size)
        if (phi + padding - t) % stride == 0
    ]
    first, last = min(k for *_, k in meets), max(k for *_, k in meets)
    taps = torch.zeros(r, size, last - first + 1, dtype=torch.float64)
    for phi, t, k in meets:
        taps[phi, t, k - first] = 1
    return taps, first


def contract(a: Tensor, values: Tensor) -> Tensor:
    """Return <a, values> over the last axis, (P, S), for a (P, S, n) and values (P, n): from the
    left, several times as fast as columns from the right.
    """
    return (values[:, None] @ a.mT)[:, 0]
