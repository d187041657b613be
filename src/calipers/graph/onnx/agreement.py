"""Comparison of a network read from a file with another program's outputs.

The outputs at a few points must agree to the rounding of the file's precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.errors import BadModel

_RELATIVE = {torch.float16: 3e-2, torch.bfloat16: 3e-1, torch.float32: 1e-4, torch.float64: 1e-9}
_ROUNDINGS = 20  # factor by which another order of summation may round more than ours
# share of the largest output: where rounding alone moves the outputs that far, a comparison shows
# nothing
_BLIND = 0.05


@dataclass(frozen=True)
class Outputs:
    """The outputs (M, K) at M points, of our network and of another program.

    `run` is computed in the network's precision, `exact` in float64, and `other` by the other
    program.
    """

    run: Tensor
    exact: Tensor
    other: Tensor

    def allowed(self, dtype: torch.dtype) -> Tensor:
        """Return the allowed difference of each output, (K,).

        It is a share of the output's size at these points, plus the rounding estimate.
        """
        return (
            _RELATIVE[dtype] * self.other.where(self.finite, 0.0).abs().amax(0)
            + self.rounding
            + torch.finfo(dtype).tiny
        )

    @property
    def rounding(self) -> Tensor:
        """Return by how much rounding may move the other program's outputs, (K,).

        It is estimated from our network's rounding.
        """
        seen = (self.run.double() - self.exact).where(self.finite, 0.0).abs().amax(0)
        return _ROUNDINGS * torch.maximum(seen, seen.mean())

    @property
    def blind(self) -> bool:
        """Return whether rounding is too large for a comparison to show anything."""
        size = torch.maximum(self.other.abs(), self.exact.abs()).where(self.finite, 0.0).max()
        return bool(self.rounding.max() > _BLIND * size)

    @property
    def finite(self) -> Tensor:
        """Return where all three outputs are finite."""
        return self.run.isfinite() & self.exact.isfinite() & self.other.isfinite()

    def worst(self, dtype: torch.dtype) -> tuple[float, float, int] | None:
        """Return the largest excess difference, its allowance and its output.

        These are the difference and the allowance at the output that exceeds its allowance most,
        and the index of that output. None where the outputs agree.
        """
        # equal overflows (or NaNs) in both agree
        same = (self.run == self.other) | (self.run.isnan() & self.other.isnan())
        off = torch.where(
            self.finite, (self.exact - self.other).abs(), torch.where(same, 0.0, torch.inf)
        ).nan_to_num(nan=torch.inf, posinf=torch.inf)
        allowed = self.allowed(dtype)
        excess = (off.amax(0) - allowed).nan_to_num(nan=-torch.inf)
        place = int(excess.argmax())
        return (
            (float(off.amax(0)[place]), float(allowed[place]), place)
            if bool(excess[place] > 0)
            else None
        )


def compare(outputs: Outputs, dtype: torch.dtype, source: str, program: str) -> None:
    """Raise `BadModel` where the outputs differ from the other program's.

    The message states the size of the difference.
    """
    if outputs.run.shape != outputs.exact.shape:
        raise BadModel(
            f"{source}: a float64 copy of the network returns outputs of shape "
            f"{tuple(outputs.exact.shape)}, not {tuple(outputs.run.shape)}"
        )
    if outputs.run.shape != outputs.other.shape:
        raise BadModel(
            f"{source}: {program} returns outputs of shape {tuple(outputs.other.shape)}, but "
            f"{tuple(outputs.run.shape)} were read from the file"
        )
    if outputs.blind:
        raise BadModel(
            f"{source}: rounding moves the outputs as far as they are large: what was read cannot "
            "be compared, and nothing is claimed about it"
        )
    found = outputs.worst(dtype)
    if found is not None:
        off, allowed, place = found
        raise BadModel(
            f"{source} is read as another network than the one that {program} runs: output {place} "
            f"differs by {off:.3g} on points of this question, where rounding explains "
            f"{allowed:.3g}. Nothing is claimed about it. Please report the file; writing it with "
            "other operations may help."
        )
