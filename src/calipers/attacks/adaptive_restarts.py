"""A second attack, repeated on the points that a first nearly broke."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import BATCH, backwards_of, in_flight, input_gradient, per_job
from calipers.attacks.engine.minimum_norm import slope as steepness
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import is_adversarial
from calipers.problem.interrupts import relayed
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt


@dataclass(frozen=True)
class AdaptiveRestarts:
    """A first attack on all points, a second on those nearly broken.

    `restart` is run up to `restarts` times, with other random numbers, on points that are nearly
    broken: where a linear model of the worst margin, at the best candidate so far, puts the
    decision boundary within the share `threshold` of the radius. That is each point's own affair:
    results do not depend on its neighbours. Restarts are spent where they can make a difference: of
    172 digits that an l1 attack had left, all but one of those that any of twenty other runs broke
    were among the 55 nearest. Adaptive restarts by rank: Liu et al. 2022.

    Cost: the first attack's; one forward and backward pass per point that resists it; `restarts`
        times
    the second attack's on nearly broken points.

    Args:
        attack: Attack on all points.
        restart: Attack on the nearly broken ones.
        threshold: Distance to the linearised boundary that counts as nearly broken, as a share of
            the radius, above 0.
        restarts: Runs of `restart` at most.

    Raises:
        BadInput: A setting is out of its range.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "an attack, then restarts on points that it nearly broke",
        needs="as its attacks",
        inner=("attack", "restart"),
    )

    attack: Attack
    restart: Attack
    threshold: float = 0.08
    restarts: int = 4

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and self.restarts >= 1):
            raise BadInput(
                "AdaptiveRestarts takes threshold > 0 (usually 0.02 to 0.1) and restarts >= 1, got "
                f"{self.threshold}, {self.restarts}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield broken points as the attacks decide them, the others at the end."""
        state = _State(problem)
        everywhere = torch.arange(len(problem), device=problem.x.device)
        yield from state.run(self.attack, everywhere, seed)
        near = torch.nonzero(state.missing() <= self.threshold).flatten()
        for k in range(self.restarts):
            near = near[~state.broken[near]]
            if not len(near):
                break
            yield from state.run(self.restart, near, seed + 1 + k)
        yield state.attempt(torch.nonzero(~state.broken).flatten())


class _State:
    """What is known of each point.

    Its best candidate so far, the worst margin of that, whether it is adversarial, and what was
    spent.
    """

    def __init__(self, problem: Problem) -> None:
        n, device = len(problem), problem.x.device
        self.problem, self.best = problem, problem.x.clone()
        self.worst = torch.full((n,), torch.inf, dtype=problem.x.dtype, device=device)
        self.broken = torch.zeros(n, dtype=torch.bool, device=device)
        self.forwards, self.backwards = (
            torch.zeros(n, dtype=torch.long, device=device) for _ in range(2)
        )

    def run(self, attack: Attack, places: Tensor, seed: int) -> Iterator[Attempt]:
        """Run an attack on some points, and yield the points that it broke.

        The better candidates are kept.
        """
        yield from relayed(
            attack(self.problem.take(places), seed=seed),
            lambda attempt: self._note(attempt, places[attempt.index]),
        )

    def _note(self, attempt: Attempt, at: Tensor) -> Attempt | None:
        """Judge candidates of the points `at (M,)`.

        Return those of the points that they break, or None.
        """
        part = self.problem.take(at)
        worst = part.goal.worst(part.margins(part.classifier.logits(attempt.candidate)))
        broken, lower = is_adversarial(worst), is_adversarial(worst) | (worst < self.worst[at])
        self.best[at] = torch.where(
            per_job(lower, attempt.candidate), attempt.candidate, self.best[at]
        )
        self.worst[at] = torch.where(lower, worst, self.worst[at])
        self.forwards[at] += attempt.forwards + 1
        self.backwards[at] += attempt.backwards
        self.broken[at] |= broken
        return self.attempt(at[broken]) if bool(broken.any()) else None

    def attempt(self, places: Tensor) -> Attempt:
        """Return the candidates of some points."""
        return Attempt(places, self.best[places], self.forwards[places], self.backwards[places])

    def missing(self) -> Tensor:
        """Return how far candidates are from the decision boundary, (N,).

        By a linear model of the worst margin at the candidate, as a share of the radius; infinite
        if broken.
        """
        away = torch.full_like(self.worst, torch.inf)
        left = torch.nonzero(~self.broken).flatten()
        for part in left.split(in_flight(self.problem, BATCH)):
            away[part] = _missing(self.problem.take(part), self.best[part])
            self.forwards[part] += 1
            self.backwards[part] += backwards_of(self.problem)
        return away


def _missing(problem: Problem, points: Tensor) -> Tensor:
    x = points.clone().requires_grad_()
    problem.classifier.passes.add(len(x), len(x) * backwards_of(problem))
    with problem.classifier.frozen():
        worst = problem.goal.worst(problem.margins(problem.classifier.network(x)))
        length = steepness(problem.region, input_gradient(worst, x))
    share = worst.detach() / (length * problem.region.radius.to(length)).clamp_min(
        torch.finfo(length.dtype).tiny
    )
    return share.nan_to_num(nan=torch.inf)
