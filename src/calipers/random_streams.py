"""Random numbers of a job that do not depend on other jobs.

Numbers are a hash of (job key, counter), the counter-based idea of Salmon et al. 2011 with the
SplitMix64 mixer (Steele, Lea, Flood 2014): no state, no order, no global generator. So a job's
draws do not depend on the batch size, on the other jobs in the batch, on the device, or on which
shard runs it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685


def key_of(*parts: object) -> int:
    """Return a 63-bit key that names a job: seed, point, target, restart, ..."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Streams:
    """One random stream for each job: `keys (M,)` int64."""

    keys: Tensor

    @classmethod
    def of(cls, seed: int, names: Sequence[str], device: torch.device) -> Streams:
        """Return the streams of the named jobs under a seed."""
        return cls(
            torch.tensor([key_of(seed, name) for name in names], dtype=torch.int64, device=device)
        )

    def fork(self, number: int | Tensor) -> Streams:
        """Return independent streams, one for each number.

        The number stands for a restart, a target or a purpose.
        """
        # as a tensor, since integers have to wrap around, which Python's do not
        number = torch.as_tensor(number, dtype=torch.int64, device=self.keys.device)
        return Streams(_mix(self.keys + (number + 1) * _GOLDEN))

    def take(self, index: Tensor) -> Streams:
        """Return the streams of the chosen jobs."""
        return Streams(self.keys[index])

    def uniform(self, d: int, dtype: torch.dtype) -> Tensor:
        """Return (M, d) numbers uniform in [0, 1)."""
        counter = torch.arange(1, d + 1, dtype=torch.int64, device=self.keys.device)
        bits = _mix(self.keys[:, None] + counter * _GOLDEN)
        return (_shift(bits, 40).to(torch.float32) * 2.0**-24).to(dtype)

    def normal(self, d: int, dtype: torch.dtype) -> Tensor:
        """Return (M, d) standard normal numbers (Box and Muller 1958)."""
        u = self.uniform(2 * ((d + 1) // 2), torch.float64)
        radius = (-2 * (1 - u[:, ::2]).log()).sqrt()
        angle = 2 * math.pi * u[:, 1::2]
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :d].to(dtype)


def _shift(x: Tensor, n: int) -> Tensor:
    """Shift right logically; torch's own shift keeps the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Return the SplitMix64 hash of signed 64-bit numbers."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)
