"""Affine forms propagated forward: boxes for inputs of few features.

Every number is c + sum_j g_j e_j with e in [-1, 1]^d, give or take r >= 0 an element: the d
features that move keep their correlation through the whole network, and what relaxations and
rounding lose goes into r (affine arithmetic with the noise of all operations collapsed; compare the
zonotopes of Singh et al. 2018, DeepZ). A layer costs d + 2 passes, whatever its width, instead of
one row of backward propagation for every unstable element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calipers.bounds.float32_execution import departure, input_departure
from calipers.bounds.interval import Box, propagate
from calipers.bounds.rounding import Arithmetic
from calipers.graph.ir import Graph
from calipers.graph.kinds import Affine, Elementwise, is_affine, is_elementwise

_SLACK = 8  # roundings of a few scalar operations


class Form(NamedTuple):
    """Affine forms: centre `c`, generators `g`, remainder `r`.

    `c` and `r (P, *shape)`, `g (P, d, *shape)`.
    """

    c: Tensor
    g: Tensor
    r: Tensor

    @property
    def reach(self) -> Tensor:
        """How far an element can be from its centre, before rounding."""
        return self.g.abs().sum(1) + self.r

    def box(self, arithmetic: Arithmetic) -> Box:
        """Return the smallest box around the form, rounded outward."""
        reach = self.reach
        room = (
            arithmetic.gamma(self.g.shape[1] + _SLACK) * (self.c.abs() + reach) + arithmetic.floor
        )
        return Box(self.c - reach - room, self.c + reach + room)


def forward(
    graph: Graph, low: Tensor, high: Tensor, arithmetic: Arithmetic
) -> tuple[dict[int, Box], Form]:
    """Return the boxes of all numbers, and the last number's form.

    Over the input boxes `low`, `high (P, *D)`; e stands for the features that move in any of them.

    Proved in the arithmetic given, as far as it accounts for rounding. Cost: d + 2 forward passes a
    box.
    """
    form = _input(low, high)
    if arithmetic.executed is not None:
        form = form._replace(r=form.r + input_departure(form.box(arithmetic), arithmetic))
    forms, boxes = {0: form}, {0: form.box(arithmetic)}
    for number, node in enumerate(graph.nodes, start=1):
        inputs = [forms[i] for i in node.inputs]
        if is_affine(node.op):
            forms[number] = _affine(node.op, inputs, arithmetic)
        elif is_elementwise(node.op):
            forms[number] = _nonlinear(node.op, inputs[0], boxes[node.inputs[0]], arithmetic)
        else:
            forms[number] = _constant(
                propagate(graph, number, boxes, arithmetic), form.g.shape[1], arithmetic
            )
        if arithmetic.executed is not None:
            made = forms[number]
            forms[number] = made._replace(
                r=made.r + departure(node.op, [boxes[i] for i in node.inputs], arithmetic)
            )
        boxes[number] = forms[number].box(arithmetic).mended()
    return boxes, forms[len(graph.nodes)]


def _input(low: Tensor, high: Tensor) -> Form:
    c = (low + high) / 2
    half = torch.maximum(high - c, c - low).flatten(1)
    half = torch.where(half > 0, torch.nextafter(half, torch.full_like(half, torch.inf)), half)
    moving = torch.nonzero((half > 0).any(0)).flatten()
    g = half.new_zeros(len(half), len(moving), half.shape[1])
    g[:, torch.arange(len(moving)), moving] = half[:, moving]
    return Form(c, g.view(len(c), len(moving), *c.shape[1:]), torch.zeros_like(c))


def _affine(op: Affine, inputs: list[Form], arithmetic: Arithmetic) -> Form:
    count = inputs[0].g.shape[1]
    zero = op.value(*(torch.zeros_like(f.c[:1]) for f in inputs))
    c = op.value(*(f.c for f in inputs))
    g = op.value(*(f.g.flatten(0, 1) for f in inputs)) - zero
    sizes = op.absolute(*(torch.cat([f.r, f.c.abs() + f.reach]) for f in inputs))
    r, size = sizes.chunk(2)
    terms = max(f.c[0].numel() for f in inputs) + count + _SLACK
    r = r + arithmetic.gamma(terms) * (size + (count + 2) * zero.abs()) + arithmetic.floor
    return Form(c, g.view(len(c), count, *c.shape[1:]), r)


def _nonlinear(op: Elementwise, x: Form, box: Box, arithmetic: Arithmetic) -> Form:
    """Return the form of a nonlinear function.

    The line of the chord's slope, and the function's distance from it: for a ReLU both lines are
    parallel then.
    """
    lines = op.parallel(box.lower, box.upper)
    slope = lines.upper_slope
    rise = lines.lower_slope - slope
    least = torch.minimum(rise * box.lower, rise * box.upper) + lines.lower_intercept
    most = lines.upper_intercept
    size = (
        slope.abs() * (x.c.abs() + x.reach)
        + rise.abs() * box.magnitude
        + lines.lower_intercept.abs()
        + most.abs()
    )
    r = (
        slope.abs() * x.r
        + (most - least) / 2
        + arithmetic.gamma(x.g.shape[1] + _SLACK) * size
        + arithmetic.floor
    )
    whole = Form(slope * x.c + (most + least) / 2, slope[:, None] * x.g, r)
    # over an infinite interval nothing is known: r is infinite, and nothing may become NaN later
    lost = ~(whole.r.isfinite() & whole.c.isfinite())
    return Form(
        whole.c.masked_fill(lost, 0.0),
        whole.g.masked_fill(lost[:, None], 0.0),
        whole.r.masked_fill(lost, torch.inf),
    )


def _constant(box: Box, count: int, arithmetic: Arithmetic) -> Form:
    c = (box.lower + box.upper) / 2
    reach = torch.maximum(box.upper - c, c - box.lower) * (1 + arithmetic.gamma(_SLACK))
    return Form(c, c.new_zeros(len(c), count, *c.shape[1:]), reach)
