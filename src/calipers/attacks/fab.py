"""Fast adaptive boundary attack (FAB), for linf, l2 and l1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.boundary_refinement import across
from calipers.attacks.engine.minimum_norm import FromTheCentre, check_between, length, seek
from calipers.attacks.engine.queue import Look, Memory
from calipers.attacks.engine.targets import target_count
from calipers.problem.capabilities import LP, Capabilities, check_fit
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt


@dataclass(frozen=True)
class FAB:
    """Fast adaptive boundary attack (Croce, Hein 2020), for linf, l2 and l1.

    The targeted version: both the iterate and x are projected, inside the box, onto the linearised
    decision boundary. The next iterate lies between the two projections, a share `eta` beyond
    the boundary, and at most `alpha_max` of the way towards x's projection. A success is drawn back
    towards x by the factor `beta`.

    Differs from the paper: after a success the linearisation is the one at the success, not at the
    point drawn back, which saves a pass; there are no random restarts; a search on the segment to x
    ends each run.

    Cost: (steps + 1) x max(targets, 1) forward and backward passes, one backward pass per class for
    the ranking, and about 10 forwards at the end.

    Args:
        steps: Gradient steps of each search.
        targets: Number of other classes, nearest first, each of which gets a search of its own; 0
            follows the worst margin instead.
        eta: How far each step goes beyond the linearised boundary, as a share of the step.
        alpha_max: Largest share of the way from the iterate's projection towards x's projection, 0
            to 1.
        beta: Factor on the perturbation of a success, 0 to 1.
        inside: End the searches of a point at the first example within the problem's radius, for
            verdicts at that radius; otherwise the radius is ignored.

    Raises:
        BadInput: A setting is out of its range, or the norm is none of linf, l2 and l1.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "nearest example",
        "fast adaptive boundary: projections onto linearised boundaries",
        norms=LP,
    )

    steps: int = 50
    targets: int = 3
    eta: float = 0.05
    alpha_max: float = 0.1
    beta: float = 0.9
    inside: bool = False

    def __post_init__(self) -> None:
        check_between(
            self,
            steps=(1, 10**9),
            targets=(0, 10**9),
            eta=(0, 10),
            alpha_max=(0, 1),
            beta=(0, 1),
        )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the nearest candidates as points are decided.

        The search itself is deterministic; `seed` draws the random starts of the final polish where
        the search found nothing.
        """
        check_fit(self, problem.threat)
        return seek(
            problem,
            _FABState(tool=self, steps=self.steps, targets=target_count(problem, self.targets)),
            seed,
            self.inside,
        )


@dataclass(frozen=True, kw_only=True)
class _FABState(FromTheCentre):
    tool: FAB

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        region, tool, g, center = look.region, self.tool, look.gradient, look.region.center
        drawn = torch.where(
            per_job(is_adversarial(look.worst), look.x),
            center + tool.beta * (look.x - center),
            look.x,
        )
        here, home = (
            across(region, z, g, -look.loss + (g * (look.x - z)).flatten(1).sum(1))
            for z in (drawn, center)
        )
        near, far = length(region, here), length(region, home)
        bias = (near / (near + far).clamp_min(torch.finfo(g.dtype).tiny)).clamp(max=tool.alpha_max)
        eta = 1 + tool.eta
        return region.project(
            torch.lerp(drawn + eta * here, center + eta * home, per_job(bias, look.x))
        ), memory
