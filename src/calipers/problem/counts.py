"""How many features, or pixels, are changed? The count as a distance, its ball cut by a box, and
what in it helps the adversary most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.budgets import Support, largest, rise_in_order, spend_in_order


@dataclass(frozen=True)
class L0:
    """The number of changed features, or with several `channels` of changed pixels: all channels of
    a pixel together count once (Croce and Hein 2019).

    Not a norm (scaling changes nothing), and its ball not convex, but it has all the verbs inside a
    bounded box. Feature c * n + i of an input of n pixels is channel c of pixel i.
    """

    name: str = "l0"
    channels: int = 1
    is_box: bool = False
    is_euclidean: bool = False
    is_count: bool = True
    is_sparse: bool = False  # few features move, but the radius itself says how many

    def over(self, shape: Sequence[int]) -> L0:
        """Return the count for inputs of that shape, whose first axis is the channels where pixels
        are counted.
        """
        if self.name == L0.name:
            return self
        if len(shape) < 2:
            raise BadInput(
                f"norm {self.name!r} counts pixels of inputs (channels, height, width) or "
                f"(channels, length), got {tuple(shape)}: take {L0.name!r}"
            )
        return dataclasses.replace(self, channels=int(shape[0]))

    def pixels(self, values: Tensor) -> Tensor:
        """Return features (..., d) as (..., channels, pixels)."""
        return values.reshape(*values.shape[:-1], self.channels, values.shape[-1] // self.channels)

    def total(self, values: Tensor) -> Tensor:
        """Return for each feature the sum over the channels of its pixel, (..., d)."""
        return values if self.channels == 1 else self._spread(self.pixels(values).sum(-2))

    def peak(self, values: Tensor) -> Tensor:
        """Return for each feature the largest of the channels of its pixel, (..., d)."""
        return values if self.channels == 1 else self._spread(self.pixels(values).amax(-2))

    def _spread(self, values: Tensor) -> Tensor:
        """Return what is said of pixels (..., n) for each of their channels, (..., d)."""
        return (
            values.unsqueeze(-2)
            .expand(*values.shape[:-1], self.channels, values.shape[-1])
            .flatten(-2)
        )

    def alone(self, radius: Tensor) -> Tensor:
        """Anywhere, once one change is allowed: the radius says how many move, not how far."""
        return torch.where(radius >= 1, torch.inf, 0.0).to(radius.dtype)

    def longest_unit(self, features: int) -> float:
        """There is none: a changed feature may move by any amount."""
        raise BadInput(
            f"norm {self.name!r} is available as a distance only here: a count of changes says "
            "nothing of energy; take 'linf', 'l2' or 'l1'."
        )

    def of(self, delta: Tensor) -> Tensor:
        """The count of changes that are not 0."""
        changed = delta != 0
        return (
            (changed if self.channels == 1 else self.pixels(changed).any(-2))
            .sum(-1)
            .to(delta.dtype)
        )

    def dual(self, g: Tensor) -> Tensor:
        """What one feature gains that moves by 1, or one pixel all of whose channels do. A count
        has no dual, but the box bounds what a feature gains.
        """
        return (g.abs() if self.channels == 1 else self.pixels(g.abs()).sum(-2)).amax(-1)

    def support(self, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Support:
        """Those that gain most go to their ends of the box; their sum is the exact maximum.

        It is the largest sum of the gains as rounded, so that a choice between nearly equal ones
        costs nothing: channels + pixels <= d + 1 roundings in all.
        """
        ends = torch.where(g > 0, high, low).masked_fill(g == 0, 0.0)
        gain = g * ends
        if self.channels == 1:
            delta = largest(gain, ends, radius)
            return Support((g * delta).sum(-1), delta)
        gain = self.pixels(gain).sum(-2)
        kept = largest(gain, (gain > 0).to(g.dtype), radius)
        return Support((gain * kept).sum(-1), ends * self._spread(kept))

    def step(self, g: Tensor, length: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The same: those that gain most, at their ends of the box."""
        return self.support(g, length, low, high).delta

    def project(
        self, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Keep the changes, clipped to the box, whose loss would cost most; weights do not change a
        count.
        """
        clipped = delta.clamp(low, high)
        worth = delta.square() - (delta - clipped).square()
        if self.channels == 1:
            return largest(worth, clipped, radius)
        kept = largest(
            self.pixels(worth).sum(-2), self.pixels(clipped != 0).any(-2).to(delta.dtype), radius
        )
        return clipped * self._spread(kept)

    def reach(self, g: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Those that gain most first; the last pixel goes a share of its way in all channels."""
        size = g.abs()
        full = torch.where(size > 0, size * torch.where(g > 0, high, -low), torch.zeros_like(size))
        if self.channels == 1:
            return rise_in_order(g, full, gain, low, high)
        whole = self.pixels(full).sum(-2)
        share = spend_in_order(whole, whole, torch.ones_like(whole), gain.clamp_min(0))
        return (torch.where(g > 0, high, low).masked_fill(g == 0, 0.0) * self._spread(share)).clamp(
            low, high
        )

    def sample(self, uniform: Tensor, normal: Tensor, radius: Tensor) -> Tensor:
        """As many as allowed, chosen uniformly; a ball without a box has no uniform points, so they
        move by normal numbers.
        """
        pixels = normal.shape[1] // self.channels
        if self.channels == 1:
            return largest(uniform[:, :pixels], normal, radius)
        return normal * self._spread(
            largest(uniform[:, :pixels], torch.ones_like(uniform[:, :pixels]), radius)
        )
