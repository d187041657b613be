"""Distances to polyhedra, proved by multipliers.

For multipliers lambda >= 0 every point with A delta <= b also satisfies <lambda A, delta> <=
<lambda, b>: one half-space, whose distance is the root of a function of one number (`distance_to`).
The best multipliers make it the distance of the polyhedron (strong duality); bad ones make it
smaller, never wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from calipers.certificates.exact.model import Floats
from calipers.certificates.exact.projection import projected
from calipers.threats.constraints import ConstrainedRegion
from calipers.threats.region import Region

_TIGHT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
_MET = 1e-7  # of a row's scale: a point that violates a row by more is not in the polyhedron
_ENDLESS = 1e150  # larger than any squared distance


class ShortestOffset(NamedTuple):
    """The shortest offset (d,) in a polyhedron, and its multipliers (k,).

    One multiplier for each row; both in float64.
    """

    delta: Tensor
    multipliers: Tensor


def nearest(region: Region, rows: Tensor, ends: Tensor) -> ShortestOffset | None:
    """Return the shortest offset of one region in a polyhedron.

    The polyhedron is rows (k, d) @ delta <= ends (k,) inside the region's box; None where it is
    empty, or no point was found.

    Shortest in the region's norm, linf, l2 or l1. Cost: a linear program of d or 2 d columns, or
    for l2 some dozens of products (k, d) (d, k).
    """
    a, b = rows.double().cpu().numpy(), ends.double().cpu().numpy()
    scale = np.abs(a).max(1)
    scale = np.where(scale > 0, scale, 1.0)
    a, b = a / scale[:, None], b / scale
    low, high = (end[0].double().cpu().numpy() for end in (region.low, region.high))
    weight = np.ones_like(low) if region.weight is None else region.weight.double().cpu().numpy()
    if region.norm.is_euclidean:
        with np.errstate(all="ignore"):
            found = projected(a, b, weight**2, low, high, _ENDLESS)
    else:
        found = _programmed(a, b, weight, low, high, sparse_norm=region.norm.is_sparse)
    if found is None or bool((a @ found[0] - b > _MET * (1 + np.abs(b))).any()):
        return None
    delta, multipliers = (
        torch.from_numpy(v).to(rows.device, torch.float64)
        for v in (found[0], np.maximum(found[1] / scale, 0.0))
    )
    return ShortestOffset(delta, multipliers)


def _programmed(
    a: Floats, b: Floats, weight: Floats, low: Floats, high: Floats, *, sparse_norm: bool
) -> tuple[Floats, Floats] | None:
    """Return the shortest offset and multipliers by a linear program.

    For l1 over rises and falls, whose weighted sum is the cost; for linf with one bound on all
    changes.
    """
    from scipy.optimize import linprog

    d = len(low)
    if sparse_norm:
        cost, bounds = (
            np.concatenate([weight, weight]),
            np.stack([np.zeros(2 * d), np.concatenate([high, -low])], 1),
        )
        rows, ends = np.concatenate([a, -a], 1), b
    else:
        side, column = sparse.diags(weight), -np.ones((d, 1))
        cost, bounds = (
            np.append(np.zeros(d), 1.0),
            np.stack([np.append(low, 0.0), np.append(high, np.inf)], 1),
        )
        rows = sparse.vstack(
            [
                sparse.hstack([sparse.csr_matrix(a), np.zeros((len(a), 1))]),
                sparse.hstack([side, column]),
                sparse.hstack([-side, column]),
            ]
        )
        ends = np.concatenate([b, np.zeros(2 * d)])
    solved: Any = linprog(cost, A_ub=rows, b_ub=ends, bounds=bounds, method="highs", options=_TIGHT)
    if solved.status != 0:
        return None
    delta = solved.x[:d] - solved.x[d:] if sparse_norm else solved.x[:d]
    return np.clip(delta, low, high), -solved.ineqlin.marginals[: len(b)]


@dataclass(frozen=True, eq=False)
class Weighed(ConstrainedRegion):
    """Constrained regions whose multipliers (M, m) are known.

    For bounds along one direction for each region.
    """

    multipliers: Tensor

    @classmethod
    def of(cls, region: ConstrainedRegion, multipliers: Tensor) -> Weighed:
        """Return the regions with these multipliers."""
        held = (
            region.ball,
            region.norm,
            region.center,
            region.radius,
            region.low,
            region.high,
            region.weight,
        )
        return cls(*held, multipliers)

    def take(self, index: Tensor | slice) -> Weighed:
        """Return the regions of the chosen points, repetitions allowed."""
        return replace(super().take(index), multipliers=self.multipliers[index])  # type: ignore[return-value, call-arg]

    def _multipliers(self, a: Tensor, points: Tensor) -> Tensor:
        return self.multipliers[points][:, None].expand(-1, a.shape[1], -1)


def uncut(region: Region) -> Region:
    """Return the regions without their constraints."""
    return Region(
        region.ball,
        region.norm,
        region.center,
        region.radius,
        region.low,
        region.high,
        region.weight,
    )
