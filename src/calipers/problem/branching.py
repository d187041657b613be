"""Branching on the symbols of a `Substitutions` problem.

One group is fixed to each symbol in turn; the parts together cover the whole problem, and each is
finite.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calipers.problem.problem import Problem
from calipers.threats.substitution_region import NUMERIC_ALONE, SubstitutionRegion
from calipers.threats.substitutions import Substitutions


@dataclass(frozen=True, eq=False)
class Narrowed(Substitutions):
    """A part of a `Substitutions` threat.

    Which symbols may be put in is given for each point, by `options (N, G, K)` instead of
    `allowed`.
    """

    options: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def take(self, index: Tensor) -> Narrowed:
        """Return the threat for the chosen points."""
        return dataclasses.replace(
            super().take(index), options=self.options[index.to(self.options.device)]
        )  # type: ignore[return-value, call-arg]

    def region(self, x: Tensor, *, outward: bool = False) -> SubstitutionRegion:
        """Return the admissible set around each point of x (N, *D)."""
        whole, options = super().region(x, outward=outward), self.options.to(x.device)
        low, high = self._hull(x, options, whole.continuous)
        return dataclasses.replace(whole, options=options, low=low, high=high)


def divided(problem: Problem, group: int) -> Problem:
    """Return the parts of a problem of one point as points of a problem.

    In one part the group keeps its symbol; in each other part another symbol is put in. In every
    part the group is fixed and, where it changed, one substitution is used up: together the parts
    contain the same points, each of them once.
    """
    region, threat = problem.region, problem.threat
    assert isinstance(region, SubstitutionRegion)
    assert isinstance(threat, Substitutions)
    put_in = torch.nonzero(region.options[0, group]).flatten()
    moves = torch.cat([put_in.new_full((1,), -1), group * region.options.shape[2] + put_in])[
        :, None
    ]
    parts = problem.take(torch.zeros(len(moves), dtype=torch.long, device=moves.device))
    left = region.options.index_fill(
        1, torch.tensor(group, device=moves.device), value=False
    ).expand(len(moves), -1, -1)
    least = 0.0 if threat.continuous is None else NUMERIC_ALONE
    k = torch.where(moves[:, 0] < 0, region.radius, (region.radius - 1).clamp_min(least)).cpu()
    numeric = parts.threat.continuous if isinstance(parts.threat, Substitutions) else None
    narrowed = Narrowed(threat.groups, k, None, numeric, options=left)
    return dataclasses.replace(
        parts, x=region.substituted(torch.zeros_like(moves[:, 0]), moves), threat=narrowed
    )


def most_wanted(problem: Problem, points: Tensor) -> int | None:
    """Return the group of a one-point problem that most points would change.

    The points are (P, *D); None where no group can change.
    """
    region = problem.region
    if (
        not isinstance(region, SubstitutionRegion)
        or not bool(region.options.any())
        or int(region.budget[0]) < 1
    ):
        return None
    # 2 for a substitution, less for a fraction of one
    changed = (region.threat.read(points) - region.threat.read(region.center)).abs().sum(2).sum(0)
    return int(torch.where(region.options[0].any(1), changed, -1.0).argmax())
