"""Sigma-zero: the fewest changed features, by a smooth count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.minimum_norm import FromTheCentre, check_between, cosine, seek, widths
from calipers.attacks.engine.queue import Look, Memory
from calipers.attacks.engine.targets import target_count
from calipers.problem.capabilities import COUNTS, Capabilities, check_fit
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.ball import Region
from calipers.threats.count_norms import L0


@dataclass(frozen=True)
class SigmaZero:
    """Sigma-zero (Cinà et al. 2024), for l0.

    Adam on max(margin, 0) + mean(d^2 / (d^2 + sigma)), the gradient divided by its largest entry.
    Changes below a threshold are dropped after each step; the threshold rises by `adapt` steps
    while the iterate is adversarial and falls while it is not. Where pixels are counted, d^2 is the
    sum over a pixel's channels, and a pixel is dropped if its largest change is below the
    threshold.

    The changes d, `step`, `sigma` and `threshold` are measured in shares of what each feature can
    move (on [0, 1] these are the paper's numbers).

    Differs from the paper: targeted goals are possible, and the fewest changes found are pulled
    back to the boundary, which makes them smaller.

    Cost: (steps + 1) x max(targets, 1) forward and backward passes, and about 10 forwards at the
    end.

    Args:
        steps: Adam steps.
        step: First step length; it falls along half a cosine.
        last_step: Last step length, at most `step`.
        sigma: Smoothing of the count of changes.
        threshold: First threshold below which changes are dropped, 0 to 1.
        adapt: Change of the threshold per step, as a share of the step length.
        targets: Number of other classes, nearest first, each of which gets a search of its own; 0
            follows the worst margin.
        inside: End the searches of a point at the first example within the problem's radius, for
            verdicts at that radius; otherwise the radius is ignored.

    Raises:
        BadInput: A setting is out of its range, or the norm counts no features or pixels.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "nearest example", "a smooth stand-in for the number of changes", norms=COUNTS
    )

    steps: int = 300
    step: float = 1.0
    last_step: float = 0.1
    sigma: float = 1e-3
    threshold: float = 0.3
    adapt: float = 0.01
    targets: int = 0
    inside: bool = False

    def __post_init__(self) -> None:
        check_between(
            self,
            steps=(1, 10**9),
            step=(1e-9, 10),
            last_step=(0, self.step),
            sigma=(1e-12, 1),
            threshold=(0, 1),
            adapt=(0, 1),
        )
        check_between(self, targets=(0, 10**9))

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the candidates of fewest changes as points are decided.

        The search itself is deterministic; `seed` draws the random starts of the final polish where
        the search found nothing.
        """
        check_fit(self, problem.threat)
        return seek(
            problem,
            _SigmaZeroState(
                tool=self, steps=self.steps, targets=target_count(problem, self.targets)
            ),
            seed,
            self.inside,
        )


@dataclass(frozen=True, kw_only=True)
class _SigmaZeroState(FromTheCentre):
    tool: SigmaZero

    def memory(self, region: Region, x: Tensor) -> Memory:
        return {
            "threshold": torch.full_like(region.radius, self.tool.threshold),
            "mean": torch.zeros_like(x),
            "square": torch.zeros_like(x),
        }

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        region, tool, tiny = look.region, self.tool, torch.finfo(look.x.dtype).tiny
        size = widths(region)
        share = (look.x - region.center) / size.clamp_min(tiny)
        wins = is_adversarial(look.worst)
        count = (
            2
            * share
            * tool.sigma
            / (of_pixels(region, share.square(), L0.total) + tool.sigma).square()
            / region.low.shape[1]
        )
        gradient = count - torch.where(
            per_job(wins, look.x), torch.zeros_like(size), look.gradient * size
        )
        gradient = gradient / per_job(gradient.flatten(1).abs().amax(1).clamp_min(tiny), gradient)
        mean, square = (
            0.9 * memory["mean"] + 0.1 * gradient,
            0.999 * memory["square"] + 0.001 * gradient.square(),
        )
        first, second = (
            per_job((1 - rate ** (look.step + 1).double()).to(gradient.dtype), gradient)
            for rate in (0.9, 0.999)
        )
        rate = cosine(tool.step, tool.last_step, look.step, self.steps)
        share = share - per_job(rate.to(share.dtype), share) * (mean / first) / (
            (square / second).sqrt() + 1e-8
        )
        moved = region.project(region.center + share * size)
        threshold = (memory["threshold"] + rate * torch.where(wins, tool.adapt, -tool.adapt)).clamp(
            0, 1
        )
        excess = (moved - region.center).abs() - per_job(threshold.to(share.dtype), share) * size
        return torch.where(of_pixels(region, excess, L0.peak) < 0, region.center, moved), {
            "threshold": threshold,
            "mean": mean,
            "square": square,
        }


def of_pixels(region: Region, values: Tensor, together: Callable[[L0, Tensor], Tensor]) -> Tensor:
    """Return values (M, *D) combined over the channels of each pixel.

    Where pixels are counted; else they are as given.
    """
    assert isinstance(region.norm, L0)
    return together(region.norm, values.flatten(1)).view_as(values)
