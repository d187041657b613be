"""Gradient ascent with momentum, for attacks that transfer (MI-FGSM)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.defences import BPDALayer
from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.losses import LossName, check_loss, climbed
from calipers.attacks.engine.queue import Look, Memory, Queue, SearchOptions, Slots
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

# all steps together can cross the ball 2.5 times; with 1, l2 steps that change direction never
# reach the sphere (41 instead of 81 of 300 digits broken)
_USUAL_TRAVEL = 2.5
_SMALLEST = 0.9  # of the side: how small an image may be drawn before it is padded to its old size
_FIRST_DRAW = 2  # first fork of a job's stream used here; lower ones are for random starts


@dataclass(frozen=True)
class MIFGSM:
    """Steps along a decaying sum of all gradients so far (MI-FGSM).

    Each gradient is divided by its mean absolute value before it is added (Dong et al. 2018).

    Differs from the papers: the default step is longer, the steps are steepest ascent of the norm,
    the projection onto the intersection of ball and box is exact, the look-ahead is such a step of
    length decay x step, and the iterate of smallest margin is returned; resized images shrink
    inside their frame instead of growing beyond it, and the loss is weighed at the image itself.

    Cost for a point that resists: steps + 1 forward and backward passes; twice the forwards with
    diversity.

    Args:
        steps: Gradient steps.
        step: Length of a step as a share of the radius, above 0 and at most 2. Default: 2.5 /
            steps.
        decay: Weight of the past in the sum of gradients.
        nesterov: Take each gradient one step ahead of the iterate (NI-FGSM, Lin et al. 2020). The
            points ahead are admissible, and count if they are adversarial.
        diversity: Probability that a gradient is taken through an image drawn at a random size and
            place and padded with zeros (DI, Xie et al. 2019), 0 to 1. This affects the gradient
            only: what is returned is judged as it is. Needs images (N, C, H, W).
        loss: What is climbed: "cross_entropy", "margin", "dlr", "scaled" or "alternate".

    Raises:
        BadInput: A setting is out of its range, or `diversity` is asked for points that are not
            images.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "gradients with a memory (MI-FGSM), through resized images",
    )

    steps: int = 10
    step: float | None = None
    decay: float = 1.0
    nesterov: bool = False
    diversity: float = 0.0
    loss: LossName = "cross_entropy"

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.decay >= 0:
            raise BadInput(
                f"MIFGSM takes steps >= 1 and decay >= 0 (usually 10 and 1.0), got {self.steps}, "
                f"{self.decay}"
            )
        if self.step is not None and not 0 < self.step <= 2:
            raise BadInput(
                "step is a share of the radius, above 0 and at most 2 (usually 0.1 to 0.25), got "
                f"{self.step}"
            )
        if not 0 <= self.diversity <= 1:
            raise BadInput(
                "diversity is the probability of a resized image, from 0 to 1 (usually 0.5), got "
                f"{self.diversity}"
            )
        check_loss(self.loss)

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        share = _USUAL_TRAVEL / self.steps if self.step is None else self.step
        recipe = _Rolling(self.steps, min(share, 2.0), self.decay, self.nesterov, self.loss)
        options = SearchOptions(seed, batch=batch)
        if not self.diversity:
            return Queue(problem, recipe, options).run()
        if problem.x.dim() != 4 or min(problem.x.shape[2:]) < 2:
            raise BadInput(
                "diversity resizes images (N, C, H, W), but the points have shape "
                f"{tuple(problem.x.shape[1:])}; take diversity=0"
            )
        return _Diverse(problem, recipe, options, self.diversity).run()


@dataclass(frozen=True)
class _Rolling:
    steps: int
    share: float
    decay: float
    nesterov: bool
    loss_name: LossName
    restarts: int = 1
    targets: int = 0
    nearest: bool = False

    def start(self, region: Region, streams: Streams, restart: Tensor) -> Tensor:
        return region.center

    def memory(self, region: Region, x: Tensor) -> Memory:
        return {"velocity": torch.zeros_like(x), "iterate": x}

    def loss(self, margins: Tensor, problem: Problem, restart: Tensor) -> Tensor:
        return climbed(self.loss_name, margins, problem.goal, restart)

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        size = look.gradient.flatten(1).abs().mean(1).clamp_min(torch.finfo(look.x.dtype).tiny)
        velocity = self.decay * memory["velocity"] + look.gradient / per_job(size, look.x)
        iterate = look.region.project(look.region.step(memory["iterate"], velocity, self.share))
        asked = iterate
        if self.nesterov:
            # The queue evaluates the look-ahead point, and at the last step the iterate itself.
            ahead = look.region.project(
                look.region.step(iterate, velocity, min(self.share * self.decay, 2.0))
            )
            asked = torch.where(per_job(look.step < self.steps - 1, ahead), ahead, iterate)
        return asked, {"velocity": velocity, "iterate": iterate}


class _Diverse(Queue):
    """The job queue with gradients taken through transformed images.

    The forward answers stay those of the images themselves, bit for bit.
    """

    def __init__(
        self, problem: Problem, recipe: _Rolling, options: SearchOptions, probability: float
    ) -> None:
        super().__init__(problem, recipe, options)
        own, self.draws = self.network, self.streams
        self.network = BPDALayer(own, lambda x: own(resized(x, self.draws, probability)))

    def _step(
        self, slots: Slots, part: Problem, region: Region, restart: Tensor, target: Tensor | None
    ) -> Slots:
        """Make one step.

        Each job draws from its own random stream, at its own step number.
        """
        rank, point = slots.job // self.n, slots.job % self.n
        self.draws = self.streams.take(point).fork(rank).fork(_FIRST_DRAW + slots.step)
        self.problem.classifier.passes.add(forwards=len(slots.job))
        return super()._step(slots, part, region, restart, target)

    def _attempt(self, decided: list[int]) -> Attempt:
        attempt = super()._attempt(decided)
        return replace(attempt, forwards=2 * attempt.forwards)


def resized(x: Tensor, streams: Streams, probability: float) -> Tensor:
    """Return images shrunk and placed at random in a black frame.

    Each image (B, C, H, W) is, with the given probability, drawn at 0.9 to 1 of its size; else it
    stays as it is. Bilinear; one draw per row of `streams (B,)`, the same for all channels.
    """
    wanted, size, down, right = streams.uniform(4, x.dtype).unbind(1)
    scale = _SMALLEST + (1 - _SMALLEST) * size
    zero = torch.zeros_like(scale)
    # The frame is [-1, 1]^2: the centre of an image of half width `scale` lies within 1 - scale of
    # the centre of the frame.
    middle = [(2 * place - 1) * (1 - scale) for place in (right, down)]
    back = torch.stack(
        [1 / scale, zero, -middle[0] / scale, zero, 1 / scale, -middle[1] / scale], 1
    ).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(back, list(x.shape), align_corners=False)
    drawn = torch.nn.functional.grid_sample(
        x, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return torch.where(per_job(wanted < probability, x), drawn, x)
