"""Is a measured region really one? A backward sweep in checked float64 confirms what was computed,
or claims less.

Where no operation can leave its piece the sweep's lines *are* the network, so its bounds err by
rounding alone. Windows are confirmed on a network in which each is replaced by its winner: wherever
that network's winners are proved to stay ahead, both networks agree, operation by operation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from calipers.bounds.coefficients import Dense
from calipers.bounds.linear import lower_bounds, margin_bounds, relax
from calipers.bounds.relaxed import Relaxed
from calipers.bounds.rounding import CHECKED, plain_sums
from calipers.geometry.pieces import Pieces
from calipers.graph.generic import Generic
from calipers.graph.ir import Graph
from calipers.graph.kinds import is_affine
from calipers.problem.problem import Problem

SHARES = (1 - 1e-9, 1 - 1e-6, 1 - 1e-3)
"""Of a computed distance, tried one after the other: a distance errs by less than the first
wherever we measured it.
"""

Holds = Callable[[Problem, Relaxed, Pieces], Tensor]
"""What a confirming sweep asks of each point, (N,) bool."""


def confirmed(
    problem: Problem, pieces: Pieces, distance: Tensor, holds: Holds, within: Tensor | None = None
) -> Tensor:
    """Return the largest share of each distance (N,) that a sweep proves, (N,) float64; 0 where
    none of those tried.

    Where no wall can be reached at all, the farthest corner of the box stands for infinity. `within
    (N,)`: networks with windows are only known up to there.
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
    """Yield the points that share a network, and the network: one for each point where windows are
    replaced by their winners.
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


def nothing_bends(problem: Problem, state: Relaxed, pieces: Pieces) -> Tensor:
    """Where does no operation's box reach over the end of a piece, and no other member of a window
    overtake its winner, (N,) bool?
    """
    good = torch.ones(len(problem), dtype=torch.bool, device=problem.x.device)
    for node in state.graph.nodes:
        if not is_affine(node.op):
            box = state.boxes[node.inputs[0]]
            good &= ~node.op.bends(box.lower, box.upper).flatten(1).any(1)
    for number in pieces.picks:
        good &= _stays_ahead(state, pieces, number)
    return good


def _stays_ahead(state: Relaxed, pieces: Pieces, number: int) -> Tensor:
    """Does the winner of every window keep ahead, for a single point, (1,) bool? Asked of members
    that the boxes leave in doubt.
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
    """Where is the worst margin proved positive, (N,) bool?"""
    bounds = margin_bounds(state, problem.goal.rows(problem.y, problem.classes))
    offsets = problem.goal.offsets(problem.y, problem.classes).to(bounds)
    bounds = torch.where(
        offsets == 0, bounds, torch.nextafter(bounds + offsets, torch.full_like(bounds, -torch.inf))
    )
    return problem.goal.worst(bounds.nan_to_num(nan=-torch.inf)) > 0
