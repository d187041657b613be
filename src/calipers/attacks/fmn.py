"""How near does a search come that moves the point and the radius together? Fast minimum-norm
attacks, in every norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.batches import per_job
from calipers.attacks.minimum import FromTheCentre, check_between, cosine, seek, slope, unit, widths
from calipers.attacks.rivals import rivals
from calipers.attacks.search import Look, Memory
from calipers.problem.ball import Region
from calipers.problem.capabilities import Capabilities
from calipers.problem.counts import L0
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.tools import Attempt

# larger steps send all changed features to their ends at once, and the search cannot tell which of
# them it needs
_COUNT_SHARE = 0.2


@dataclass(frozen=True)
class FMN:
    """Fast minimum-norm attack (Pintor et al. 2021) in l0, l1, l2 and linf: each point has a radius
    of its own that grows by a share `gamma` while the iterate resists and shrinks while it does
    not; a gradient step is projected onto that ball.

    `step` is the first step as a share of the current radius, `last_step` and `last_gamma` are
    where step and gamma end, along a cosine. `targets` > 0 runs a search towards each of that many
    rivals, nearest first; 0 follows the worst margin, which may lead to another rival than the
    nearest. `inside` ends the searches of a point at the first example within the problem's radius:
    for verdicts. Differs from the paper: the step is steepest ascent of the norm, not the Euclidean
    gradient (0.14 instead of 0.31 in linf on the embedded robust net), and scales with the radius,
    so that no unit of the data is assumed; for l0, the Euclidean gradient in shares of what each
    feature can move. After a success the radius falls at once to where a linear model puts the
    boundary, not by gamma alone (in l1 on the embedded robust net 6.0 instead of 7.2). The
    projection is exact onto ball and box at once, and the nearest example is pulled back to the
    boundary. Cost: (steps + 1) x max(targets, 1) forward and backward passes, and about 10 forwards
    at the end.
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
        """Yield the nearest candidates as points are decided; the seed is not used."""
        return seek(
            problem,
            _Search(tool=self, steps=self.steps, targets=rivals(problem, self.targets)),
            seed,
            self.inside,
        )


@dataclass(frozen=True, kw_only=True)
class _Search(FromTheCentre):
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
            # the length of that many features at a share of their width each
            stride = _COUNT_SHARE * share * (radius * region.norm.channels).sqrt()
            moved = look.x + unit(look.gradient * widths(region)) * widths(region) * per_job(
                stride.to(look.x.dtype), look.x
            )
        else:
            moved = region.at(share * radius).step(look.x, look.gradient, 1.0)
        return region.at(radius).project(moved), {"radius": radius}


def next_radius(look: Look, radius: Tensor, gamma: Tensor) -> Tensor:
    """Return each job's next radius: a little smaller at an adversarial iterate, a little larger
    elsewhere; or where a linear model puts the boundary: at first, and as seen from adversarial
    iterates (without it a radius that was far too large takes most of the steps to come down).
    """
    region, grain = look.region, float(look.region.norm.is_count)  # counts change by whole features
    nearest = look.score.double()
    # How far it is to the boundary of a linear model, at least; negative at an adversarial iterate.
    ahead = (
        -look.loss / slope(region, look.gradient).clamp_min(torch.finfo(look.x.dtype).tiny)
    ).double()
    shrunk = torch.minimum(radius * (1 - gamma), radius - grain).minimum(
        nearest + ahead.clamp(max=0)
    )
    grown = torch.maximum(radius * (1 + gamma), radius + grain)
    # It may not stay behind the usual growth: between two rivals each can look near from the
    # other's side for ever.
    guess = torch.where(look.step == 0, 0.0, grown).maximum(
        torch.where(look.step == 0, 0.0, radius) + ahead
    )
    resists = torch.where(nearest.isinf(), guess, grown)
    return (
        torch.where(is_adversarial(look.worst), shrunk, resists).clamp(min=0).minimum(region.radius)
    )
