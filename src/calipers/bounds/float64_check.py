"""Confirmation in checked float64 of bounds found in float32.

One backward pass with the slopes, multipliers and cuts that the search has chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.bounds.backward import lower_bounds
from calipers.bounds.coefficients import Dense
from calipers.bounds.dual_bound import Dual, Free
from calipers.bounds.interval import Box
from calipers.bounds.relaxation import Relaxed
from calipers.graph.ir import Node
from calipers.graph.kinds import is_affine, is_elementwise
from calipers.graph.relaxations import Lines, Relaxation

_BYTES = 2**26  # of lines and sizes held at once


def confirmed(dual: Dual, free: Free, spec: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return proved lower bounds (P,) over the branches.

    They bound the largest of the directions `spec (P, S, *shape)` plus `offsets (P, S)`, both
    float64.

    Everything chosen enters as an exact number: alpha in [0, 1], multipliers of the right sign,
    weights that are not negative, cuts that only ever shrink a box. So the bound holds whatever the
    search did. Proved in the arithmetic of the root's state. Cost: one row of backward propagation
    each.
    """
    offsets = spec.new_zeros(spec.shape[:2]) if offsets is None else offsets
    elements = sum(torch.Size(dual.graph.shape(i)).numel() for i in range(dual.number + 1)) * 8 * 8
    parts = torch.arange(len(dual.rows), device=spec.device).split(max(1, _BYTES // elements))
    return torch.cat(
        [_bounds(dual.take(part), free.take(part), spec[part], offsets[part]) for part in parts]
    )


def _bounds(dual: Dual, free: Free, spec: Tensor, offsets: Tensor) -> Tensor:
    root, rows = dual.root.state, dual.rows
    arithmetic = root.arithmetic
    departures = {k: v[rows] for k, v in root.departures.items() if k <= dual.number}
    state = Relaxed(
        root.graph,
        root.region.take(rows),
        arithmetic,
        torch.zeros_like(rows),
        reach=root.reach[rows],
        departures=departures,
    )
    for k, node in enumerate(root.graph.nodes[: dual.number], start=1):
        if is_affine(node.op):
            if arithmetic.checked:
                state.sizes[k] = root.sizes[k][rows]
            continue
        state.relaxations[k] = relaxation = _chosen(dual, free, k, node)
        if arithmetic.checked:
            boxes = [root.boxes[i].take(rows) for i in node.inputs]
            state.sizes[k] = relaxation.size(*(box.magnitude for box in boxes))
    for i, beta in free.beta.items():
        if i in dual.cuts:
            state.multipliers[i] = _multiplier(dual, i, beta.to(spec.dtype))
    weights = free.weights.to(spec.dtype) if spec.shape[1] > 1 else torch.ones_like(offsets)
    direction, size = (
        (weights[:, None] @ t.flatten(2)).view(-1, 1, *t.shape[2:]) for t in (spec, spec.abs())
    )
    shift, terms = (weights * offsets).sum(1), (weights * offsets.abs()).sum(1)
    bound = lower_bounds(state, dual.number, Dense(direction, None))[:, 0]
    # The weighted mean itself was rounded, by at most gamma times the sum of the magnitudes of its
    # terms over the box of the number.
    reach = (
        (size[:, 0].flatten(1) * root.boxes[dual.number].magnitude[rows].flatten(1)).sum(1)
        if spec.shape[1] > 1
        else torch.zeros_like(bound)
    )
    return bound + shift - arithmetic.gamma(spec.shape[1]) * (reach + terms + bound.abs())


def _chosen(dual: Dual, free: Free, k: int, node: Node) -> Relaxation:
    """Return an operation's relaxation in the root's dtype.

    At the chosen alpha where there is one.
    """
    if is_elementwise(node.op):
        return _lines(dual, free, k, node.inputs[0])
    root, rows = dual.root.state, dual.rows
    held = root.relaxations[k].take(rows)
    if k not in free.alpha:
        return held
    ends = [root.boxes[i].take(rows).ends for i in node.inputs]
    alpha = free.alpha[k].clamp(0, 1).view(-1, *node.shape).to(ends[0][0].dtype)
    return node.op.chosen(held, alpha, *ends)


def _lines(dual: Dual, free: Free, k: int, number: int) -> Lines:
    """Return all lines of an operation in the root's dtype.

    Those of the columns are at the chosen alpha, over the branch's ends.
    """
    root, columns, rows = dual.root.state, dual.columns[number], dual.rows
    base = root.relaxations[k]
    assert isinstance(base, Lines)
    whole = root.boxes[number]
    box = dual.cut(number, Box(columns.get(whole.lower[rows]), columns.get(whole.upper[rows])))
    # Padding repeats the first column in everything, or slope and intercept of one line might be
    # written from two different ones.
    alpha = columns.filled(free.alpha[k].to(base.lower_slope.dtype).clamp(0, 1))
    op = root.graph.nodes[k - 1].op
    assert is_elementwise(op)
    own = op.relax(box.lower, box.upper, alpha)
    shape = (len(rows), *root.graph.shape(k))
    return Lines(
        *(
            columns.put(line[rows].flatten(1), part).view(shape)
            for line, part in zip(base, own, strict=True)
        )
    )


def _multiplier(dual: Dual, number: int, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return what multipliers subtract from coefficients, and their gain.

    The first (P, *shape) is subtracted from the number's coefficients; the second (P,) is the least
    that this adds to the bound: beta times the constraints' ends, rounded down.

    Multipliers of a missing constraint, or of the wrong sign for theirs, become 0.
    """
    cut, columns = dual.cuts[number], dual.columns[number]
    low, high = cut.lower.to(beta.dtype), cut.upper.to(beta.dtype)
    allowed = (
        columns.real & torch.where(beta > 0, low.isfinite(), high.isfinite()) & beta.isfinite()
    )
    beta = torch.where(allowed, beta, torch.zeros_like(beta))
    ends = torch.where(beta == 0, torch.zeros_like(beta), beta * torch.where(beta > 0, low, high))
    shape = dual.graph.shape(number)
    whole = beta.new_zeros(len(beta), torch.Size(shape).numel()).scatter_add(1, columns.place, beta)
    gain = ends.sum(1) - dual.root.state.arithmetic.gamma(beta.shape[1]) * ends.abs().sum(1)
    return whole.view(-1, *shape), gain
