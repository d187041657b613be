"""Which few elements of a large tensor matter, row by row? Their places in columns of one width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """The flagged elements of each row: their flat places (N, U), and which of these are not mere
    filling. Filling repeats the first element.
    """

    place: Tensor
    real: Tensor

    @classmethod
    def of(cls, flags: Tensor, width: int | None = None, among: Tensor | None = None) -> Columns:
        """Return the columns of the set flags (N, n); `width`: the most flags of a row, where it is
        known (else one look at the values finds it).

        `among (N, n)`: where a row without flags takes its filling from; anywhere if not given.
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
        """Return values (N, U) with those of the repeated element in the filling, so that it does
        not matter which of them `put` writes last.
        """
        return torch.where(self.real, values, values[:, :1])

    def put(self, into: Tensor, values: Tensor) -> Tensor:
        """Return `into (N, n)` with the columns replaced."""
        return into.scatter(1, self.place, values)
