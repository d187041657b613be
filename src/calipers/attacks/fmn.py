"""Fast minimum-norm attack (FMN), in every norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.minimum_norm import (
    FromTheCentre,
    check_between,
    cosine,
    seek,
    slope,
    unit,
    widths,
)
from calipers.attacks.engine.queue import Look, Memory
from calipers.attacks.engine.targets import target_count
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.ball import Region
from calipers.threats.count_norms import L0

# larger steps move all changed features to the ends of the box at once, and the search cannot tell
# which of them it needs
_COUNT_SHARE = 0.2


@dataclass(frozen=True)
class FMN:
    """Fast minimum-norm attack (Pintor et al. 2021) in l0, l1, l2 and linf.

    Each point has a radius of its own, which grows by a share `gamma` while the iterate is not
    adversarial and shrinks while it is; each gradient step is projected onto the ball of that
    radius. `step` and `gamma` fall to `last_step` and `last_gamma` along half a cosine.

    Differs from the paper: the step is steepest ascent of the norm, not the Euclidean gradient
    (0.14 instead of 0.31 in linf on the embedded robust net), and it scales with the radius, so
    that no unit of the data is assumed; for l0 it is the Euclidean gradient in shares of what each
    feature can move. After a success the radius falls at once to where a linear model puts the
    decision boundary, not by gamma alone (in l1 on the embedded robust net 6.0 instead of 7.2). The
    projection onto the intersection of ball and box is exact, and the nearest example is pulled
    back to the boundary.

    Cost: (steps + 1) x max(targets, 1) forward and backward passes, and about 10 forwards at the
    end.

    Args:
        steps: Gradient steps.
        step: Length of the first step as a share of the current radius.
        last_step: Length of the last step, in the same unit; at most `step`.
        gamma: Share by which the radius first grows or shrinks; at most 0.999.
        last_gamma: The same share at the last step; at most `gamma`.
        targets: Number of other classes, nearest first, each of which gets a search of its own; 0
            follows the worst margin, which may lead to another class than the nearest.
        inside: End the searches of a point at the first example within the problem's radius, for
            verdicts at that radius; otherwise the radius is ignored.

    Raises:
        BadInput: A setting is out of its range.

    Example:
        >>> import torch, calipers
        >>> from calipers.attacks import FMN
        >>> x, y = torch.tensor([[0.6, 0.2]]), torch.tensor([0])
        >>> ball = calipers.Ball("linf", 0.25)
        >>> found = calipers.attack(torch.nn.Identity(), x, y, ball, FMN(steps=20))
        >>> print(f"{found.distance.item():.3f}")
        0.200
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "nearest example", "fast minimum-norm: radii that grow and shrink"
    )

    steps: int = 100
    step: float = 2.0
    last_step: float = 0.01
    gamma: float = 0.05
    last_gamma: float = 0.001
    targets: int = 0
    inside: bool = False

    def __post_init__(self) -> None:
        check_between(
            self,
            steps=(1, 10**9),
            step=(1e-9, 1e3),
            last_step=(0, self.step),
            gamma=(1e-9, 0.999),
            last_gamma=(0, self.gamma),
        )
        check_between(self, targets=(0, 10**9))

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the nearest candidates as points are decided.

        The search itself is deterministic; `seed` draws the random starts of the final polish where
        the search found nothing.
        """
        return seek(
            problem,
            _FMNState(tool=self, steps=self.steps, targets=target_count(problem, self.targets)),
            seed,
            self.inside,
        )


@dataclass(frozen=True, kw_only=True)
class _FMNState(FromTheCentre):
    tool: FMN

    def memory(self, region: Region, x: Tensor) -> Memory:
        return {"radius": region.radius.clone()}

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        region, radius, tool = look.region, memory["radius"], self.tool
        share, gamma = (
            cosine(a, b, look.step, self.steps)
            for a, b in ((tool.step, tool.last_step), (tool.gamma, tool.last_gamma))
        )
        radius = next_radius(look, radius, gamma)
        if isinstance(region.norm, L0):
            # the Euclidean length of `radius` features that each move a share of their width
            stride = _COUNT_SHARE * share * (radius * region.norm.channels).sqrt()
            moved = look.x + unit(look.gradient * widths(region)) * widths(region) * per_job(
                stride.to(look.x.dtype), look.x
            )
        else:
            moved = region.at(share * radius).step(look.x, look.gradient, 1.0)
        return region.at(radius).project(moved), {"radius": radius}


def next_radius(look: Look, radius: Tensor, gamma: Tensor) -> Tensor:
    """Return the next radius of each job, (B,) float64.

    It is a little smaller at an adversarial iterate and a little larger elsewhere. It is also moved
    to where a linear model puts the decision boundary: at the first step, as long as no example is
    found, and as seen from adversarial iterates (without this, a radius that was far too large
    takes most of the steps to come down).
    """
    region, grain = look.region, float(look.region.norm.is_count)  # counts change by whole features
    nearest = look.score.double()
    # A lower bound on the distance to the boundary of the linear model; negative at an adversarial
    # iterate.
    ahead = (
        -look.loss / slope(region, look.gradient).clamp_min(torch.finfo(look.x.dtype).tiny)
    ).double()
    shrunk = torch.minimum(radius * (1 - gamma), radius - grain).minimum(
        nearest + ahead.clamp(max=0)
    )
    grown = torch.maximum(radius * (1 + gamma), radius + grain)
    # The guess may not stay below the usual growth: between two classes, each may look near from
    # the side of the other forever.
    guess = torch.where(look.step == 0, 0.0, grown).maximum(
        torch.where(look.step == 0, 0.0, radius) + ahead
    )
    resists = torch.where(nearest.isinf(), guess, grown)
    return (
        torch.where(is_adversarial(look.worst), shrunk, resists).clamp(min=0).minimum(region.radius)
    )
