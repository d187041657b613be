"""Branch and bound by dual ascent, before linear programs are solved.

Ascents on relaxation slopes and multipliers bound about a hundred branches in the time of one
linear program, so that programs are only solved for the branches that ascents do not close.

Branch and bound runs up to the radius, with the model rows' own relaxation as its root. A branch
whose bound has come near 0 has its nearest point near the radius; there ascents converge slowly and
a program is exact, so the branch is handed over, with the choices that its cuts amount to. What
stays open when the time is up is proved up to a smaller radius, with the same slopes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.bounds.dual_bound import Dual, Free, Root
from calipers.bounds.float64_check import confirmed
from calipers.bounds.interval import Box
from calipers.bounds.rounding import SEARCH
from calipers.certificates.alpha_crown import Start
from calipers.certificates.branch_search import BranchSearch, Effort
from calipers.certificates.exact.model import MIPModel
from calipers.certificates.subproblems import Branches, uncut
from calipers.problem.problem import Problem

_STEPS = 30  # steps of ascent for each branch: with a dozen, branches of deep networks stall
_SLICE = 0.3  # seconds between two checks of whether to go on
_TOGETHER = 256
# number of radii among which the largest that is proved is searched, denser towards the largest
_GRID = 64


class Until(NamedTuple):
    """When a search ends.

    At the time `ends` of the monotonic clock, or when `stop` says so.
    """

    ends: float = math.inf
    stop: Callable[[], bool] = lambda: False

    def reached(self) -> bool:
        """Return whether the search has to end."""
        return time.monotonic() >= self.ends or self.stop()


class Left(NamedTuple):
    """What ascents leave over.

    An example (1, *D) or None, and the branches that are not closed, as (case, choices made, radius
    up to which it is proved).
    """

    example: Tensor | None
    branches: list[tuple[int, dict[int, int], float]]
    rows: int


def ascended(
    problem: Problem,
    start: Start,
    model: MIPModel,
    target: float,
    until: Until,
    branches: list[tuple[int, dict[int, int]]] | None = None,
) -> Left:
    """Branch by dual ascent until every branch is closed or handed over.

    The search for the one point also ends when an example within the radius `target` is found, or
    at its end, `until`. `start` holds the point's relaxation over a
    region at least as large, from which `model` was made. Where `branches`, (case, choices made),
    are given, only these are searched. Cost: as many steps of ascent and one confirming row for
    each branch.
    """
    part = problem.at(target)
    root = _within(start, part, torch.tensor([target], dtype=torch.float64))
    begun = replace(start, root=root)
    lacking = begun.case_bounds[0].clamp(max=0.0).to(SEARCH.dtype)
    if root.region.norm.is_euclidean:
        # Hand over only branches with nothing left to split, whose nearest points are projections:
        # linear programs over Euclidean balls are slow.
        lacking = torch.zeros_like(lacking)
    search = BranchSearch(Effort(steps=_STEPS), part, begun, 0, lacking)
    if branches is not None:
        search.open = _cut(model, search, branches)
        search.enter(until.ends)
    found = search.found
    while found is None and len(search.open) and not search.full and not until.reached():
        found = search.grow(min(until.ends, time.monotonic() + _SLICE))
    left = search.left()
    if found is not None:
        return Left(found, [], search.rows)
    reach = _reach(problem, begun, left, target).tolist()
    return Left(
        None,
        [(*branch, r) for branch, r in zip(_choices(model, search.root, left), reach, strict=True)],
        search.rows,
    )


def _cut(
    model: MIPModel, search: BranchSearch, branches: list[tuple[int, dict[int, int]]]
) -> Branches:
    """Return branches whose cuts leave what their options allow.

    Choices of windows are no cuts; for them everything is left.
    """
    place = {case: p for p, case in enumerate(search.open.case.tolist())}
    found = search.open.take(
        torch.tensor(
            [place[case] for case, _ in branches], dtype=torch.long, device=search.open.case.device
        )
    )
    cuts = {k: Box(box.lower.clone(), box.upper.clone()) for k, box in found.cuts.items()}
    column = {
        number: {e: c for c, e in enumerate(search.root.columns[number].place[0].tolist())}
        for number in cuts
    }
    for p, (_, made) in enumerate(branches):
        for choice, which in made.items():
            members, option = model.choices[choice].members, model.choices[choice].options[which]
            number, element = model.sources[members[0]]
            if len(members) == 1 and element in column.get(number, {}):
                at = column[number][element]
                # Two functions of one value may each have a choice made: keep what both allow.
                cuts[number].lower[p, at] = max(float(cuts[number].lower[p, at]), option.low)
                cuts[number].upper[p, at] = min(float(cuts[number].upper[p, at]), option.high)
    return replace(found, cuts=cuts)


def _within(start: Start, problem: Problem, radii: Tensor) -> Root:
    """Return the point's root over smaller regions, one for each radius (R,).

    What holds over the larger region holds over the smaller ones.
    """
    assert start.root is not None
    state = start.root.state.take(
        torch.zeros(len(radii), dtype=torch.long, device=problem.x.device)
    )
    part = problem.take([0] * len(radii)).at(radii)
    return Root.of(
        replace(state, region=state.region.at(radii)),
        SEARCH.dtype,
        part.threat.region(part.x.to(SEARCH.dtype)),
    )


def _reach(problem: Problem, start: Start, branches: Branches, target: float) -> Tensor:
    """Return for each branch a radius up to which it is proved, (P,).

    It is proved by the branch's own slopes and multipliers, or by those of its case at the root.
    """
    radii = target * (1 - torch.linspace(1, 0, _GRID + 1, dtype=torch.float64).square())
    root = _within(start, problem, radii)
    assert start.pending is not None
    rows, case, free = start.pending
    at_root = torch.zeros(len(start.case_bounds[0]), dtype=torch.float64).index_put(
        (case,), radii[_largest(start, root, case, free, uncut(root, rows))]
    )
    own = [
        _largest(start, root, b.case, b.free, b.cuts)
        for b in map(branches.take, torch.arange(len(branches)).split(_TOGETHER))
    ]
    return torch.maximum(radii[torch.cat(own)], at_root[branches.case]) if own else at_root[:0]


def _largest(start: Start, root: Root, case: Tensor, free: Free, cuts: dict[int, Box]) -> Tensor:
    """Return for each branch the largest of the root's radii proved, (P,).

    The result is the place of the radius among the root's, found by bisection; 0 if none is proved.
    """
    low, high = torch.zeros_like(case), torch.full_like(case, _GRID)
    spec, offsets = start.directions(torch.zeros_like(case), case)
    while bool((high > low).any()):
        middle = (low + high + 1) // 2
        dual = Dual(
            root,
            middle,
            len(root.graph.nodes),
            spec.to(SEARCH.dtype),
            offsets.to(SEARCH.dtype),
            cuts,
        )
        good = confirmed(dual, free, spec, offsets) > 0
        low, high = torch.where(good, middle, low), torch.where(good, high, middle - 1)
    return low


def _choices(model: MIPModel, root: Root, branches: Branches) -> list[tuple[int, dict[int, int]]]:
    """Return for each branch its case and the options its cuts imply.

    An option is taken where it contains everything that the branch's cuts leave; cuts that are
    inside no option are dropped, which makes the branch larger.
    """
    made: list[dict[int, int]] = [{} for _ in range(len(branches))]
    column = {
        number: {e: c for c, e in enumerate(columns.place[0].tolist())}
        for number, columns in root.columns.items()
        if number in branches.cuts
    }
    lows, highs = (
        {k: getattr(box, end).double().cpu().numpy() for k, box in branches.cuts.items()}
        for end in ("lower", "upper")
    )
    for place, choice in enumerate(model.choices):
        number, element = model.sources[choice.members[0]]
        if len(choice.members) > 1 or element not in column.get(number, {}):
            continue
        at = column[number][element]
        low, high = lows[number][:, at], highs[number][:, at]
        for which, option in enumerate(choice.options):
            # The first and the last option have no limit of their own on the outside.
            inside = ((low >= option.low) | (which == 0)) & (
                (high <= option.high) | (which == len(choice.options) - 1)
            )
            for p in (
                (inside & ((low > -float("inf")) | (high < float("inf")))).nonzero()[0].tolist()
            ):
                made[p][place] = which
    return list(zip(branches.case.tolist(), made, strict=True))
