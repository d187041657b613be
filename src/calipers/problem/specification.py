"""Which other questions than a wrong class are there? Any boolean combination of linear
inequalities of the outputs.

A specification lists the unsafe outputs as cases: unsafe iff in some case every inequality rows @
logits + offset <= 0 holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calipers.errors import BadInput


@dataclass(frozen=True, eq=False)
class Specification:
    """Margins rows @ logits + offsets, `rows (S, K)`, `shifts (S,)`, of `belongs (S,)`: the case of
    each, numbered from 0 without gaps.

    Within a case one positive margin is enough to be safe; every case has to be safe. The same for
    all points, whatever their labels, unless there are `shifts (N, S)` for each. A constant row
    (all zeros) is allowed: its margin is its shift.

    >>> both_negative = Specification(torch.eye(2), torch.zeros(2), torch.tensor([0, 0]))
    >>> logits, labels = torch.tensor([[1.0, -2.0], [-1.0, -2.0]]), torch.tensor([0, 0])
    >>> both_negative.worst(both_negative.margins(logits, labels)).tolist()
    [1.0, -1.0]
    """

    matrix: Tensor
    shifts: Tensor
    belongs: Tensor
    _converted: dict[Any, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        s = self.matrix.shape[0] if self.matrix.dim() == 2 else 0
        if not s or self.shifts.shape[-1:] != (s,) or self.belongs.shape != (s,):
            raise BadInput(
                "a specification is a matrix (S, K) with S >= 1 shifts (or (N, S)) and cases, got "
                f"{tuple(self.matrix.shape)}, {tuple(self.shifts.shape)} and "
                f"{tuple(self.belongs.shape)}"
            )
        if not bool(self.matrix.isfinite().all() and self.shifts.isfinite().all()):
            raise BadInput("the coefficients of a specification must be finite")
        if sorted(set(self.belongs.tolist())) != list(range(int(self.belongs.max()) + 1)):
            raise BadInput(
                f"cases are numbered from 0 without gaps, got {sorted(set(self.belongs.tolist()))}"
            )

    def _at(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return matrix and shifts in the dtype and on the device of a tensor."""
        key = (like.dtype, like.device)
        if key not in self._converted:
            self._converted[key] = (self.matrix.to(like), self.shifts.to(like))
        return self._converted[key]

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """(N, S, K), the same for every point."""
        return self.matrix.to(y.device).expand(len(y), -1, -1)

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """(N, S), the same for every point unless each has its own."""
        return self.shifts.to(y.device).expand(len(y), -1)

    def cases(self, classes: int) -> Tensor:
        """The case of each margin."""
        return self.belongs

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """rows @ logits + offsets."""
        matrix, shifts = self._at(logits)
        return logits @ matrix.T + shifts

    def worst(self, margins: Tensor) -> Tensor:
        """The smallest over the cases of the largest within each; a NaN anywhere stays a NaN."""
        each = [margins[:, self._members(case, margins)].amax(1) for case in range(self._count)]
        return torch.stack(each, 1).amin(1)

    def smooth(self, margins: Tensor) -> Tensor:
        """Sums of exponentials in the place of both extremes."""
        each = [
            margins[:, self._members(case, margins)].logsumexp(1) for case in range(self._count)
        ]
        return -(-torch.stack(each, 1)).logsumexp(1)

    @property
    def _count(self) -> int:
        return int(self.belongs.max()) + 1

    def _members(self, case: int, like: Tensor) -> Tensor:
        return torch.nonzero(self.belongs == case).flatten().to(like.device)

    def rivals(self, y: Tensor, classes: int) -> Tensor:
        """The output that each margin falls with most."""
        return self.matrix.argmin(1).to(y.device).expand(len(y), -1)

    def take(self, index: Tensor) -> Specification:
        """The same goal, with the shifts of the chosen points where each has its own."""
        if self.shifts.dim() == 1:
            return self
        return Specification(self.matrix, self.shifts[index.to(self.shifts.device)], self.belongs)

    def check(self, y: Tensor, classes: int) -> None:
        """There must be a coefficient for every output, and shifts for every point or for all."""
        if self.shifts.dim() > 1 and len(self.shifts) != len(y):
            raise BadInput(
                f"the specification has shifts of {len(self.shifts)} points, not {len(y)}"
            )
        if self.matrix.shape[1] != classes:
            raise BadInput(
                f"the specification is about {self.matrix.shape[1]} outputs, but the model has "
                f"{classes}"
            )

    def identity(self) -> dict[str, object]:
        """A digest of all numbers."""
        h = hashlib.sha256()
        for t in (self.matrix.double(), self.shifts.double(), self.belongs.long()):
            h.update(t.cpu().contiguous().numpy().tobytes())
        return {"specification": h.hexdigest()[:16]}
