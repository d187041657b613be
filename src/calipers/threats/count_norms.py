"""The number of changed features or pixels as a distance.

Its ball is cut by a box.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.threats.water_filling import Support, largest, rise_in_order, spend_in_order


@dataclass(frozen=True)
class L0:
    """The number of changed features, or with `channels` of changed pixels.

    All channels of a pixel together count once (Croce and Hein 2019). It is not a norm (scaling
    changes nothing), and its ball is not convex, but it has all the methods of a norm inside a
    bounded box. Feature c * n + i of an input of n pixels is channel c of pixel i.
    """

    name: str = "l0"
    channels: int = 1
    is_box: bool = False
    is_euclidean: bool = False
    is_count: bool = True
    is_sparse: bool = False  # few features move, but here the radius says how many

    def over(self, shape: Sequence[int]) -> L0:
        """Return the count for inputs of one shape.

        Where pixels are counted, the first axis of the shape is the channels.
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
        """Return for each feature the sum over its pixel's channels, (..., d)."""
        return values if self.channels == 1 else self._spread(self.pixels(values).sum(-2))

    def peak(self, values: Tensor) -> Tensor:
        """Return for each feature the maximum over its pixel's channels, (..., d)."""
        return values if self.channels == 1 else self._spread(self.pixels(values).amax(-2))

    def _spread(self, values: Tensor) -> Tensor:
        """Return values of pixels (..., n) for each of their channels, (..., d)."""
        return (
            values.unsqueeze(-2)
            .expand(*values.shape[:-1], self.channels, values.shape[-1])
            .flatten(-2)
        )

    def alone(self, radius: Tensor) -> Tensor:
        """Return infinity once one change is allowed, and 0 below.

        The radius says how many features move, not how far.
        """
        return torch.where(radius >= 1, torch.inf, 0.0).to(radius.dtype)

    def longest_unit(self, features: int) -> float:
        """Raise `BadInput`: a changed feature may move by any amount."""
        raise BadInput(
            f"norm {self.name!r} is available as a distance only here: a count of changes says "
            "nothing of energy; take 'linf', 'l2' or 'l1'."
        )

    def of(self, delta: Tensor) -> Tensor:
        """Return the number of changes that are not 0."""
        changed = delta != 0
        return (
            (changed if self.channels == 1 else self.pixels(changed).any(-2))
            .sum(-1)
            .to(delta.dtype)
        )

    def dual(self, g: Tensor) -> Tensor:
        """Return the most that one feature gains by moving by 1.

        With channels, the most that one pixel gains all of whose channels move by 1. A count has no
        dual, but the box bounds what a feature gains.
        """
        return (g.abs() if self.channels == 1 else self.pixels(g.abs()).sum(-2)).amax(-1)

    def support(self, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Support:
        """Return the exact maximum: the largest gains, at their ends of the box.

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
        """Return the maximiser of `support` for a radius of that length."""
        return self.support(g, length, low, high).delta

    def project(
        self, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Return the changes, clipped to the box, whose loss would cost most.

        Weights do not change a count.
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
        """Return delta with the features or pixels of largest gain moved first.

        The last pixel moves by one fraction of its way in all channels.
        """
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
        """Return as many changes as allowed, at places chosen uniformly.

        A ball without a box has no uniform distribution, so features move by normal numbers.
        """
        pixels = normal.shape[1] // self.channels
        if self.channels == 1:
            return largest(uniform[:, :pixels], normal, radius)
        return normal * self._spread(
            largest(uniform[:, :pixels], torch.ones_like(uniform[:, :pixels]), radius)
        )
