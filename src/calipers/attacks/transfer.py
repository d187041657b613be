"""Transfer attacks: examples made on other models, tried on this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from calipers.attacks.engine.batches import per_job
from calipers.errors import BadInput
from calipers.models.classifier import Classifier
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import endless, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt


@dataclass(frozen=True, repr=False)
class Transfer:
    """Run an attack on surrogates, and ask the target about the candidates.

    With several surrogates the attack first climbs their mean logits (Liu et al. 2017), then the
    logits of each alone; points that fool the target are left out of what follows. On a surrogate
    the attack does not end at the decision boundary but spends all its steps: what lies deep inside
    another class there is more likely to cross the target's boundary too. Of several candidates the
    one of lowest margin on the target is returned; of equal ones (a target that returns labels only
    has no others) the nearest. In the record a surrogate is named by the digest of its weights.

    Cost: one forward pass of the target per candidate; the attack's own passes run on the
    surrogates and are not counted.

    Args:
        attack: The attack that is run on the surrogates.
        surrogates: Modules or `Classifier`s. They take inputs in the target's native units (wrap
            one trained on standardised inputs in a `Classifier`) and tell the same classes apart,
            in the same order.

    Raises:
        BadInput: No surrogate is given, one is no model, or (at the call) one has other classes.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "an attack made on other models, tried on this one",
        substitutions=True,
        needs="scores or labels",
        inner=("attack",),
    )

    attack: Attack
    surrogates: tuple[nn.Module | Classifier, ...]

    def __post_init__(self) -> None:
        given = self.surrogates if isinstance(self.surrogates, tuple | list) else (self.surrogates,)
        wrong = [one for one in given if not isinstance(one, nn.Module | Classifier)]
        if wrong or not given:
            got = f"{wrong[0]!r}" if wrong else "none"
            raise BadInput(
                "Transfer takes surrogates by value, a tuple of modules or Classifiers (in "
                f"Python; a record only names them), got {got}"
            )
        object.__setattr__(
            self,
            "surrogates",
            tuple(one if isinstance(one, Classifier) else Classifier(one) for one in given),
        )

    def __repr__(self) -> str:
        names = "".join(f"{one.digest()!r}, " for one in self._known)
        return (
            f"Transfer(attack={self.attack!r}, "
            f"surrogates=({names.strip() if len(self._known) == 1 else names[:-2]}))"
        )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the best candidate of each point, all at once.

        An interrupt yields what is found so far, and is passed on.
        """
        found = _Judged(problem)
        try:
            for surrogate in self._stages(problem):
                left = torch.nonzero(~is_adversarial(found.worst)).flatten()
                if len(left):
                    found.ask(left, _made(self.attack, surrogate, problem.take(left), seed))
        except KeyboardInterrupt:
            yield found.attempt()
            raise
        yield found.attempt()

    @property
    def _known(self) -> tuple[Classifier, ...]:
        return self.surrogates  # type: ignore[return-value]

    def _stages(self, problem: Problem) -> list[Classifier]:
        """Return the surrogates in the order they are attacked, strongest first.

        Raises `BadInput` for a surrogate of other classes.
        """
        for one in self._known:
            classes = one.check(_moved(problem.x, one).nan_to_num(0.0)).shape[1]
            if classes != problem.classes:
                raise BadInput(
                    f"a surrogate tells {classes} classes apart, the target {problem.classes}: "
                    "both must answer with the same classes, in order"
                )
        together = [Classifier(MeanLogits(self._known))] if len(self._known) > 1 else []
        return [*together, *self._known]


class MeanLogits(nn.Module):
    """The mean logits of several classifiers on inputs in native units.

    On the device and in the dtype of the first.
    """

    def __init__(self, of: tuple[Classifier, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([one.network for one in of])
        self.moves = [(one.device, one.dtype) for one in of]

    def forward(self, x: Tensor) -> Tensor:
        """(N, *D) -> (N, K)."""
        device, dtype = self.moves[0]
        answers = [
            part(x.to(*move)).to(device, dtype)
            for part, move in zip(self.parts, self.moves, strict=True)
        ]
        return torch.stack(answers).mean(0)


class _Judged:
    """What the target answered.

    For each point the best candidate, its worst margin on the target, its distance, and the number
    of questions.
    """

    def __init__(self, problem: Problem) -> None:
        n, device = len(problem), problem.x.device
        self.problem, self.best = problem, problem.x.clone()
        self.worst = torch.full((n,), torch.inf, dtype=problem.x.dtype, device=device)
        self.distance = torch.zeros(n, dtype=torch.float64, device=device)
        self.asked = torch.zeros(n, dtype=torch.long, device=device)

    def ask(self, places: Tensor, points: Tensor) -> None:
        """Judge one candidate for each of the places (M,), and keep the better."""
        part = self.problem.take(places)
        worst = part.goal.worst(part.margins(part.classifier.logits(points))).nan_to_num(
            nan=-torch.inf
        )
        distance = part.region.distance(points)
        better = (worst < self.worst[places]) | (
            (worst == self.worst[places]) & (distance < self.distance[places])
        )
        self.best[places] = torch.where(per_job(better, points), points, self.best[places])
        self.worst[places] = torch.where(better, worst, self.worst[places])
        self.distance[places] = torch.where(better, distance, self.distance[places])
        self.asked[places] += 1

    def attempt(self) -> Attempt:
        """Return the best candidates so far."""
        return Attempt(
            torch.arange(len(self.best), device=self.best.device),
            self.best,
            self.asked,
            torch.zeros_like(self.asked),
        )


def _moved(x: Tensor, classifier: Classifier) -> Tensor:
    return x.to(device=classifier.device, dtype=classifier.dtype)


def _made(attack: Attack, surrogate: Classifier, problem: Problem, seed: int) -> Tensor:
    """Return the candidates (N, *D) that the attack makes on the surrogate.

    They are admissible for the target.
    """
    y = problem.y.to(surrogate.device)
    posed = replace(
        problem,
        classifier=surrogate,
        x=_moved(problem.x, surrogate),
        y=y,
        goal=endless(problem.goal),
    )
    points = problem.x.clone()
    for attempt in attack(posed, seed=seed):
        points[attempt.index.to(points.device)] = attempt.candidate.to(points)
    return problem.region.snap(points)
