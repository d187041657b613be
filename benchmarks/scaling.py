"""How does the cost of a bound grow? Seconds against width, depth, batch and unstable neurons, with
the exponents fitted to the upper half of each range.

Dense ReLU networks with random weights of the usual scale on 784 inputs, linf; plain CROWN (checked
float64) and optimised slopes (20 steps, no sharper boxes). One quantity varies at a time; unstable
neurons vary with the radius. The figure goes to docs/scaling.svg with --draw.

    PYTHONPATH=src python benchmarks/scaling.py [--rounds 3] [--draw]
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from torch import Tensor, nn

from calipers.bounds.backward import relax
from calipers.bounds.rounding import CHECKED
from calipers.bounds.unstable import unstable_elements
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.crown import CROWN, batches
from calipers.graph.capture import graph_of
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

USUAL = {"width": 64, "depth": 4, "batch": 32, "radius": 0.01}
AXES: dict[str, tuple[str, Sequence[float]]] = {
    "width": ("width", (32, 64, 128, 256, 512)),
    "depth": ("depth", (2, 4, 6, 8, 12)),
    "batch": ("batch", (8, 16, 32, 64, 128, 256)),
    "unstable neurons": ("radius", (0.001, 0.003, 0.006, 0.01, 0.02, 0.05)),
}
METHODS = {"CROWN": CROWN(), "AlphaCROWN": AlphaCROWN(intermediate=0)}


class Spot(NamedTuple):
    """Where on its axis one measurement stands, and the seconds of each method."""

    at: float
    seconds: dict[str, float]


def problem(width: int, depth: int, batch: int, radius: float) -> Problem:
    """Return points of a random network, each labelled with the class it predicts."""
    torch.manual_seed(0)
    sizes = [784, *[width] * (depth - 1), 10]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())][
        :-1
    ]
    model = nn.Sequential(nn.Flatten(), *layers).eval().requires_grad_(False)
    x = torch.rand(batch, 1, 28, 28)
    return Problem.pose(model, x, model(x).argmax(1), Ball("linf", radius))


def unstable(question: Problem) -> float:
    """Return how many elements bend, a point."""
    graph = graph_of(question.classifier, question.x)
    state = relax(graph, question.threat.region(question.x.double(), outward=True), CHECKED)
    return float(
        sum(unstable_elements(graph, k, state.boxes[k]).sum() for k in graph.nonlinear)
    ) / len(question)


def bounded(tool: CROWN | AlphaCROWN, question: Problem) -> Tensor:
    """Return all points' bounds, batch by batch as in a measurement."""
    return torch.cat(
        [tool.bound(question.take(index), CHECKED).worst for index in batches(question)]
    )


def measured(axis: str, rounds: int) -> list[Spot]:
    """Measure along one axis."""
    name, values = AXES[axis]
    spots = []
    for value in values:
        settings = {**USUAL, name: value}
        question = problem(
            int(settings["width"]),
            int(settings["depth"]),
            int(settings["batch"]),
            settings["radius"],
        )
        at = unstable(question) if axis == "unstable neurons" else value
        runs: dict[str, Callable[[], object]] = {
            k: lambda tool=tool: bounded(tool, question) for k, tool in METHODS.items()
        }
        spots.append(
            Spot(at, {k: min(common.clock(run) for _ in range(rounds)) for k, run in runs.items()})
        )
    return spots


def exponent(spots: Sequence[Spot], method: str) -> float:
    """Return the slope of log seconds over log position, least squares over the upper half of the
    range.
    """
    upper = spots[len(spots) // 2 - (len(spots) % 2 == 0) :]
    x, y = (np.log([f(s) for s in upper]) for f in (lambda s: s.at, lambda s: s.seconds[method]))
    return float(np.polyfit(x, y, 1)[0])


def drawn(found: dict[str, list[Spot]]) -> str:
    """Return the figure: a panel for each axis, both scales logarithmic."""
    wide, high, pad = 226, 190, 54
    seconds = [t for spots in found.values() for s in spots for t in s.seconds.values()]
    low, top = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    parts = []
    for panel, (axis, spots) in enumerate(found.items()):
        left, first, last = (
            pad + panel * (wide + pad),
            math.log(spots[0].at),
            math.log(spots[-1].at),
        )

        def place(
            s: Spot, t: float, left: float = left, first: float = first, last: float = last
        ) -> str:
            along = left + (math.log(s.at) - first) / (last - first) * wide
            return f"{along:.1f},{20 + (top - math.log10(t)) / (top - low) * high:.1f}"

        parts.append(
            f'<rect x="{left}" y="20" width="{wide}" height="{high}" fill="none" stroke="#8888"/>'
        )
        for decade in range(low, top + 1):
            y = 20 + (top - decade) / (top - low) * high
            parts.append(
                f'<path d="M{left} {y:.1f}h{wide}" stroke="#8884"/><text x="{left - 4}" '
                f'y="{y + 4:.1f}" '
                f'text-anchor="end">{10.0**decade:g} s</text>'
            )
        for method, colour in zip(METHODS, ("#2563eb", "#d97706"), strict=True):
            points = " ".join(place(s, s.seconds[method]) for s in spots)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
            label = f"{method}: exponent {exponent(spots, method):.2f}"
            parts.append(
                f'<text x="{left + 8}" y="{38 + 15 * list(METHODS).index(method)}" style="fill: '
                f'{colour}">{label}</text>'
            )
        ends = (
            f'<text x="{left}" y="{high + 36}">{spots[0].at:.3g}</text><text x="{left + wide}" '
            f'y="{high + 36}" text-anchor="end">{spots[-1].at:.3g}</text>'
        )
        parts.append(
            ends + f'<text x="{left + wide / 2}" y="{high + 36}" text-anchor="middle">{axis}</text>'
        )
    width = pad + len(found) * (wide + pad)
    style = "<style>text { font: 12px sans-serif; fill: #888 }</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {high + 48}" '
        f'role="img">{style}{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Print a table and the exponents for each axis."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="write docs/scaling.svg")
    options = parser.parse_args()
    common.start("Cost of a bound")
    for tool in METHODS.values():
        bounded(tool, problem(32, 2, 8, 0.01))  # imports and threads are nobody's cost
    found = {}
    for axis in AXES:
        found[axis] = spots = measured(axis, options.rounds)
        print(
            f"\n{axis}: "
            + ", ".join(f"{k} grows with exponent {exponent(spots, k):.2f}" for k in METHODS)
        )
        for s in spots:
            print(
                f"  {s.at:10.4g}  " + "  ".join(f"{k} {t:8.4f} s" for k, t in s.seconds.items()),
                flush=True,
            )
    if options.draw:
        (Path(__file__).resolve().parents[1] / "docs" / "scaling.svg").write_text(drawn(found))


if __name__ == "__main__":
    main()
