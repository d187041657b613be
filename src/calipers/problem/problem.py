"""Verification problems: model, points, labels, threat and goal.

They are checked when they are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import calipers.arguments as arguments
from calipers.calls import with_gradients
from calipers.errors import BadInput
from calipers.models.classifier import Classifier
from calipers.models.layout import laid_out
from calipers.problem.agreement import confirm
from calipers.problem.executor import Executor, LocalThreads
from calipers.problem.goals import Goal, Targeted, Untargeted, is_adversarial
from calipers.problem.specification import Specification
from calipers.random_streams import Streams
from calipers.threats.ball import Ball, Region
from calipers.threats.substitutions import Substitutions
from calipers.threats.threat import Threat

# float32 logits of the networks we measured differ from float64 by less than 5 roundings of the
# largest one
_SETTLED = 16
_UNSETTLED = 4 * _SETTLED


@dataclass(frozen=True, eq=False)
class Problem:
    """The verification problem that every tool receives.

    It holds N points x with labels y, a threat, a goal and a classifier. Make one with
    `Problem.pose`, which checks all of them.

    Args:
        classifier: the model, in the data's native units.
        x: points (N, *D), of the classifier's dtype and on its device.
        y: labels (N,), as places among the outputs.
        threat: what the adversary may do, a `Ball` or `Substitutions`.
        goal: what the adversary wants.
        classes: the number of outputs K.
        names: digests of the points themselves. Random streams and evidence are keyed by them, so
            results do not depend on the order of the points or on the shard a point is in.
        notes: sentences on how the arguments were interpreted, where that is not obvious.
        executor: where certifiers run their jobs; no result depends on it.
        features: names of the columns of a point, () where they have none.

    Raises:
        BadInput: by `Problem.pose`, for points, labels, a threat or a goal that do not fit.
        BadModel: by `Problem.pose`, for a model that cannot be measured.

    Example:
        >>> problem = Problem.pose(nn.Linear(2, 2), torch.rand(3, 2), [0, 1, 0], Ball("l2", 0.5))
        >>> len(problem), problem.classes
        (3, 2)
    """

    classifier: Classifier
    x: Tensor
    y: Tensor
    threat: Threat
    goal: Goal
    classes: int
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    executor: Executor = field(default_factory=LocalThreads)
    features: tuple[str, ...] = ()

    @classmethod
    @with_gradients()
    def pose(
        cls,
        model: nn.Module | Classifier,
        x: Any,
        y: Any,
        threat: Threat,
        goal: Goal | None = None,
        *,
        places: bool = False,
        executor: Executor | None = None,
    ) -> Problem:
        """Return the problem, with all its parts checked.

        Args:
            model: a `Classifier`, or a module, which becomes one.
            x: points (N, *D), a tensor or an array. Bytes are divided by 255 unless the box reaches
                beyond 1.
            y: labels (N,): places among the outputs, or the names of classes where the model names
                them (as estimators do, or by an attribute `classes_`). None takes the model's own
                answers as the labels.
            threat: a `Ball` or `Substitutions`.
            goal: what the adversary wants; None is `Untargeted()`.
            places: labels are places among the outputs even where the model names its classes.
            executor: where certifiers run their jobs; None: on threads of this process, one a core.

        Returns:
            The problem, its points and labels on the model's device.

        Raises:
            BadInput: for points, labels, a threat or a goal that do not fit; it says what was
                given, what was expected, and what to do.
            BadModel: for a model that cannot be measured (see `Classifier.check`).
        """
        if not isinstance(threat, Ball | Substitutions):
            raise BadInput(
                f"the threat says what the adversary may do, got {type(threat).__name__}. Give "
                "calipers.Ball('linf', 8 / 255), in the data's units, or calipers.Substitutions"
            )
        classifier = model if isinstance(model, Classifier) else Classifier(model)
        given = x
        x, notes = arguments.points(x, grey_levels=_in_grey_levels(threat))
        x = x.to(device=classifier.device, dtype=classifier.dtype)
        if isinstance(threat, Ball):
            x, laid = laid_out(classifier, x)
            notes = [*notes, *laid]
            if threat.box == "data":
                threat = threat.fitted(x)
                notes = [*notes, "the box is the range of these points"]
        own = None if places else classifier.labels
        if y is not None:
            y = arguments.labels(y, len(x), own).to(classifier.device)
        threat.check(x)
        finite = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        logits = classifier.check(finite, classifies=not isinstance(goal, Specification))
        classes = logits.shape[1]
        if y is None:
            y = logits.argmax(1)
            notes = [*notes, "no labels were given: the model's own answers are taken for right"]
        arguments.check_range(y, classes)
        if classes < 2:
            raise BadInput(f"the model returns {classes} logits: nothing to tell apart")
        goal = goal or Untargeted()
        goal.check(y, classes)
        confirm(classifier, x, threat)
        notes = [*(f"the model: {note}" for note in classifier.notes), *notes]
        names, told = _names(x, y, goal), tuple(notes)
        where = executor or LocalThreads()
        features = arguments.names(given, classifier.features, x[0].numel())
        return cls(classifier, x, y, threat, goal, classes, names, told, where, features)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor | Sequence[int]) -> Problem:
        """Return the problem for the chosen points."""
        i = torch.as_tensor(index, dtype=torch.long, device=self.x.device)
        names = tuple(self.names[k] for k in i.tolist())
        part = Problem(
            self.classifier,
            self.x[i],
            self.y[i],
            self.threat.take(i),
            self.goal.take(i),
            self.classes,
            names,
            executor=self.executor,
        )
        if "size" in self.__dict__:  # already computed
            part.__dict__["size"] = self.size[i]
        return part

    def at(self, radius: float | Tensor) -> Problem:
        """Return the problem at another radius, or one for each point."""
        same = Problem(
            self.classifier,
            self.x,
            self.y,
            self.threat.at(radius),
            self.goal,
            self.classes,
            self.names,
            executor=self.executor,
        )
        if "size" in self.__dict__:
            same.__dict__["size"] = self.size
        return same

    @cached_property
    def region(self) -> Region:
        """The admissible set around every point."""
        return self.threat.region(self.x)

    def margins(self, logits: Tensor) -> Tensor:
        """Return the margins (N, S) of logits (N, K)."""
        return self.goal.margins(logits, self.y)

    def fooled(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the model is beyond doubt wrong at points (N, *D).

        Beyond doubt: in a batch, alone and in float64, with finite logits each time. Also returns
        the worst margins and the model's answers. Shapes (N,): bool, the model's dtype, class
        numbers.
        """
        logits = self.classifier.logits(points)
        worst = self.goal.worst(self.margins(logits))
        good = is_adversarial(worst) & logits.isfinite().all(1)
        places = torch.nonzero(good).flatten()
        if len(places):
            left = self.take(places)
            alone = torch.cat([self.classifier.logits(points[i : i + 1]) for i in places.tolist()])
            exact = self.classifier.logits64(points[places])
            agree = is_adversarial(left.goal.worst(left.margins(alone))) & is_adversarial(
                left.goal.worst(left.margins(exact))
            )
            good[places] = agree & alone.isfinite().all(1) & exact.isfinite().all(1)
        return good, worst, logits.argmax(1)

    def clearance(self, points: Tensor) -> Tensor:
        """Return how far points are from being adversarial beyond all doubt.

        (N,) float64, in logits, for points (N, *D); tools that approach the boundary step by step
        stop at 0. It is the worst margin of a float64 copy plus the `allowance`, so that no order
        of summation gives another answer.
        """
        logits = self.classifier.logits64(points)
        return self.goal.worst(self.margins(logits)) + self.allowance(logits, self.size)

    def allowance(self, logits: Tensor, size: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return by how much rounding may move a margin, (M,) float64.

        The margin is that of a float64 copy's `logits (M, K)`; the rounding is that of the model's
        own arithmetic, or of `dtype`. The allowance is `_SETTLED` roundings of the largest logit,
        or of the `size (M,)` of the point that they belong to; more where there is no float64 copy
        to tell the size by.
        """
        settled = _UNSETTLED if self.classifier.no_float64 else _SETTLED
        return (
            settled
            * torch.finfo(dtype or self.x.dtype).eps
            * torch.maximum(logits.abs().amax(1), size)
        )

    @cached_property
    def size(self) -> Tensor:
        """The magnitude of the terms that each point's logits sum, (N,) float64.

        It is as large as the logits, or as their rounding shows the terms to be: a single logit can
        be the small difference of large terms.
        """
        exact = self.classifier.logits64(self.x)
        rounding = (self.classifier.logits(self.x).double() - exact).abs() / torch.finfo(
            self.x.dtype
        ).eps
        return torch.maximum(exact.abs(), rounding).amax(1).nan_to_num(nan=0.0, posinf=0.0)

    def streams(self, seed: int) -> Streams:
        """Return one random stream for each point."""
        return Streams.of(seed, self.names, self.x.device)

    def identity(self) -> dict[str, object]:
        """Return what identifies the problem: model, threat and goal.

        The radius of the threat is not part of it.
        """
        goal = {"name": type(self.goal).__name__, **self.goal.identity()}
        return {"model": self.classifier.digest(), "threat": self.threat.identity(), "goal": goal}

    def fingerprint(self) -> str:
        """Return the digest of `identity`.

        It is the name under which a record files the evidence.
        """
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


def _in_grey_levels(threat: Threat) -> bool:
    """Return whether the box reaches beyond 1, so that bytes stay as they are."""
    ends = threat.ends if isinstance(threat, Ball) and threat.box != "data" else None
    return ends is not None and bool(torch.as_tensor(ends[1]).max() > 1)


def _names(x: Tensor, y: Tensor, goal: Goal) -> tuple[str, ...]:
    """Return a digest of each point with its label and target.

    The same point a second time gets another name.
    """
    rows = x.detach().cpu().contiguous().numpy()
    own = torch.as_tensor(goal.target) if isinstance(goal, Targeted) else torch.zeros(())
    targets = [f"->{t}" for t in own.tolist()] if own.dim() else [""] * len(x)
    seen: dict[str, int] = {}
    names = []
    for row, label, target in zip(rows, y.tolist(), targets, strict=True):
        name = hashlib.blake2b(
            row.tobytes() + f"{label}{target}".encode(), digest_size=8
        ).hexdigest()
        seen[name] = seen.get(name, 0) + 1
        # the same image twice counts as two points
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return tuple(names)
