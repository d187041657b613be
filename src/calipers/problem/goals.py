"""What counts as adversarial? Margins of the logits, one place for the sign conventions.

A margin is positive while the model still resists. A point is adversarial iff its worst margin is
not positive: ties and NaN are not robust.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.reading import tensor
from calipers.problem.specification import Specification


class Goal(Protocol):
    """What the adversary wants, as linear margins of the logits and a rule to combine them."""

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """Return the margin matrix (N, S, K): margins = rows @ logits."""

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """Return the constants of the margins, (N, S)."""

    def cases(self, classes: int) -> Tensor:
        """Return the case each margin belongs to, (S,), numbered from 0: `worst` is the smallest,
        over the cases, of each case's largest margin.
        """

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return rows @ logits + offsets, (N, S), without building the matrix."""

    def worst(self, margins: Tensor) -> Tensor:
        """Combine margins (or lower bounds of them) (N, S) into the one that decides, (N,)."""

    def smooth(self, margins: Tensor) -> Tensor:
        """Return the smooth stand-in of `worst`, (N,), within log(S) of it: the logarithm of the
        odds that softmax gives to the model's side.
        """

    def rivals(self, y: Tensor, classes: int) -> Tensor:
        """Return the class each margin is about, (N, S)."""

    def take(self, index: Tensor) -> Goal:
        """Return the goal for the chosen points."""

    def check(self, y: Tensor, classes: int) -> None:
        """Raise `BadInput` where the goal makes no sense for these labels."""

    def identity(self) -> dict[str, object]:
        """Return what tells the goal from others of its kind, JSON-ready; what differs from point
        to point is part of the points' names.
        """


@dataclass(frozen=True)
class Untargeted:
    """Any other class will do: one margin z_y - z_j for each rival j, and the smallest decides."""

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """(N, K - 1, K): +1 at the true class, -1 at the rival."""
        eye = torch.eye(classes, device=y.device)
        return eye[y][:, None, :] - eye[self.rivals(y, classes)]

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """Margins are differences of logits, and nothing else."""
        return torch.zeros(len(y), classes - 1, device=y.device)

    def cases(self, classes: int) -> Tensor:
        """Each rival is a case of its own."""
        return torch.arange(classes - 1)

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """z_y - z_j."""
        return logits.gather(1, y[:, None]) - logits.gather(1, self.rivals(y, logits.shape[1]))

    def worst(self, margins: Tensor) -> Tensor:
        """The minimum; a NaN anywhere stays a NaN."""
        return margins.amin(1)

    def smooth(self, margins: Tensor) -> Tensor:
        """-log(sum_j exp(-m_j)), the log odds of the true class: the cross-entropy is
        softplus(-smooth).
        """
        return -(-margins).logsumexp(1)

    def rivals(self, y: Tensor, classes: int) -> Tensor:
        """All classes but the true one, in order."""
        others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
        return others + (others >= y[:, None])

    def take(self, index: Tensor) -> Untargeted:
        """The same goal."""
        return self

    def check(self, y: Tensor, classes: int) -> None:
        """Nothing can be wrong."""

    def identity(self) -> dict[str, object]:
        """There is one only."""
        return {}


@dataclass(frozen=True, eq=False)
class Targeted:
    """One class must win: margins z_j - z_t for each j, and the largest decides (one class ahead of
    the target is enough to resist).

    `target` is a class, or one for each point (N,).
    """

    target: int | Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.target, int | Tensor):
            object.__setattr__(
                self,
                "target",
                tensor(
                    self.target,
                    "targets",
                    "Give one class, or one for each point, as places 0, 1, 2, ...",
                ),
            )
        if isinstance(self.target, Tensor) and (
            self.target.dim() > 1 or self.target.is_floating_point()
        ):
            raise BadInput(
                "targets are one class, or one for each point (N,), as integers; got "
                f"{tuple(self.target.shape)} of {self.target.dtype}"
            )

    def _targets(self, y: Tensor) -> Tensor:
        return torch.as_tensor(self.target, device=y.device).expand(len(y))

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """(N, K - 1, K): +1 at the other class, -1 at the target."""
        eye = torch.eye(classes, device=y.device)
        return eye[self.rivals(y, classes)] - eye[self._targets(y)][:, None, :]

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """Margins are differences of logits, and nothing else."""
        return torch.zeros(len(y), classes - 1, device=y.device)

    def cases(self, classes: int) -> Tensor:
        """All margins are one case: the target wins only over all others."""
        return torch.zeros(classes - 1, dtype=torch.long)

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """z_j - z_t."""
        return logits.gather(1, self.rivals(y, logits.shape[1])) - logits.gather(
            1, self._targets(y)[:, None]
        )

    def worst(self, margins: Tensor) -> Tensor:
        """The maximum; a NaN anywhere stays a NaN."""
        return margins.amax(1)

    def smooth(self, margins: Tensor) -> Tensor:
        """log(sum_j exp(m_j)), minus the log odds of the target: the cross-entropy to the target is
        softplus(smooth).
        """
        return margins.logsumexp(1)

    def rivals(self, y: Tensor, classes: int) -> Tensor:
        """All classes but the target, in order."""
        return Untargeted().rivals(self._targets(y), classes)

    def take(self, index: Tensor) -> Targeted:
        """Return the targets of the chosen points."""
        if not isinstance(self.target, Tensor) or self.target.dim() == 0:
            return self
        return dataclasses.replace(self, target=self.target[index.to(self.target.device)])

    def check(self, y: Tensor, classes: int) -> None:
        """A target must be a class, and differ from the label."""
        t = torch.as_tensor(self.target)
        if t.dim() and len(t) != len(y):
            raise BadInput(
                f"{len(t)} targets for {len(y)} points: give one class, or one for each point"
            )
        t = self._targets(y)
        if bool(((t < 0) | (t >= classes)).any()):
            raise BadInput(
                f"targets must lie in 0..{classes - 1}, got {int(t.min())}..{int(t.max())}"
            )
        same = torch.nonzero(t == y).flatten()
        if len(same):
            raise BadInput(
                f"the target equals the label at {len(same)} points (first: point {int(same[0])}): "
                "choose another class there"
            )

    def identity(self) -> dict[str, object]:
        """The target, where it is one."""
        one = torch.as_tensor(self.target)
        return {"target": "each point's own" if one.dim() else str(one.item())}


def is_adversarial(worst: Tensor) -> Tensor:
    """Return (N,) bool: the worst margin is not positive. Ties and NaN are adversarial."""
    return ~(worst > 0)


def by_case(margins: Tensor, cases: Tensor) -> Tensor:
    """Return the largest margin of each case (N, C), from margins (N, S) and the case of each
    (S,).
    """
    start = torch.full(
        (len(margins), int(cases.max()) + 1), -torch.inf, dtype=margins.dtype, device=margins.device
    )
    return start.scatter_reduce(
        1, cases.to(margins.device).expand(len(margins), -1), margins, "amax"
    )


class _Endless:
    """A goal that is never reached: its worst margin stays positive, and falls wherever the goal's
    own does.
    """

    def worst(self, margins: Tensor) -> Tensor:
        own: Tensor = super().worst(margins)  # type: ignore[misc]
        # Of slope 1 or less, so that nothing overflows; a NaN stays one.
        return torch.where(own <= 0, 1 / (1 - own.clamp(max=0)), 1 + own)


class _EndlessUntargeted(_Endless, Untargeted):
    pass


class _EndlessTargeted(_Endless, Targeted):
    pass


class _EndlessSpecification(_Endless, Specification):
    pass


def endless(goal: Goal) -> Goal:
    """Return the goal without its end, for searches that are to go on beyond the boundary; of a
    kind not known here, the goal itself: they end there.
    """
    if type(goal) is Untargeted:
        return _EndlessUntargeted()
    if type(goal) is Specification:
        return _EndlessSpecification(goal.matrix, goal.shifts, goal.belongs)
    return _EndlessTargeted(goal.target) if type(goal) is Targeted else goal
