"""How near is the nearest example of an affine map where several margins must fall at once, or
constraints cut the ball? Case by case, the nearest first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calipers.bounds.linear import margin_bounds, relax
from calipers.bounds.rounding import Arithmetic, plain_sums
from calipers.certificates.guaranteed import posed
from calipers.certificates.polyhedra import Weighed, nearest, uncut
from calipers.problem.constrained import ConstrainedRegion
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.region import Region, distance_to


@dataclass(frozen=True, eq=False)
class Joint:
    """The nearest examples of affine maps `margins (N, S)` + `rows (N, S, d)` delta over regions,
    and multipliers that prove them so.

    `distance (N,)` is that of the half-space which the multipliers make of the nearest case,
    infinite without an example, 0 where none was looked for; `first (N,)` is that case. `weights
    (N, S)` combine the margins of each case, `multipliers (N, C, m)` the constraints.
    """

    region: Region
    rows: Tensor
    margins: Tensor
    cases: Tensor
    distance: Tensor
    first: Tensor
    weights: Tensor
    multipliers: Tensor
    found: dict[tuple[int, float], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, problem: Problem, region: Region, rows: Tensor, margins: Tensor, wanted: Tensor
    ) -> Joint:
        """Look for the nearest examples of the points `wanted (N,)`."""
        n, count = margins.shape
        cases = problem.goal.cases(problem.classes).to(margins.device)
        point = torch.arange(n, device=rows.device).repeat_interleave(count)
        # No margin of a case may stay above 0, so the farthest of its half-spaces is no farther
        # than the case.
        alone = distance_to(
            uncut(region.take(point)), -rows.flatten(0, 1), margins.flatten().clamp_min(0)
        ).distance.view(n, count)
        constraints = (
            region.cut[1] if isinstance(region, ConstrainedRegion) else margins.new_zeros(0)
        )
        most, distance = (
            int(cases.max()) + 1,
            torch.zeros(n, dtype=torch.float64, device=rows.device),
        )
        held = cls(
            region,
            rows,
            margins,
            cases,
            distance,
            torch.zeros_like(point[:n]),
            torch.zeros_like(margins),
            margins.new_zeros(n, most, len(constraints)),
        )
        for i in torch.nonzero(wanted).flatten().tolist():
            give_way()
            held._look(i, alone[i])
        return held

    def _look(self, i: int, alone: Tensor) -> None:
        """Solve the cases of one point, the one of the farthest single half-space last, until the
        next cannot be nearer.
        """
        farthest = [
            (float(alone[self.cases == c].max()), c) for c in range(self.multipliers.shape[1])
        ]
        best, place, known = torch.inf, -1, True
        for floor, case in sorted(farthest):
            mine = torch.nonzero(self.cases == case).flatten()
            self.weights[i, mine[alone[mine].argmax()]] = 1.0
            if floor >= best:
                continue
            found = self._solved(i, mine, 0.0)
            if found is None:
                known = False
                continue
            self.weights[i, mine], self.multipliers[i, case] = (
                found[1][: len(mine)],
                found[1][len(mine) :],
            )
            length = self._length(i, mine, case)
            if length < best:
                best, place = length, case
                self.found[i, 0.0] = found[0]
        self.distance[i], self.first[i] = (best if known else 0.0), max(place, 0)

    def _length(self, i: int, mine: Tensor, case: int) -> float:
        """Return how far the half-space is that the multipliers make of a case."""
        weights, multipliers = self.weights[i, mine], self.multipliers[i, case]
        matrix, ends = self._polyhedron(i, mine, 0.0)
        both = torch.cat([weights, multipliers])
        one = torch.tensor([i], device=matrix.device)
        return float(
            distance_to(
                uncut(self.region.take(one)), -(both @ matrix)[None], -(both @ ends)[None]
            ).distance[0]
        )

    def _polyhedron(self, i: int, mine: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
        """Return rows and ends: margins of a case at most minus `beyond`, and the constraints."""
        matrix, ends = self.rows[i, mine], -self.margins[i, mine] - beyond
        if isinstance(self.region, ConstrainedRegion):
            a, b = self.region.cut
            matrix, ends = (
                torch.cat([matrix, a]),
                torch.cat([ends, (b - a @ self.region.center[i].flatten()).clamp_min(0)]),
            )
        return matrix, ends

    def _solved(self, i: int, mine: Tensor, beyond: float) -> tuple[Tensor, Tensor] | None:
        """Return the nearest offset of a case, and multipliers of which those of its margins add up
        to 1.
        """
        found = nearest(
            self.region.take(torch.tensor([i], device=self.rows.device)),
            *self._polyhedron(i, mine, beyond),
        )
        total = 0.0 if found is None else float(found.multipliers[: len(mine)].sum())
        return None if found is None or not total > 0 else (found.delta, found.multipliers / total)

    def offsets(self, places: Tensor, beyond: Tensor, most: Tensor) -> Tensor:
        """Return the offsets (P, d) to the nearest examples whose deciding margins are at most
        minus `beyond (P,)`, of which `most (P,)` will be asked.

        Between the nearest at 0 and the nearest at `most`: what lies there keeps all rows, and is
        hardly longer than the nearest.
        """
        near, far = (
            torch.stack(
                [self._nearest(i, end) for i, end in zip(places.tolist(), ends, strict=True)]
            )
            for ends in ([0.0] * len(most), most.tolist())
        )
        return near + (beyond / most.clamp_min(torch.finfo(most.dtype).tiny))[:, None] * (
            far - near
        )

    def _nearest(self, i: int, beyond: float) -> Tensor:
        """Return the nearest offset of the nearest case of one point; none where there is none."""
        if (i, beyond) not in self.found:
            found = self._solved(i, torch.nonzero(self.cases == self.first[i]).flatten(), beyond)
            self.found[i, beyond] = torch.zeros_like(self.rows[i, 0]) if found is None else found[0]
        return self.found[i, beyond]

    def worst(self, problem: Problem, places: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Return a proved lower bound (P,) of the worst margin of a problem at its own radii, whose
        points are those at `places`: for each case the bound of its combined margin, which is no
        larger than the largest of them.
        """
        graph, region = posed(problem, arithmetic)
        bounds = []
        with plain_sums():
            state = relax(graph, uncut(region), arithmetic)
            offsets = problem.goal.offsets(problem.y, problem.classes).to(region.center)
            spec = problem.goal.rows(problem.y, problem.classes).to(region.center)
            logits = state.boxes[len(graph.nodes)].magnitude.flatten(1)
            for case in range(self.multipliers.shape[1]):
                weights = torch.where(self.cases == case, self.weights[places], 0.0).to(spec)
                row, size = ((weights[:, None] @ t)[:, 0] for t in (spec, spec.abs()))
                shift, terms = (weights * offsets).sum(1), (weights * offsets.abs()).sum(1)
                if isinstance(region, ConstrainedRegion):
                    state = replace(
                        state, region=Weighed.of(region, self.multipliers[places, case].to(spec))
                    )
                bound = margin_bounds(state, row[:, None])[:, 0]
                # Weights are exact numbers of whatever sum; what their products with the rows lost
                # is at most that share of all terms.
                lost = arithmetic.gamma(spec.shape[1]) * (
                    (size * logits).sum(1) + terms + bound.abs()
                )
                bounds.append(
                    ((bound + shift - lost) / weights.sum(1).clamp_min(1)).nan_to_num(
                        nan=-torch.inf
                    )
                )
        worst = torch.stack(bounds, 1).amin(1)
        return torch.nextafter(worst, torch.full_like(worst, -torch.inf))
