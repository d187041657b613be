"""Fast gradient of a convolution with few input channels.

The gradient with respect to the input is computed as a *forward* convolution whose outputs are
whole blocks of pixels. On a CPU the library's own gradient of such a layer is slow: its result has
one to four channels where the vector units hold sixteen. Both attacks and certificates need it: an
attack at every step, backward bound propagation for every row of bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# number of outputs that a convolution computes at once (measured): larger blocks cost more in
# arithmetic than they save
_LANES = 16
# up to these many channels the blocked gradient is faster (1.4 to 4.8 times), strided or not
_FEW_CHANNELS, _FEW_STRIDED = 4, 8


def few_channels(channels: int, stride: tuple[int, ...]) -> bool:
    """Return whether the blocked gradient is faster for so many channels.

    It is compared with the library's own gradient; the thresholds were measured.
    """
    return channels <= (_FEW_STRIDED if min(stride) > 1 else _FEW_CHANNELS)


class BlockedAdjoint:
    """The adjoint of a convolution with `weight (out, in, kh, kw)`.

    One group and no dilation are supported.

    The gradient at pixel q is the sum of W[t]' g[o] over the taps t and outputs o with q = s o + t
    - p, where s is the stride and p the padding. Pixels of one residue modulo r = s m meet the same
    taps, so with q = r u + phi the outputs are o = m u + (phi + p - t) / s: one convolution of g
    with stride m and C r^2 outputs, one group for each phi, whose results are then shuffled into
    place.
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
        """Return W' g for g (M, out, h, w): a tensor (M, in, *size).

        Cost: up to four times the arithmetic of the convolution, at many times the speed of the
        library's own gradient.
        """
        m, (rh, rw) = self.span, (s * self.span for s in self.stride)
        bottom = (-(-size[0] // rh) - 1) * m + self.top + self.kernel.shape[2] - g.shape[2]
        right = (-(-size[1] // rw) - 1) * m + self.left + self.kernel.shape[3] - g.shape[3]
        # Negative padding cuts off outputs on which no pixel inside the image depends.
        x = functional.conv2d(
            functional.pad(g, (-self.left, right, -self.top, bottom)), self.kernel, stride=m
        )
        n, _, h, w = x.shape
        x = x.view(n, -1, rh, rw, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, h * rh, w * rw)
        return x[:, :, : size[0], : size[1]]


def _span(channels: int, stride: tuple[int, ...]) -> int:
    """Return how many strides a block of pixels spans in each direction.

    It is doubled as long as all outputs of a block fit the lanes of a vector unit (`_LANES`).
    """
    m = 1
    while channels * stride[0] * stride[1] * (2 * m) ** 2 <= _LANES:
        m *= 2
    return m


def _taps(size: int, stride: int, padding: int, m: int) -> tuple[Tensor, int]:
    """Return the incidence of pixels, taps and outputs, and the first offset.

    The tensor (r, size, K) is 1 where pixel phi of a block meets tap t through offset k of the
    window of outputs.
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
    """Return the inner products (P, S) of a (P, S, n) and values (P, n).

    The sum is over the last axis. Multiplying from the left is several times as fast as multiplying
    by columns from the right.
    """
    return (values[:, None] @ a.mT)[:, 0]
