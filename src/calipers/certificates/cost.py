"""Forecasts of what a bound will cost, from a few timed rows.

Interval bounds say which elements would get rows. They are wider than the boxes that backward
propagation would leave, so the count is too high rather than too low.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from calipers.bounds.backward import (
    MEMORY,
    in_windows,
    lower_bounds,
    margin_bounds,
    refined_numbers,
    relax,
)
from calipers.bounds.coefficients import unit_rows
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import Arithmetic, plain_sums
from calipers.bounds.unstable import unstable_elements
from calipers.certificates.guaranteed import posed
from calipers.graph.ir import Graph
from calipers.problem.problem import Problem
from calipers.problem.protocols import Forecast

CLOCK: Callable[[], float] = time.process_time

# passes through the network that interval bounds with their rounding take, measured on
# convolutional networks
_BOXES = 8.0
# rows are timed from about so many numbers; the others are taken to cost what the one timed before
# them does
_TIMED = 6
_SHORT = 0.01  # seconds: a row that takes less is timed again in a group, as rows really run
_TOGETHER = 64
_ROWS = (
    1.5  # for each unstable element: the second end is bounded only if the first leaves it unstable
)
_OTHERS = 8  # the smallest margins, which show whether the bound has a chance
# how far a bound may fall short, in clean margins: `_FAR`, times `_LOOSER` for each number whose
# boxes backward propagation refines; see `sweeps_forecast`
_FAR, _LOOSER = 100.0, 8.0


def held_bytes(graph: Graph) -> int:
    """Return the bytes of a point's boxes and relaxations in float64."""
    return sum(torch.Size(graph.shape(i)).numel() for i in range(len(graph.nodes) + 1)) * 8 * 10


def boxes_forecast(problem: Problem, arithmetic: Arithmetic) -> Forecast:
    """Forecast the cost of interval bounds.

    Some passes through the network, of which one is timed.
    """
    graph, region = posed(problem, arithmetic)
    with torch.no_grad():
        begun = CLOCK()
        graph.values(region.center)
        return Forecast(_BOXES * (CLOCK() - begun), held_bytes(graph))


def sweeps_forecast(problem: Problem, arithmetic: Arithmetic, *, refine: bool) -> Forecast:
    """Forecast the cost of CROWN, and whether it has a chance.

    Backward bound propagation wins back what interval boxes lose, and these lose more with every
    layer. Where it proved the point, the bound from interval boxes missed the margin by up to 40
    times its clean value on networks of 3 layers, 200 on eight published ones, 6e3 on 6 layers, 1e6
    on 10 (random ones, at the largest radius that CROWN proves): about 4 times for each layer. A
    bound that misses by more than `_FAR` times 8 for each layer is reported as hopeless.
    """
    graph, region = posed(problem, arithmetic)
    with torch.no_grad(), plain_sums():
        begun = CLOCK()
        state = relax(graph, region, arithmetic, refine=False)
        boxes = CLOCK() - begun
        clean = problem.margins(problem.classifier.logits64(problem.x))[0]
        near = clean.argsort()[:_OTHERS]
        begun = CLOCK()
        bounds = margin_bounds(state, problem.goal.rows(problem.y, problem.classes)[:, near])[0]
        row = (CLOCK() - begun) / len(near)
        seconds = boxes + row * len(clean) + (_refining(state) if refine else 0.0)
    missing = float(
        ((clean[near] - bounds) / clean[near].clamp_min(torch.finfo(bounds.dtype).tiny)).max()
    )
    lost = not missing <= _FAR * _LOOSER ** len(refined_numbers(graph, region))
    hopeless = (
        f"its bound from interval boxes misses the margin by {missing:.1g} times its value"
        if refine and lost
        else ""
    )
    return Forecast(seconds, held_bytes(graph) + 4 * max(MEMORY, 8 * graph.largest), hopeless)


def _refining(state: Relaxed) -> float:
    """Return the seconds for the rows of all unstable elements of a point.

    Unstable as judged over the boxes of the state, which holds a single point.
    """
    graph = state.graph
    flags = {
        k: unstable_elements(graph, k, state.boxes[k])
        for k in sorted(refined_numbers(graph, state.region), reverse=True)
    }
    places = {k: torch.nonzero(f[0]).flatten() for k, f in flags.items() if bool(f.any())}
    total, row, every = 0.0, 0.0, -(-len(places) // _TIMED)
    for i, (number, elements) in enumerate(places.items()):
        row = _row(state, number, elements) if i % every == 0 else row
        total += _ROWS * len(elements) * row
    return total


def _row(state: Relaxed, number: int, elements: Tensor) -> float:
    """Return how long a row that begins at a number takes."""
    seconds = _timed(state, number, elements[:1])
    return (
        seconds
        if seconds > _SHORT
        else min(seconds, _timed(state, number, elements[:_TOGETHER]) / len(elements[:_TOGETHER]))
    )


def _timed(state: Relaxed, number: int, elements: Tensor) -> float:
    """Return the seconds of a lower bound of these elements."""
    windowed, like = in_windows(state.graph, number), state.region.center
    place = elements if windowed else elements[None]
    points = torch.zeros(len(place), dtype=torch.long, device=like.device)
    sign = torch.ones(
        len(place), 1 if windowed else len(elements), dtype=like.dtype, device=like.device
    )
    begun = CLOCK()
    lower_bounds(
        state, number, unit_rows(place, points, state.graph.shape(number), sign, windowed=windowed)
    )
    return CLOCK() - begun
