"""Proofs of measured linear regions, by checked bound propagation.

A distance that was computed is confirmed by backward bound propagation in checked float64, or a
smaller one is claimed.

Where no operation can leave its linear piece, the relaxation's linear bounds *are* the network, so
that its bounds err by rounding alone. Windows are confirmed on a network in which each window is
replaced by its maximum at the point: wherever that member is proved to stay the largest, both
networks agree, operation by operation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from calipers.bounds.backward import lower_bounds, margin_bounds, relax
from calipers.bounds.coefficients import Dense
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import CHECKED, plain_sums
from calipers.geometry.linear_pieces import Pieces
from calipers.graph.generic import Generic
from calipers.graph.ir import Graph
from calipers.graph.kinds import is_affine
from calipers.problem.problem import Problem

SHARES = (1 - 1e-9, 1 - 1e-6, 1 - 1e-3)
"""Shares of a computed distance, tried in this order.

Wherever it was measured, a computed distance errs by less than the first share allows.
"""

Holds = Callable[[Problem, Relaxed, Pieces], Tensor]
"""What a confirming bound propagation decides for each point, (N,) bool."""


def confirmed(
    problem: Problem, pieces: Pieces, distance: Tensor, holds: Holds, within: Tensor | None = None
) -> Tensor:
    """Return the largest share of each distance that is proved, (N,) float64.

    The `SHARES` are tried in turn by backward bound propagation; 0 where none is proved. Where no
    border can be reached at all (infinite distance), the farthest corner of the box stands for
    infinity. `within (N,)` is the radius up to which the replacement of windows by their maxima is
    known to be right; it limits what is proved of networks with windows.
    """
    proved, widest = torch.zeros_like(distance), problem.threat.widest(problem.x).to(distance)
    if all(is_affine(node.op) for node in pieces.graph.nodes):
        proved = torch.where(distance.isinf(), distance, proved)
    for share in SHARES:
        aim = torch.where(distance.isinf(), widest, distance * share)
        possible = (aim > 0) & aim.isfinite()
        if within is not None and pieces.picks:
            possible &= aim <= within
        left = torch.nonzero((proved == 0) & possible).flatten()
        if not len(left):
            continue
        good = _swept(problem.take(left), pieces.take(left), aim[left], holds)
        proved[left] = torch.where(good, torch.where(distance.isinf(), distance, aim)[left], 0.0)
    return proved


def _swept(problem: Problem, pieces: Pieces, radius: Tensor, holds: Holds) -> Tensor:
    found = []
    with plain_sums():
        for index, graph in _networks(pieces):
            part = problem.take(index)
            region = part.threat.region(part.x.double(), outward=True).at(radius[index])
            found.append(holds(part, relax(graph, region, CHECKED), pieces.take(index)))
    return torch.cat(found)


def _networks(pieces: Pieces) -> Iterator[tuple[Tensor, Graph]]:
    """Yield the points that share a network, and that network.

    Where windows are replaced by their maxima there is one network for each point.
    """
    every = torch.arange(len(pieces.values[0]), device=pieces.values[0].device)
    if not pieces.picks:
        yield every, pieces.graph
        return
    for index in every.split(1):
        yield index, _without_windows(pieces, index)


def _without_windows(pieces: Pieces, index: Tensor) -> Graph:
    nodes = list(pieces.graph.nodes)
    for number, picks in pieces.picks.items():
        node, pick = nodes[number - 1], picks[index[0]]

        def chosen(x: Tensor, pick: Tensor = pick) -> Tensor:
            return x.flatten(1)[:, pick]

        op = Generic(chosen, "winner", (pieces.graph.shape(node.inputs[0]),))
        nodes[number - 1] = dataclasses.replace(node, op=op)
    return Graph(pieces.graph.input_shape, tuple(nodes))


def all_stable(problem: Problem, state: Relaxed, pieces: Pieces) -> Tensor:
    """Return where no operation can leave its linear piece, (N,) bool.

    No box of an operation's input reaches over a breakpoint, and no other member of a window can
    exceed the one that is the maximum at the point.
    """
    good = torch.ones(len(problem), dtype=torch.bool, device=problem.x.device)
    for node in state.graph.nodes:
        if not is_affine(node.op):
            box = state.boxes[node.inputs[0]]
            good &= ~node.op.unstable(box.lower, box.upper).flatten(1).any(1)
    for number in pieces.picks:
        good &= _stays_ahead(state, pieces, number)
    return good


def _stays_ahead(state: Relaxed, pieces: Pieces, number: int) -> Tensor:
    """Return whether every window's maximum stays the same, (1,) bool.

    For a single point. Only members that the boxes leave in doubt are bounded.
    """
    source = pieces.graph.nodes[number - 1].inputs[0]
    box, (behind, windows) = state.boxes[source], pieces.trailing(number)
    padded = torch.cat(
        [box.upper.flatten(1), torch.full_like(box.upper.flatten(1)[:, :1], -torch.inf)], 1
    )[:, windows]
    pick = pieces.picks[number].flatten(1)
    doubt = (padded > box.lower.flatten(1).gather(1, pick)[..., None]) & behind.isfinite()
    _, window, member = doubt.nonzero(as_tuple=True)
    ahead = torch.ones(1, dtype=torch.bool, device=pick.device)
    for k in filter(len, torch.arange(len(window), device=pick.device).split(pieces.rows)):
        rows = box.lower.new_zeros(len(k), box.lower[0].numel())
        each = torch.arange(len(k), device=pick.device)
        rows[each, pick[0, window[k]]] += 1
        rows[each, windows[window[k], member[k]]] -= 1
        ahead &= (
            lower_bounds(
                state, source, Dense(rows.view(1, len(k), *pieces.graph.shape(source)), None)
            )
            >= 0
        ).all(1)
    return ahead


def margins_hold(problem: Problem, state: Relaxed, pieces: Pieces) -> Tensor:
    """Return where the worst margin is proved positive, (N,) bool."""
    bounds = margin_bounds(state, problem.goal.rows(problem.y, problem.classes))
    offsets = problem.goal.offsets(problem.y, problem.classes).to(bounds)
    bounds = torch.where(
        offsets == 0, bounds, torch.nextafter(bounds + offsets, torch.full_like(bounds, -torch.inf))
    )
    return problem.goal.worst(bounds.nan_to_num(nan=-torch.inf)) > 0
