"""Surrogates distilled from a model that can only be queried.

A small student network is trained on the target's answers; its gradients serve `Transfer`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from calipers.errors import BadInput
from calipers.models.classifier import Classifier
from calipers.models.wrappers import BlackBox

_EPOCHS, _BATCH, _RATE = 30, 32, 2e-3


class Student(nn.Module):
    """A fully connected net with two hidden ReLU layers, drawn from a seed."""

    def __init__(self, features: int, hidden: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = list(pairwise((features, hidden, hidden, classes)))
        self.weights = nn.ParameterList(
            [
                torch.empty(out, n).normal_(0, math.sqrt(2 / n), generator=generator)
                for n, out in sizes
            ]
        )
        self.biases = nn.ParameterList([torch.zeros(out) for _, out in sizes])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits: (N, *D) -> (N, K)."""
        h = x.flatten(1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = (h if i == 0 else h.clamp_min(0)) @ weight.T + bias
        return h


@dataclass(frozen=True)
class QuerySchedule:
    """How many questions a target is asked, and at which new points.

    Args:
        queries: Budget of questions to the target.
        rounds: Rounds of training, with new questions between two of them.
        reach: How far new points lie from known ones, in the data's units, above 0.
        box: Lower and upper end of each feature.

    Raises:
        BadInput: A setting is out of its range.

    Example:
        >>> QuerySchedule(500, rounds=2).reach
        0.1
    """

    queries: int = 2000
    rounds: int = 4
    reach: float = 0.1
    box: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.queries < 2 or self.rounds < 1 or not self.reach > 0:
            raise BadInput(
                "distilling takes queries >= 2, rounds >= 1 and reach > 0; got "
                f"{self.queries}, {self.rounds}, {self.reach}"
            )


USUAL_SCHEDULE = QuerySchedule()


def distilled(
    target: nn.Module | Classifier,
    x: Tensor,
    schedule: QuerySchedule = USUAL_SCHEDULE,
    *,
    hidden: int = 128,
    student: nn.Module | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a surrogate trained on the target's answers alone.

    For `Transfer` (Papernot et al. 2017). The target is asked at the points x and is never told
    their labels. Each round trains the student on all answers so far, then asks at new points: the
    known ones moved along the sign of the gradient of the student's logit of the answered class, to
    and fro in turn, and clamped into the box, as many as the budget of the `schedule` allows. So
    questions gather where the student changes its mind. Labels are learnt as labels; scores as the
    probabilities that softmax makes of them. The same seed and the same answers give the same
    surrogate.

    Cost: at most `schedule.queries` forwards of the target.

    Args:
        target: The model, which may be `BlackBox` without gradients.
        x: Points (N, *D), at least 2, at which the target is asked first.
        schedule: How often the target is asked, at least N times, and at which new points.
        hidden: Width of the hidden layers of the student.
        student: A network of which a copy is trained in place of the default: one built like the
            target transfers better.
        seed: Seed of weights and shuffling.

    Returns:
        The trained student, its parameters frozen.

    Raises:
        BadInput: The first points exceed the budget or are fewer than 2, or `hidden` is below 1.
    """
    classifier = target if isinstance(target, Classifier) else Classifier(target)
    queries = schedule.queries
    if len(x) < 2 or queries < len(x) or hidden < 1:
        raise BadInput(
            "distilling takes at least 2 points, queries >= points and hidden >= 1; got "
            f"{len(x)} points, {queries} queries, hidden {hidden}"
        )
    points, generator = x.detach().cpu().float(), torch.Generator().manual_seed(seed)
    answers = _answers(classifier, points)
    made = (
        Student(points[0].numel(), hidden, answers.shape[1], seed)
        if student is None
        else copy.deepcopy(student).cpu().float()
    )
    made = made.eval().requires_grad_(True)
    for k in range(schedule.rounds):
        _learn(made, points, answers, generator)
        if k + 1 < schedule.rounds and len(points) < queries:
            some = torch.randperm(len(points), generator=generator)[: queries - len(points)]
            fresh = (
                points[some]
                + (-1.0) ** k * schedule.reach * _slope(made, points[some], answers[some]).sign()
            ).clamp(*schedule.box)
            points, answers = (
                torch.cat([points, fresh]),
                torch.cat([answers, _answers(classifier, fresh)]),
            )
    return made.requires_grad_(False)


def _answers(target: Classifier, points: Tensor) -> Tensor:
    """Return what the student is to learn, (N, K): rows of probabilities."""
    logits = (
        torch.cat(
            [target.logits(part.to(target.device, target.dtype)) for part in points.split(256)]
        )
        .cpu()
        .float()
    )
    # a single score stands for two classes
    logits = (
        torch.cat([torch.zeros(len(logits), 1), logits.view(-1, 1)], 1)
        if logits.numel() == len(logits)
        else logits
    )
    labels_only = isinstance(target.module, BlackBox) and target.module.kind == "labels"
    return (
        nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()
        if labels_only
        else logits.softmax(1)
    )


def _learn(student: nn.Module, points: Tensor, answers: Tensor, generator: torch.Generator) -> None:
    """Minimise the cross-entropy to the answers by Adam.

    The shuffling is drawn from the generator.
    """
    optimiser = torch.optim.Adam(student.parameters(), lr=_RATE)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(points), generator=generator).split(_BATCH):
            optimiser.zero_grad()
            with torch.enable_grad():
                nn.functional.cross_entropy(student(points[batch]), answers[batch]).backward()
            optimiser.step()


def _slope(student: nn.Module, points: Tensor, answers: Tensor) -> Tensor:
    """Return the input gradient of the student's logit, (N, *D).

    The logit is that of the answered class.
    """
    x = points.clone().requires_grad_()
    with torch.enable_grad():
        chosen = student(x).gather(1, answers.argmax(1, keepdim=True)).sum()
    return torch.autograd.grad(chosen, x)[0]
