"""A-priori rounding allowances that hold for any order of summation.

For a sum of n products, |computed - exact| <= gamma(n) * sum |a_i||b_i| whatever the blocking, the
order or fused multiply-adds (Higham, Accuracy and Stability, ch. 3). It does not hold for Winograd
or FFT convolution and TF32, which is why the confirming pass runs in float64 with those off.

Backward bound propagation uses it so: the computed coefficients of each operation are taken as
exact choices; what one operation's rounding can cost is then gamma * <|A|, M>, where M bounds the
operation's terms over the region (|W||x| + |b|, a forward quantity).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from calipers.errors import BadInput

# operations besides the long sums: constants folded at capture, the additions that join branches,
# the allowance's own evaluation
_OWN_ROUNDING = 64
# leaves the same allowance for a float64 execution of the network itself, so no float64 witness can
# contradict a certificate by rounding
_SAFETY = 2.0


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of bounds, and what is allowed for its rounding.

    `checked` says whether rounding is accounted for; `executed` is the precision of the network
    that the bounds are about, None for the network in real arithmetic.
    """

    dtype: torch.dtype
    checked: bool
    executed: torch.dtype | None = None

    @property
    def guarantee(self) -> Literal["real", "float64-checked", "float32-executed"]:
        """The word for it in a claim."""
        if self.executed is not None:
            return "float32-executed"
        return "float64-checked" if self.checked else "real"

    def gamma(self, terms: int) -> float:
        """Return the relative allowance for sums of that many terms.

        0 where rounding is not accounted for.
        """
        if not self.checked:
            return 0.0
        n = (terms + _OWN_ROUNDING) * torch.finfo(self.dtype).eps / 2
        return _SAFETY * n / (1 - n)

    @property
    def floor(self) -> float:
        """The absolute allowance of a sum for underflow.

        Products below the smallest normal number lose everything, whatever their relative rounding.
        """
        return 2.0**-1000 if self.checked else 0.0


SEARCH = Arithmetic(torch.float32, checked=False)
CHECKED = Arithmetic(torch.float64, checked=True)
EXECUTED = Arithmetic(torch.float64, checked=True, executed=torch.float32)

Guarantee = Literal["float64-checked", "float32-executed"]


def arithmetic_of(guarantee: Guarantee) -> Arithmetic:
    """Return the arithmetic in which such a guarantee is proved.

    Raises `BadInput` for an unknown word.
    """
    words: dict[str, Arithmetic] = {a.guarantee: a for a in (CHECKED, EXECUTED)}
    if guarantee not in words:
        raise BadInput(f"a guarantee is {' or '.join(words)}, got {guarantee!r}")
    return words[guarantee]


_lock, _holders, _held = threading.Lock(), 0, contextlib.ExitStack()


@contextlib.contextmanager
def plain_sums() -> Iterator[None]:
    """Run convolutions and products as plain sums of products.

    As the allowances assume. Of several nested or concurrent holders the last restores the
    settings.
    """
    global _holders
    with _lock:
        if _holders == 0:
            before = torch.backends.cuda.matmul.fp32_precision
            _held.callback(setattr, torch.backends.cuda.matmul, "fp32_precision", before)
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            _held.enter_context(torch.backends.cudnn.flags(enabled=False))
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _held.close()
