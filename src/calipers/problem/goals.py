"""Goals of the adversary, as linear margins of the logits.

This is the one place for the sign conventions: a margin is positive while the model still resists.
A point is adversarial iff its worst margin is not positive: ties and NaN are not robust.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calipers.arguments import tensor
from calipers.errors import BadInput
from calipers.problem.specification import Specification


class Goal(Protocol):
    """What the adversary wants: linear margins of the logits, and a rule.

    The rule (`worst`) combines the margins into the one that decides.
    """

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """Return the margin matrix (N, S, K): margins = rows @ logits + offsets."""

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """Return the constants of the margins, (N, S)."""

    def cases(self, classes: int) -> Tensor:
        """Return the case that each margin belongs to, (S,), from 0.

        `worst` is the smallest, over the cases, of each case's largest margin.
        """

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return rows @ logits + offsets, (N, S), without building the matrix."""

    def worst(self, margins: Tensor) -> Tensor:
        """Combine margins (N, S), or bounds, into the one that decides, (N,)."""

    def smooth(self, margins: Tensor) -> Tensor:
        """Return a smooth approximation of `worst`, (N,), within log(S) of it.

        It is the logarithm of the odds that softmax gives to the model's side.
        """

    def margin_classes(self, y: Tensor, classes: int) -> Tensor:
        """Return the class that each margin is about, (N, S)."""

    def take(self, index: Tensor) -> Goal:
        """Return the goal for the chosen points."""

    def check(self, y: Tensor, classes: int) -> None:
        """Raise `BadInput` where the goal makes no sense for these labels."""

    def identity(self) -> dict[str, object]:
        """Return what distinguishes the goal from others, JSON-ready.

        What differs from point to point is part of the points' names instead.
        """


@dataclass(frozen=True)
class Untargeted:
    """Misclassification as any other class: margins z_y - z_j, j != y.

    The smallest margin decides. It takes no settings.

    Raises:
        Nothing: every label has other classes.

    Example:
        >>> goal, logits = Untargeted(), torch.tensor([[3.0, 1.0, 2.0]])
        >>> goal.worst(goal.margins(logits, torch.tensor([0]))).tolist()
        [1.0]
    """

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """Return (N, K - 1, K): +1 at the true class, -1 at the other class."""
        eye = torch.eye(classes, device=y.device)
        return eye[y][:, None, :] - eye[self.margin_classes(y, classes)]

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """Return zeros (N, K - 1): margins are differences of logits only."""
        return torch.zeros(len(y), classes - 1, device=y.device)

    def cases(self, classes: int) -> Tensor:
        """Return a case of its own for each other class, (K - 1,)."""
        return torch.arange(classes - 1)

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the margins z_y - z_j, (N, K - 1)."""
        return logits.gather(1, y[:, None]) - logits.gather(
            1, self.margin_classes(y, logits.shape[1])
        )

    def worst(self, margins: Tensor) -> Tensor:
        """Return the minimum; a NaN anywhere stays a NaN."""
        return margins.amin(1)

    def smooth(self, margins: Tensor) -> Tensor:
        """Return -log(sum_j exp(-m_j)), the log odds of the true class.

        The cross-entropy is softplus(-smooth).
        """
        return -(-margins).logsumexp(1)

    def margin_classes(self, y: Tensor, classes: int) -> Tensor:
        """Return all classes but the true one, in order, (N, K - 1)."""
        others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
        return others + (others >= y[:, None])

    def take(self, index: Tensor) -> Untargeted:
        """Return the same goal."""
        return self

    def check(self, y: Tensor, classes: int) -> None:
        """Accept all labels."""

    def identity(self) -> dict[str, object]:
        """Return nothing: there is only one untargeted goal."""
        return {}


@dataclass(frozen=True, eq=False)
class Targeted:
    """Misclassification as one class t: margins z_j - z_t, j != t.

    The largest margin decides: one class ahead of the target is enough to resist.

    Args:
        target: the class that must win, or one for each point (N,), as integers from 0.

    Raises:
        BadInput: if the targets are no integers, or have more than one axis. `check` also refuses
            classes that the model does not have, and targets equal to the label.

    Example:
        >>> goal, logits = Targeted(2), torch.tensor([[3.0, 1.0, 2.0]])
        >>> goal.worst(goal.margins(logits, torch.tensor([0]))).tolist()
        [1.0]
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
        """Return the target of each point, (N,)."""
        return torch.as_tensor(self.target, device=y.device).expand(len(y))

    def rows(self, y: Tensor, classes: int) -> Tensor:
        """Return (N, K - 1, K): +1 at the other class, -1 at the target."""
        eye = torch.eye(classes, device=y.device)
        return eye[self.margin_classes(y, classes)] - eye[self._targets(y)][:, None, :]

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        """Return zeros (N, K - 1): margins are differences of logits only."""
        return torch.zeros(len(y), classes - 1, device=y.device)

    def cases(self, classes: int) -> Tensor:
        """Return one case for all margins: the target must beat all others."""
        return torch.zeros(classes - 1, dtype=torch.long)

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the margins z_j - z_t, (N, K - 1)."""
        return logits.gather(1, self.margin_classes(y, logits.shape[1])) - logits.gather(
            1, self._targets(y)[:, None]
        )

    def worst(self, margins: Tensor) -> Tensor:
        """Return the maximum; a NaN anywhere stays a NaN."""
        return margins.amax(1)

    def smooth(self, margins: Tensor) -> Tensor:
        """Return log(sum_j exp(m_j)), minus the log odds of the target.

        The cross-entropy to the target is softplus(smooth).
        """
        return margins.logsumexp(1)

    def margin_classes(self, y: Tensor, classes: int) -> Tensor:
        """Return all classes but the target, in order, (N, K - 1)."""
        return Untargeted().margin_classes(self._targets(y), classes)

    def take(self, index: Tensor) -> Targeted:
        """Return the targets of the chosen points."""
        if not isinstance(self.target, Tensor) or self.target.dim() == 0:
            return self
        return dataclasses.replace(self, target=self.target[index.to(self.target.device)])

    def check(self, y: Tensor, classes: int) -> None:
        """Raise `BadInput` unless targets are classes other than the labels."""
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
        """Return the target, where it is the same for all points."""
        one = torch.as_tensor(self.target)
        return {"target": "each point's own" if one.dim() else str(one.item())}


def is_adversarial(worst: Tensor) -> Tensor:
    """Return (N,) bool: the worst margin is not positive.

    Ties and NaN are adversarial.
    """
    return ~(worst > 0)


def by_case(margins: Tensor, cases: Tensor) -> Tensor:
    """Return the largest margin of each case (N, C).

    `margins (N, S)`, and the case of each in `cases (S,)`.
    """
    start = torch.full(
        (len(margins), int(cases.max()) + 1), -torch.inf, dtype=margins.dtype, device=margins.device
    )
    return start.scatter_reduce(
        1, cases.to(margins.device).expand(len(margins), -1), margins, "amax"
    )


class _Endless:
    """A goal that is never reached, for searches beyond the boundary.

    Its worst margin stays positive, and falls wherever that of the goal does.
    """

    def worst(self, margins: Tensor) -> Tensor:
        own: Tensor = super().worst(margins)  # type: ignore[misc]
        # of slope 1 at most, so that nothing overflows; a NaN stays a NaN
        return torch.where(own <= 0, 1 / (1 - own.clamp(max=0)), 1 + own)


class _EndlessUntargeted(_Endless, Untargeted):
    pass


class _EndlessTargeted(_Endless, Targeted):
    pass


class _EndlessSpecification(_Endless, Specification):
    pass


def endless(goal: Goal) -> Goal:
    """Return a goal that is never reached, for searches past the boundary.

    A goal of a kind that is not known here is returned unchanged: searches for it end at the
    boundary.
    """
    if type(goal) is Untargeted:
        return _EndlessUntargeted()
    if type(goal) is Specification:
        return _EndlessSpecification(goal.matrix, goal.offset, goal.case_of)
    return _EndlessTargeted(goal.target) if type(goal) is Targeted else goal
