"""Goals beyond misclassification, as linear inequalities of outputs.

A specification lists the unsafe outputs as cases: an output is unsafe iff in some case every
inequality rows @ logits + offset <= 0 holds, so any boolean combination of linear inequalities can
be written (in disjunctive normal form, as in VNN-LIB).
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
    """Unsafe outputs as a disjunction of conjunctions of inequalities.

    The margins are matrix @ logits + shifts. Within a case one positive margin is enough to be
    safe; every case has to be safe. The matrix and the cases are the same for all points, whatever
    their labels.

    Args:
        matrix: coefficients (S, K), finite. A row of zeros is allowed: its margin is its shift.
        offset: constants (S,), or (N, S) for each point its own; finite.
        case_of: the case of each margin, (S,) integers, numbered from 0 without gaps.

    Raises:
        BadInput: if the shapes do not fit, a number is not finite, or a case is left out.

    Example:
        Unsafe iff both outputs are at most 0:

        >>> both_negative = Specification(torch.eye(2), torch.zeros(2), torch.tensor([0, 0]))
        >>> logits, labels = torch.tensor([[1.0, -2.0], [-1.0, -2.0]]), torch.tensor([0, 0])
        >>> both_negative.worst(both_negative.margins(logits, labels)).tolist()
        [1.0, -1.0]
    """

    matrix: Tensor
    offset: Tensor
    case_of: Tensor
    _converted: dict[Any, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        s = self.matrix.shape[0] if self.matrix.dim() == 2 else 0
        if not s or self.offset.shape[-1:] != (s,) or self.case_of.shape != (s,):
            raise BadInput(
                "a specification is a matrix (S, K) with S >= 1 shifts (or (N, S)) and cases, got "
                f"{tuple(self.matrix.shape)}, {tuple(self.offset.shape)} and "
                f"{tuple(self.case_of.shape)}"
            )
        if not bool(self.matrix.isfinite().all() and self.offset.isfinite().all()):
            raise BadInput("the coefficients of a specification must be finite")
        if sorted(set(self.case_of.tolist())) != list(range(int(self.case_of.max()) + 1)):
            raise BadInput(
                f"cases are numbered from 0 without gaps, got {sorted(set(self.case_of.tolist()))}"
            )

    def _at(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return matrix and shifts in the dtype and on the device of a tensor."""
        key = (like.dtype, like.device)
        if key not in self._converted:
            self._converted[key] = (self.matrix.to(like), self.offset.to(like))
        return self._converted[key]

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """Return the margin matrix (N, S, K), the same for every point."""
        return self.matrix.to(y.device).expand(len(y), -1, -1)

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """Return the shifts (N, S), the same for all unless each has its own."""
        return self.offset.to(y.device).expand(len(y), -1)

    def cases(self, classes: int) -> Tensor:
        """Return the case of each margin, (S,)."""
        return self.case_of

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return matrix @ logits + shifts, (N, S)."""
        matrix, shifts = self._at(logits)
        return logits @ matrix.T + shifts

    def worst(self, margins: Tensor) -> Tensor:
        """Return the smallest over the cases of the largest margin within each.

        A NaN anywhere stays a NaN.
        """
        each = [margins[:, self._members(case, margins)].amax(1) for case in range(self._count)]
        return torch.stack(each, 1).amin(1)

    def smooth(self, margins: Tensor) -> Tensor:
        """Return `worst` with log-sum-exp in place of both extremes."""
        each = [
            margins[:, self._members(case, margins)].logsumexp(1) for case in range(self._count)
        ]
        return -(-torch.stack(each, 1)).logsumexp(1)

    @property
    def _count(self) -> int:
        """The number of cases."""
        return int(self.case_of.max()) + 1

    def _members(self, case: int, like: Tensor) -> Tensor:
        """Return the places of the margins of a case."""
        return torch.nonzero(self.case_of == case).flatten().to(like.device)

    def margin_classes(self, y: Tensor, classes: int) -> Tensor:
        """Return the output of the smallest coefficient of each margin, (N, S).

        Of all outputs it is the one with which the margin falls most.
        """
        return self.matrix.argmin(1).to(y.device).expand(len(y), -1)

    def take(self, index: Tensor) -> Specification:
        """Return the same goal with the shifts of the chosen points."""
        if self.offset.dim() == 1:
            return self
        return Specification(self.matrix, self.offset[index.to(self.offset.device)], self.case_of)

    def check(self, y: Tensor, classes: int) -> None:
        """Raise `BadInput` where coefficients or shifts do not fit the model.

        There must be a coefficient for every output, and shifts for every point or for all.
        """
        if self.offset.dim() > 1 and len(self.offset) != len(y):
            raise BadInput(
                f"the specification has shifts of {len(self.offset)} points, not {len(y)}"
            )
        if self.matrix.shape[1] != classes:
            raise BadInput(
                f"the specification is about {self.matrix.shape[1]} outputs, but the model has "
                f"{classes}"
            )

    def identity(self) -> dict[str, object]:
        """Return a digest of all numbers, which identifies the specification."""
        h = hashlib.sha256()
        for t in (self.matrix.double(), self.offset.double(), self.case_of.long()):
            h.update(t.cpu().contiguous().numpy().tobytes())
        return {"specification": h.hexdigest()[:16]}
