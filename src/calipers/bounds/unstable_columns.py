"""Columns: the few elements that matter of each row of a large tensor.

Their places are held in columns of one width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """The flagged elements of each row.

    `place (N, U)` are their flat places, `real (N, U)` which of these are not padding. Padding
    repeats the first element.
    """

    place: Tensor
    real: Tensor

    @classmethod
    def of(cls, flags: Tensor, width: int | None = None, among: Tensor | None = None) -> Columns:
        """Return the columns of the set flags (N, n).

        `width` is the largest number of flags in a row, where it is known (otherwise the values are
        read to find it). A row without flags takes its padding from the elements of `among (N, n)`;
        from anywhere if that is not given.
        """
        if width is None:
            width = max(1, int(flags.sum(1).max())) if len(flags) else 1
        rank = (
            flags.to(torch.uint8)
            if among is None
            else 2 * flags.to(torch.uint8) + among.to(torch.uint8)
        )
        place = rank.argsort(dim=1, descending=True, stable=True)[:, :width]
        real = torch.arange(width, device=flags.device) < flags.sum(1, keepdim=True)
        return cls(torch.where(real, place, place[:, :1]), real)

    def take(self, rows: Tensor) -> Columns:
        """Return the columns of the chosen rows."""
        return Columns(self.place[rows], self.real[rows])

    def get(self, values: Tensor) -> Tensor:
        """Return the elements of values (N, *shape), (N, U)."""
        return values.flatten(1).gather(1, self.place)

    def filled(self, values: Tensor) -> Tensor:
        """Return values (N, U) whose padding repeats the first element's value.

        So it does not matter which of the equal elements `put` writes last.
        """
        return torch.where(self.real, values, values[:, :1])

    def put(self, into: Tensor, values: Tensor) -> Tensor:
        """Return `into (N, n)` with the columns replaced."""
        return into.scatter(1, self.place, values)
