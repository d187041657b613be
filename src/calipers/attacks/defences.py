"""Attacks on models that break gradients or answer at random.

Both follow Athalye, Carlini, Wagner 2018: the backward pass differentiable approximation (BPDA),
which gives a layer another gradient, and the expectation over transformation (EOT), which averages
over draws.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from calipers.attacks.engine.batches import BATCH, in_flight
from calipers.errors import BadInput, BadModel
from calipers.models.classifier import Classifier
from calipers.models.stochastic import drawn
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import Goal
from calipers.problem.interrupts import relayed
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt
from calipers.problem.votes import judged
from calipers.random_streams import key_of

StandIn = Literal["identity", "smooth"] | Callable[[Tensor], Tensor]
Averages = Literal["log_probabilities", "logits", "probabilities"]

# in log odds: an example whose average is just beyond the boundary fools half of the draws only
_FIRST_LEAD = 1.0


class BPDALayer(nn.Module):
    """A layer whose backward pass is that of another function.

    Its answers stay those of the layer, bit for bit.

    Args:
        layer: The layer, which need not have a gradient.
        backward: "identity" passes the gradient through as it is (input and output must have one
            shape). "smooth" is a soft staircase of `levels` equal steps on [0, 1], sum_j sigma((x -
            t_j) / width) / (levels - 1), for quantisers. Or any differentiable function of the
            layer's input that resembles the layer and returns its shape.
        levels: Values of the soft staircase, at least 2.
        width: Width of its steps, above 0. Default: half a step.

    Raises:
        BadInput: `backward` is unknown, or a setting is out of its range.
        BadModel: In the backward pass, if the stand-in returns another shape than the layer.
    """

    def __init__(
        self,
        layer: nn.Module | Callable[[Tensor], Tensor],
        backward: StandIn = "identity",
        *,
        levels: int = 256,
        width: float | None = None,
    ) -> None:
        super().__init__()
        if not callable(backward) and backward not in ("identity", "smooth"):
            raise BadInput(
                f"unknown backward {backward!r}; choose 'identity', 'smooth' or give a "
                "differentiable function"
            )
        if levels < 2 or (width is not None and not width > 0):
            raise BadInput(
                f"a soft staircase takes levels >= 2 and width > 0, got {levels}, {width}"
            )
        self.layer, self.backward, self.levels = layer, backward, levels
        # default, half a step: steep at the edges, nowhere flat
        self.width = 0.5 / (levels - 1) if width is None else width

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's own answer."""
        result: Tensor = _Replaced.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def smooth(self, x: Tensor) -> Tensor:
        """Return what is differentiated instead."""
        if callable(self.backward):
            return self.backward(x)
        return x if self.backward == "identity" else staircase(x, self.levels, self.width)

    def extra_repr(self) -> str:
        """Return the stand-in's name for `repr`."""
        return f"backward={self.backward if isinstance(self.backward, str) else 'own'}"


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: BPDALayer) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(x)
        own = x.detach()  # NumPy code cannot take a tensor that requires gradients
        result = part.layer(own)
        ctx.shape = result.shape
        return result.view_as(result) if result is own else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.part.smooth(x)
            if y.shape != ctx.shape:
                raise BadModel(
                    f"the stand-in returns shape {tuple(y.shape)}, the layer {tuple(ctx.shape)}: "
                    "give a differentiable function of the layer's own shapes"
                )
            (gradient,) = torch.autograd.grad(y, x, gradients[0])
        return gradient, None


def staircase(x: Tensor, levels: int, width: float) -> Tensor:
    """Return the soft staircase of `levels` values on [0, 1].

    Each edge (j + 1/2) / (levels - 1) is a step of a logistic function of the given width.
    """
    steps = levels - 1
    # One edge after the other, to keep memory at the size of one input;
    # sigma(t) = (1 + tanh(t / 2)) / 2.
    return sum(
        (((x - (j + 0.5) / steps) / (2 * width)).tanh() + 1 for j in range(steps)),
        torch.zeros_like(x),
    ) / (2 * steps)


def replace_layers(
    model: nn.Module, backward: Mapping[str, StandIn], *, levels: int = 256
) -> nn.Module:
    """Return a copy of the model with stand-ins for the named layers.

    They count in the backward pass only. The answers stay the same, so candidates found on the copy
    are real.

    Raises `BadInput` for a layer that the model does not have.
    """
    known = [name for name, _ in model.named_modules() if name]
    copied = copy.deepcopy(model)
    for name, way in backward.items():
        if name not in known:
            raise BadInput(
                f"the model has no layer {name!r}; it has "
                f"{', '.join(known[:20])}{', …' if len(known) > 20 else ''}"
            )
        path, _, last = name.rpartition(".")
        setattr(
            copied.get_submodule(path),
            last,
            BPDALayer(copied.get_submodule(name), way, levels=levels),
        )
    return copied


@dataclass(frozen=True)
class BPDA:
    """Run an attack on a copy of the model with stand-ins for layers.

    See `replace_layers`. The model's own answers decide whether a candidate counts. Costs what the
    attack costs.

    Args:
        attack: The attack to run.
        backward: Pairs of a layer's name and its stand-in: "identity", "smooth" or a function.
        levels: Values of the soft staircase of "smooth".

    Raises:
        BadInput: At the call, for a layer that the model does not have, an unknown stand-in, or
            less than 2 levels.
        BadModel: At the call, for a stand-in whose result has another shape than the layer's.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "an attack through stand-ins for layers without a gradient",
        substitutions=True,
        needs="gradients of stand-ins",
        inner=("attack",),
    )

    attack: Attack
    backward: tuple[tuple[str, StandIn], ...]
    levels: int = 256

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the attack's candidates."""
        own = problem.classifier
        replaced = Classifier(
            replace_layers(own.module, dict(self.backward), levels=self.levels),
            own.mean,
            own.std,
            own.samples,
        )
        replaced.read_like(own)
        replaced.passes = own.passes
        yield from self.attack(_with(problem, replaced, problem.goal), seed=seed)


class Averaged(nn.Module):
    """A random model's average answer over independent draws.

    The gradient of the average is the expected gradient (EOT). `of` "log_probabilities" returns the
    mean of the log softmax and "logits" the mean logits, which have the same margins;
    "probabilities" returns the logarithm of the mean softmax. The draws of the t-th call depend on
    (seed, t) alone, and the state of the shared generators is restored, so a run can be repeated.
    If `fresh` is False every call sees the same draws. A model that draws one number for each entry
    of the batch gives a point other numbers in another batch: its results do depend on the rest of
    the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int,
        seed: int = 0,
        *,
        average: Averages = "log_probabilities",
        fresh: bool = True,
    ) -> None:
        super().__init__()
        if samples < 1 or average not in get_args(Averages):
            raise BadInput(
                "Averaged takes samples >= 1 and average "
                f"{', '.join(map(repr, get_args(Averages)))}, got {samples}, {average!r}"
            )
        self.model, self.samples, self.seed, self.average, self.fresh = (
            model,
            samples,
            seed,
            average,
            fresh,
        )
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the average answer, (N, K)."""
        draws = drawn(self.model, x, self.samples, key_of(self.seed, self.calls))
        answers = torch.stack(list(draws))
        self.calls += self.fresh
        # a single logit is already a score for two classes
        single = answers.dim() == 2 or answers.shape[2] == 1
        if self.average == "logits" or single:
            return answers.mean(0)
        odds = answers.log_softmax(2)
        return (
            odds.mean(0)
            if self.average == "log_probabilities"
            else odds.logsumexp(0) - math.log(self.samples)
        )


@dataclass(frozen=True)
class EOT:
    """Attack the average over draws of a random model (EOT).

    A candidate succeeds if it fools the share `success_rate` of fresh draws.

    The attack stops where the average is just beyond the decision boundary, which fools half of the
    draws. Points whose candidate is voted down are attacked again with a lead that has to be gained
    beyond the boundary (1, 2, 4, ... in log odds), up to `rounds` times; the candidate of most
    votes is returned.

    Cost: `samples` times the attack's for each round, and `eval_samples` forwards.

    Args:
        attack: A gradient attack.
        samples: Draws that are averaged at each pass.
        success_rate: Share of fresh draws that a candidate has to fool, above 0 and at most 1.
        eval_samples: Fresh draws for the vote.
        rounds: Runs of the attack at most.
        average: What is averaged: "log_probabilities", "logits" or "probabilities".

    Raises:
        BadInput: A setting is out of its range.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "an attack on the average over random draws of the model",
        substitutions=True,
        needs="as its attack",
        inner=("attack",),
    )

    attack: Attack
    samples: int = 20
    success_rate: float = 0.5
    eval_samples: int = 50
    rounds: int = 4
    average: Averages = "log_probabilities"

    def __post_init__(self) -> None:
        if (
            self.samples < 1
            or self.eval_samples < 1
            or self.rounds < 1
            or not 0 < self.success_rate <= 1
        ):
            raise BadInput(
                f"EOT takes samples, eval_samples, rounds >= 1 and success_rate in (0, 1], got "
                f"{self.samples}, "
                f"{self.eval_samples}, {self.rounds}, {self.success_rate}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield all candidates at the end, the most convincing of each point.

        An interrupt yields what is known, and is passed on.
        """
        found, interrupt = _Polled(problem), None
        try:
            for k in range(self.rounds):
                self._round(problem, found, seed, k)
                if bool((found.share >= self.success_rate).all()):
                    break
        except KeyboardInterrupt as error:
            interrupt = error
        yield Attempt(
            torch.arange(len(problem), device=problem.x.device),
            found.best,
            found.forwards,
            found.backwards,
        )
        if interrupt is not None:
            raise interrupt

    def _round(self, problem: Problem, found: _Polled, seed: int, k: int) -> None:
        """Attack the points that are still voted down, with the k-th lead."""
        left = torch.nonzero(found.share < self.success_rate).flatten()
        part = problem.take(left)
        averaged = Classifier(
            Averaged(
                problem.classifier.network, self.samples, key_of(seed, k), average=self.average
            )
        )
        lead = 0.0 if k == 0 else _FIRST_LEAD * 2.0 ** (k - 1)

        def judge(attempt: Attempt) -> None:
            place = left[attempt.index]
            votes = self._votes(
                problem,
                part.goal.take(attempt.index),
                attempt.candidate,
                place,
                key_of(seed, "judges", k),
            )
            found.forwards[place] += attempt.forwards * self.samples + self.eval_samples
            found.backwards[place] += attempt.backwards * self.samples
            better = votes > found.share[place]
            found.best[place[better]], found.share[place[better]] = (
                attempt.candidate[better],
                votes[better],
            )

        with averaged.passes.counting() as spent:
            try:
                for _ in relayed(
                    self.attack(_with(part, averaged, _Ahead(part.goal, lead)), seed=seed), judge
                ):
                    pass
            finally:
                problem.classifier.passes.add(
                    spent.forwards * self.samples, spent.backwards * self.samples
                )

    def _votes(
        self, problem: Problem, goal: Goal, points: Tensor, place: Tensor, seed: int
    ) -> Tensor:
        problem.classifier.passes.add(forwards=len(points) * self.eval_samples)
        network, y, parts = (
            problem.classifier.network,
            problem.y[place],
            torch.arange(len(points), device=points.device).split(in_flight(problem, BATCH)),
        )
        with problem.classifier.frozen():
            return torch.cat(
                [
                    judged(network, points[i], y[i], self.eval_samples, seed, goal.take(i))
                    for i in parts
                ]
            )


class _Polled:
    """What is known of each point.

    Its best candidate, the share of votes for it, and what was spent.
    """

    def __init__(self, problem: Problem) -> None:
        n, device = len(problem), problem.x.device
        self.best, self.share = (
            problem.x.clone(),
            torch.full((n,), -1.0, dtype=torch.float64, device=device),
        )
        self.forwards, self.backwards = (
            torch.zeros(n, dtype=torch.long, device=device) for _ in range(2)
        )


@dataclass(frozen=True, eq=False)
class _Ahead:
    """A goal that is reached only where the worst margin is `lead` below zero."""

    goal: Goal
    lead: float

    def rows(self, y: Tensor, classes: int) -> Tensor:
        return self.goal.rows(y, classes)

    def offsets(self, y: Tensor, classes: int) -> Tensor:
        return self.goal.offsets(y, classes) + self.lead

    def cases(self, classes: int) -> Tensor:
        return self.goal.cases(classes)

    def identity(self) -> dict[str, object]:
        return self.goal.identity()

    def margins(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.goal.margins(logits, y) + self.lead

    def worst(self, margins: Tensor) -> Tensor:
        return self.goal.worst(margins)

    def smooth(self, margins: Tensor) -> Tensor:
        return self.goal.smooth(margins)

    def margin_classes(self, y: Tensor, classes: int) -> Tensor:
        return self.goal.margin_classes(y, classes)

    def take(self, index: Tensor) -> _Ahead:
        return _Ahead(self.goal.take(index), self.lead)

    def check(self, y: Tensor, classes: int) -> None:
        self.goal.check(y, classes)


def _with(problem: Problem, classifier: Classifier, goal: Goal) -> Problem:
    """Return the same problem about another model and goal."""
    return Problem(
        classifier, problem.x, problem.y, problem.threat, goal, problem.classes, problem.names
    )
