"""Nearest adversarial examples of affine maps under joint conditions.

For goals where several margins must fall at once, and for balls cut by constraints. Cases are
solved one by one, the nearest first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calipers.bounds.backward import margin_bounds, relax
from calipers.bounds.rounding import Arithmetic, plain_sums
from calipers.certificates.guaranteed import posed
from calipers.certificates.polyhedra import Weighed, nearest, uncut
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.threats.constraints import ConstrainedRegion
from calipers.threats.region import Region, distance_to


@dataclass(frozen=True, eq=False)
class Joint:
    """The nearest adversarial examples of affine maps, with their duals.

    The maps are `margins (N, S)` + `rows (N, S, d)` delta over regions; the multipliers prove that
    nothing is nearer.

    `distance (N,)` is the distance of the half-space that the multipliers make of the nearest case,
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
        # All margins of a case have to fall to 0, so the distance of each of its half-spaces is a
        # lower bound on the distance of the case.
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
        """Solve the cases of one point until the next cannot be nearer.

        They are ordered by the distance of their farthest single half-space, a lower bound on their
        own.
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
        """Return the distance of the half-space made of a case.

        It is the combination of the case's margins and the constraints by their multipliers.
        """
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
        """Return the rows and ends of a case's polyhedron.

        Margins of the case at most minus `beyond`, and the constraints.
        """
        matrix, ends = self.rows[i, mine], -self.margins[i, mine] - beyond
        if isinstance(self.region, ConstrainedRegion):
            a, b = self.region.cut
            matrix, ends = (
                torch.cat([matrix, a]),
                torch.cat([ends, (b - a @ self.region.center[i].flatten()).clamp_min(0)]),
            )
        return matrix, ends

    def _solved(self, i: int, mine: Tensor, beyond: float) -> tuple[Tensor, Tensor] | None:
        """Return the nearest offset of a case, and its multipliers.

        They are scaled so that those of the case's margins add up to 1. None where there is no
        solution.
        """
        found = nearest(
            self.region.take(torch.tensor([i], device=self.rows.device)),
            *self._polyhedron(i, mine, beyond),
        )
        total = 0.0 if found is None else float(found.multipliers[: len(mine)].sum())
        return None if found is None or not total > 0 else (found.delta, found.multipliers / total)

    def offsets(self, places: Tensor, beyond: Tensor, most: Tensor) -> Tensor:
        """Return offsets (P, d) to examples beyond the decision boundary.

        Their deciding margins are at most minus `beyond (P,)`; `most (P,)` is the largest `beyond`
        that will be asked for.

        The offset lies between the nearest one at 0 and the nearest one at `most`: what lies there
        satisfies all rows, and is hardly longer than the nearest.
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
        """Return the nearest offset of one point's nearest case, or zeros.

        Zeros where there is none.
        """
        if (i, beyond) not in self.found:
            found = self._solved(i, torch.nonzero(self.cases == self.first[i]).flatten(), beyond)
            self.found[i, beyond] = torch.zeros_like(self.rows[i, 0]) if found is None else found[0]
        return self.found[i, beyond]

    def worst(self, problem: Problem, places: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Return proved lower bounds (P,) of a problem's worst margins.

        At the problem's own radii; its points are those at `places`. For each case it is the bound
        of the combined margin, which is no larger than the largest of the case's margins.
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
                # The weights are taken as exact, whatever their sum; the rounding of their products
                # with the rows is at most gamma times the sum of all terms' magnitudes.
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
