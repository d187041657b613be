"""Exact distances within the linear region of the point.

Where no operation leaves its linear piece within the ball every margin is affine, m + <a, delta>.
The most that it falls within radius r, over ball, box, mask and weights, is a known piecewise
function rising with r; the root of fall(r) = m is the distance, gap / dual norm where nothing but
the ball limits the adversary, and the minimiser there is the nearest adversarial example (Hein and
Andriushchenko 2017; Croce, Andriushchenko and Hein 2019). Where several margins must fall at once,
or constraints cut the ball, the nearest point of a polyhedron takes the place of the root
(polyhedra.py). No search is needed.

The map is that of the point itself, and only a guess: what is claimed is bounded again in checked
float64 over the whole ball, and what is found is evaluated by the model. Points whose nearest
example in the map lies beyond a breakpoint are left to searches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from calipers.bounds.backward import margin_lines, relax
from calipers.bounds.rounding import Arithmetic, Guarantee, arithmetic_of, plain_sums
from calipers.certificates.crown import Bounder, batches, written
from calipers.certificates.guaranteed import posed
from calipers.certificates.joint import Joint
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.graph.kinds import is_affine
from calipers.problem.capabilities import Capabilities
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.threats.constraints import ConstrainedRegion
from calipers.threats.region import Region, distance_to

_EXACT = Arithmetic(torch.float64, checked=False)
_SEVERAL = 16  # smallest margins considered where the network is not affine; the proof is about all
_HELD_BYTES = 2**28  # of the rows of an affine network's margins
# share of the distance at which to prove: there the margin usually exceeds its bound's rounding
_BELOW = 1 - 1e-9
_TRIES = (
    4  # radii; each next one is where the last bound, short by rounding, would have been positive
)
# multiples of the model's own rounding by which margins are pushed below 0, until the model is
# fooled in any order of summation
_BEYOND = 0.0, *(2.0**k for k in range(-12, 3))
# multiples of the margin, in case a solver stopped so much short
_FARTHER = tuple(10.0**k for k in range(-9, -3))


@dataclass(frozen=True)
class LinearRegion:
    """Exact distance of points whose nearest example is in their region.

    The linear region of the point: on affine models (logistic regression, networks without
    activations) every point that has an adversarial example in its box; elsewhere the points within
    whose distance no operation leaves its linear piece, or where bounds are tight all the same. The
    example comes with the claim. Nothing is claimed about all other points. Any box, mask, weights,
    constraints and goal; the problem's radii play no part. Hein and Andriushchenko (2017); Croce,
    Andriushchenko and Hein (2019).

    Cost: a row of backward propagation for each margin (at most 16 unless the network is affine),
    and the certifier's at up to 4 radii, for points whose example is still in their region.

    Args:
        certifier: The certifier that proves the radius, such as `CROWN()`; the guarantee is its
            own.
        proofs: Let the certifier write its proof files, where it can. Where several margins must
            fall at once there is one only if the certifier alone proves the radius, and under
            constraints none.

    Raises:
        UnsupportedOp: At the call, for a model with an operation that cannot be bounded.
        CaptureError: At the call, for a model that cannot be traced.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "exact distance",
        "where no operation leaves its piece within the distance",
        inner=("certifier",),
        needs="operations",
    )

    certifier: Bounder
    proofs: bool = field(default=False, repr=False)

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim | Attempt]:
        """Yield examples, and a claim about every point."""
        graph = graph_of(problem.classifier, problem.x)
        for index in batches(problem):
            give_way()
            if is_piecewise_linear(graph):
                yield from self._answers(problem.take(index), index)
            else:
                yield _claim(index, self.certifier.guarantee)

    def _answers(self, problem: Problem, index: Tensor) -> Iterator[Claim | Attempt]:
        with torch.no_grad(), plain_sums():
            guess = Guess.at(problem)
            claim, left = _claim(index, self.certifier.guarantee), guess.is_piecewise_linear()
            claim.backwards.add_(guess.rows.shape[1])
            attempts = examples(guess, left[guess.distance[left].isfinite()])
            claim = self._proved(guess, left, claim)
        for attempt in attempts:
            yield Attempt(
                index[attempt.index], attempt.candidate, attempt.forwards, attempt.backwards
            )
        yield claim

    def _proved(self, guess: Guess, left: Tensor, claim: Claim) -> Claim:
        """Claim for each point of `left` the largest radius that is proved.

        Of a few radii, the first just below the guess.
        """
        certifier: Any = self.certifier
        if self.proofs and hasattr(certifier, "proofs"):
            certifier = replace(certifier, proofs=True)
        problem, arithmetic, files = guess.problem, arithmetic_of(self.certifier.guarantee), None
        wide = problem.threat.widest(problem.x).to(guess.distance)
        asked = torch.minimum(guess.distance * _BELOW, wide)
        for _ in range(_TRIES):
            radius = problem.threat.least(asked)
            left = left[(radius[left] > 0) & radius[left].isfinite()]
            if not len(left):
                break
            part = problem.take(left).at(radius[left])
            if guess.joint is None or (
                self.proofs and not isinstance(part.region, ConstrainedRegion)
            ):
                bound = certifier.bound(part, arithmetic)
                worst, new = (
                    bound.worst,
                    written(bound.prove, bound.worst > 0, left, len(claim.index)),
                )
                claim.backwards[left] += bound.rows
            else:
                worst, new = torch.full_like(radius[left], -torch.inf), None
            if guess.joint is not None:
                worst = torch.maximum(worst, guess.joint.worst(part, left, arithmetic))
            proved = worst > 0
            claim.radius[left[proved]], claim.margin[left] = radius[left[proved]], worst
            files = (
                files
                if new is None
                else tuple(a or b for a, b in zip(files or (None,) * len(new), new, strict=True))
            )
            # The margin falls from its clean value to 0 over the distance, or faster: where the
            # bound falls short by rounding, a slightly smaller radius is enough.
            short = (-2 * worst / guess.clean[left]).clamp(0, 1)
            asked, left = asked.index_copy(0, left, asked[left] * (1 - short)), left[~proved]
        return Claim(
            claim.index,
            claim.radius,
            claim.margin,
            claim.guarantee,
            claim.forwards,
            claim.backwards,
            files,
        )


def is_piecewise_linear(graph: Graph) -> bool:
    """Return whether the network is piecewise linear."""
    return all(
        op.affine or op.breakpoints is not None or op.members() is not None
        for op in (node.op for node in graph.nodes)
    )


def _claim(index: Tensor, guarantee: Guarantee) -> Claim:
    """Return a claim of nothing."""
    radius, none = (
        torch.zeros(len(index), dtype=torch.float64, device=index.device),
        torch.zeros_like(index),
    )
    return Claim(index, radius, torch.full_like(radius, -torch.inf), guarantee, none, none.clone())


Solve = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The offsets (P, d) of the nearest examples of chosen points (P,), the margins that decide there
being at most minus `beyond (P,)`, or up to `most (P,)`.
"""


@dataclass(frozen=True, eq=False)
class Guess:
    """The affine maps at N points and their distances to the boundary.

    As if the maps held everywhere; in float64.

    `distance (N,)` is infinite where there is no example, 0 where the point is wrong or nothing was
    found; `clean (N,)` is the worst margin at the point. `rows (N, S, d)` are the gradients of the
    margins considered; `joint` is set where several margins decide together.
    """

    problem: Problem
    graph: Graph
    rows: Tensor
    clean: Tensor
    distance: Tensor
    delta: Solve
    joint: Joint | None = None

    @classmethod
    def at(cls, problem: Problem) -> Guess:
        """Return the affine maps at the points.

        A relaxation over the point alone is the network's affine map there.
        """
        graph, region = posed(problem, _EXACT)
        margins = problem.margins(graph.values(region.center)[-1])
        chosen = _smallest(margins, graph, region)
        state = relax(graph, region.at(torch.zeros_like(region.radius)), _EXACT, refine=False)
        spec = problem.goal.rows(problem.y, problem.classes).to(margins)
        spec = spec.gather(1, chosen[:, :, None].expand(-1, -1, spec.shape[2]))
        rows, clean, held = (
            margin_lines(state, spec).flatten(2),
            problem.goal.worst(margins),
            margins.gather(1, chosen),
        )
        cases = problem.goal.cases(problem.classes).to(chosen.device)
        alone = bool((torch.bincount(cases, minlength=1) == 1).all())
        if alone and not isinstance(region, ConstrainedRegion):
            distance, delta = _roots(region, rows, held)
            return cls(problem, graph, rows, clean, torch.where(clean > 0, distance, 0.0), delta)
        if rows.shape[1] < margins.shape[1] or region.norm.is_count:
            return cls(
                problem,
                graph,
                rows,
                clean,
                torch.zeros_like(clean),
                lambda places, beyond, most: rows[places, 0] * 0,
            )
        joint = Joint.of(problem, region, rows, held, clean > 0)
        return cls(
            problem,
            graph,
            rows,
            clean,
            torch.where(clean > 0, joint.distance, 0.0),
            joint.offsets,
            joint,
        )

    def is_piecewise_linear(self) -> Tensor:
        """Return the points (P,) whose nearest example is in their region.

        They have a distance, and at their nearest example every operation is still on its linear
        piece.
        """
        good = (self.clean > 0) & (self.distance > 0)
        if all(is_affine(node.op) for node in self.graph.nodes):
            return torch.nonzero(good).flatten()
        places = torch.nonzero(good & self.distance.isfinite()).flatten()
        if not len(places):
            return places
        x = self.problem.x[places].double()
        none = torch.zeros_like(self.clean[places])
        there = x + self.delta(places, none, none).view_as(x)
        near, far = self.graph.values(x), self.graph.values(there)
        still = torch.ones_like(places, dtype=torch.bool)
        for node in self.graph.nodes:
            if not is_affine(node.op):
                ends = near[node.inputs[0]], far[node.inputs[0]]
                still &= ~node.op.unstable(torch.minimum(*ends), torch.maximum(*ends)).flatten(
                    1
                ).any(1)
        return places[still]


def _smallest(margins: Tensor, graph: Graph, region: Region) -> Tensor:
    """Return the places (N, S) of the smallest margins, in order.

    As many as are considered.
    """
    most = _SEVERAL
    if all(is_affine(node.op) for node in graph.nodes):
        most = max(1, _HELD_BYTES // (8 * max(1, region.low.numel())))
    return margins.topk(min(most, margins.shape[1]), dim=1, largest=False).indices.sort(1).values


def _roots(region: Region, rows: Tensor, margins: Tensor) -> tuple[Tensor, Solve]:
    """Return the distance (N,) at which the first margin falls to 0.

    With it the function that gives the offsets to such points.
    """
    n, count = margins.shape
    point = torch.arange(n, device=rows.device).repeat_interleave(count)
    each = distance_to(
        region.take(point), -rows.flatten(0, 1), margins.flatten().clamp_min(0)
    ).distance.view(n, count)
    distance, first = each.min(1)

    def offsets(places: Tensor, beyond: Tensor, most: Tensor) -> Tensor:
        gap = margins[places, first[places]] + beyond
        return distance_to(region.take(places), -rows[places, first[places]], gap).delta

    return distance, offsets


def examples(guess: Guess, places: Tensor) -> list[Attempt]:
    """Return the nearest points at which the model itself is fooled.

    Separately, also the nearest points that are adversarial in every order of summation.
    """
    if not len(places):
        return []
    problem = guess.problem.take(places)
    rounding = problem.allowance(problem.classifier.logits64(problem.x), problem.size)
    steps = [
        unit[:, None] * unit.new_tensor(shares)
        for unit, shares in ((rounding, _BEYOND), (guess.clean[places], _FARTHER))
    ]
    beyond = torch.cat(steps, 1).sort(1).values
    found, sure = problem.x.clone(), problem.x.clone()
    open_, doubtful = (
        torch.ones_like(places, dtype=torch.bool),
        torch.ones_like(places, dtype=torch.bool),
    )
    for k in range(beyond.shape[1]):
        give_way()
        left = torch.nonzero(open_ | doubtful).flatten()
        if not len(left):
            break
        part = problem.take(left)
        point = (
            part.x.double()
            + guess.delta(places[left], beyond[left, k], beyond[left, -1]).view_as(part.x)
        ).to(part.x.dtype)
        inside = part.at(part.region.distance(point)).region.snap(point)
        fooled, certain = part.fooled(inside)[0], part.clearance(inside) <= 0
        first, last = open_[left] & fooled, doubtful[left] & certain
        found[left[first]], sure[left[last]] = inside[first], inside[last]
        open_[left[fooled]], doubtful[left[certain]] = False, False
    attempts = []
    for points, missing in ((found, open_), (sure, doubtful)):
        there = torch.nonzero(~missing).flatten()
        if len(there):
            spent = torch.full_like(there, beyond.shape[1])
            attempts.append(Attempt(places[there], points[there], spent, torch.zeros_like(spent)))
    return attempts
