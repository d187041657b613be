"""Which branches are worth a linear program? Those that ascents on slopes and multipliers do not close: these bound a hundred in the time of one program.

Branch and bound up to the radius, with the rows' own relaxation as its root. A branch whose bound has come near 0 has its nearest point near the radius;
there ascents are slow and a program is exact, so it is handed over, with the choices that its cuts amount to. What stays open when the time is up is proved
up to a smaller radius, by the same slopes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.bounds.confirm import confirmed
from calipers.bounds.dual import Dual, Root
from calipers.bounds.rounding import SEARCH
from calipers.certificates.alpha import Start
from calipers.certificates.branch_search import Effort, Search
from calipers.certificates.branches import Branches
from calipers.certificates.milp_model import Model
from calipers.problem.problem import Problem

_STEPS = 30  # of ascent for each branch: with a dozen, branches of deep networks stall
_SLICE = 0.3  # seconds between two looks at whether to go on
_TOGETHER = 256
_GRID, _ROUNDS = 8, 2  # radii looked at in each round, for the largest that is proved


class Left(NamedTuple):
    """What ascents leave: an example (1, *D) or None, the branches not closed, as (case, choices made), and the radius up to which all of them are proved."""

    example: Tensor | None
    branches: list[tuple[int, dict[int, int]]]
    proved: float
    rows: int


def ascended(problem: Problem, start: Start, model: Model, target: float, ends: float, stop: Callable[[], bool] = lambda: False) -> Left:
    """Branch by ascents until every branch of the one point is closed within the radius `target` or handed over, an example is met, the time `ends` has come or
    `stop` says so.

    `start` holds the point's relaxation over a region at least as large, of which `model` was made. Cost: as many steps and one confirming row a branch.
    """
    part = problem.at(target)
    root = _within(start, part, target)
    begun = replace(start, root=root)
    lacking = begun.case_bounds[0].clamp(max=0.0).to(SEARCH.dtype)
    if root.region.norm.is_euclidean:
        lacking = torch.zeros_like(lacking)  # only pieces, whose nearest points are projections: programs over round balls are slow
    search = Search(Effort(steps=_STEPS), part, begun, 0, lacking)
    found = None
    while found is None and len(search.open) and not search.full and time.monotonic() < ends and not stop():
        found = search.grow(min(ends, time.monotonic() + _SLICE))
    left = search.left()
    proved = 0.0 if found is not None else _reach(problem, begun, left, target)
    return Left(found, _choices(model, search.root, left), proved, search.rows)


def _within(start: Start, problem: Problem, radius: float) -> Root:
    """Return the point's root over a smaller region: what holds over the larger one holds there."""
    assert start.root is not None
    state = start.root.state
    region = state.region.at(torch.full_like(state.region.radius, radius))
    return Root.of(replace(state, region=region), SEARCH.dtype, problem.threat.region(problem.x.to(SEARCH.dtype)))


def _reach(problem: Problem, start: Start, branches: Branches, target: float) -> float:
    """Return a radius up to which all these branches are proved, by the slopes and multipliers that they have."""
    low, high = 0.0, target
    branches = branches.take(branches.bound.argsort())  # the lowest show first that a radius is too large
    spec, offsets = start.directions(torch.zeros_like(branches.case), branches.case)
    for _ in range(_ROUNDS if len(branches) else 0):
        step = (high - low) / _GRID
        for radius in (high - step * n for n in range(1, _GRID)):
            root = _within(start, problem.at(radius), radius)
            dual = Dual(root, branches.rows, len(root.graph.nodes), spec.to(SEARCH.dtype), offsets.to(SEARCH.dtype), branches.cuts)
            parts = torch.arange(len(branches)).split(_TOGETHER)
            if all(bool((confirmed(dual.take(p), branches.free.take(p), spec[p], offsets[p]) > 0).all()) for p in parts):
                low, high = radius, radius + step
                break
        else:
            high = low + step
    return low if len(branches) else target


def _choices(model: Model, root: Root, branches: Branches) -> list[tuple[int, dict[int, int]]]:
    """Return for each branch its case and the options that hold all of what its cuts leave; cuts that no option holds are forgotten."""
    made: list[dict[int, int]] = [{} for _ in range(len(branches))]
    column = {number: {e: c for c, e in enumerate(columns.place[0].tolist())} for number, columns in root.columns.items() if number in branches.cuts}
    lows, highs = ({k: getattr(box, end).double().cpu().numpy() for k, box in branches.cuts.items()} for end in ("lower", "upper"))
    for place, choice in enumerate(model.choices):
        number, element = model.sources[choice.members[0]]
        if len(choice.members) > 1 or element not in column.get(number, {}):
            continue
        at = column[number][element]
        low, high = lows[number][:, at], highs[number][:, at]
        for which, option in enumerate(choice.options):
            # The outer options end where the value does.
            inside = ((low >= option.low) | (which == 0)) & ((high <= option.high) | (which == len(choice.options) - 1))
            for p in (inside & ((low > -float("inf")) | (high < float("inf")))).nonzero()[0].tolist():
                made[p][place] = which
    return list(zip(branches.case.tolist(), made, strict=True))
