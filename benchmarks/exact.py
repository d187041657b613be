"""Are exact distances exact, and how fast? Against published ones, and against a plain mixed-integer program on the same solver.

First part: every published distance (tiny_mlp20 linf and l1, mnist_wk17a linf) against both of our ends, l2 of tiny_mlp20, and three more networks under linf.
"agrees": our ends lie within the published ones, give or take 1e-6 of the distance (wk17a: 1e-5). The region asked about is that of the nearest example
the plan "distance" finds. Second part: seconds against the textbook's program: one binary for each unit, constants from intervals over the same region, the
same solver and threads, within the same time; nobody proves what that program says. SCIP and Marabou, where they can be imported, are named and not run yet.

    PYTHONPATH=src python benchmarks/exact.py [--points 10] [--seconds 60] [--only tiny wk17a l2 others speed]
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import common
import numpy as np
import torch
from distances import EXACT, candidates, distances, with_exact
from torch import Tensor

from calipers.bounds.interval import Box
from calipers.bounds.linear import relax
from calipers.bounds.rounding import CHECKED
from calipers.certificates.milp import MILP
from calipers.graph.capture import graph_of
from calipers.presets import tool_from
from calipers.problem.ball import Ball
from calipers.problem.problem import Problem
from calipers.problem.tools import Attempt

ATTACK = "Closer(FMN(steps=50), Guided(APGD(steps=20, targets=9, halving=True), Minimisers(2)))"
OTHERS = ("mnist_fc_3layer", "mnist_rsl18a", "mnist_madry_tiny")
ROOM = 1.001


def reach(problem: Problem) -> Tensor:
    """Return the radii to ask at: just above the nearest example that the attack finds."""
    return (distances(problem, candidates(tool_from(ATTACK), problem)) * ROOM).clamp(max=1e6)  # type: ignore[arg-type]


def ends(problem: Problem, seconds: float) -> tuple[float, float, float]:
    """Return both ends of the only point's distance, the example of the attack at first, and the seconds it took."""
    begun, lower, upper = time.perf_counter(), 0.0, float(problem.threat.radii(1)[0]) / ROOM
    for result in MILP(seconds=seconds)(problem):
        if isinstance(result, Attempt):
            upper = min(upper, float(problem.region.distance(result.candidate)))
        else:
            lower = float(result.radius)
    return lower, upper, time.perf_counter() - begun


def line(name: str, rows: list[tuple[float, float, float]], agree: str = "") -> None:
    """Print one network's row."""
    gaps = [max(0.0, 1 - low / up) for low, up, _ in rows]
    took = [s for _, _, s in rows]
    closed = sum(g <= 1e-4 for g in gaps)
    print(f"{name:24} {len(rows):6} {closed:6} {max(gaps):9.1e} {median(took):8.2f} {max(took):8.2f} {sum(took):8.1f}  {agree}", flush=True)


def published(options: argparse.Namespace, places: tuple[int, ...], slack: float) -> None:
    """Compare with published distances."""
    for row in (EXACT[k] for k in places):
        known = with_exact(*row)
        if known is None:
            continue
        problem, low, high = known
        count = min(options.points or len(problem), len(problem))
        radii, rows, agree, nearer = reach(problem.take(range(count))), [], 0, 0
        for i in range(count):
            rows.append(ends(problem.take([i]).at(radii[i]), options.seconds))
            agree += rows[-1][0] <= float(high[i]) + slack * float(high[i]) and rows[-1][1] >= float(low[i]) * (1 - slack)
            nearer += rows[-1][0] > float(low[i]) * (1 + slack) or rows[-1][1] < float(high[i]) * (1 - slack)
        line(f"{row[0]} {row[1]}", rows, f"{agree} of {count} agree, {nearer} narrower than published")


def unpublished(name: str, norm: str, radius: float, options: argparse.Namespace) -> None:
    """Close brackets of which nothing is known."""
    model = common.network(name)
    if model is None:
        return
    x, y = common.right(model, *common.digits(5 * (options.points or 10)))
    problem = Problem.pose(model, x[: options.points or 10], y[: options.points or 10], Ball(norm, radius))
    radii = reach(problem)
    line(f"{name} {norm}", [ends(problem.take([i]).at(radii[i]), options.seconds) for i in range(len(problem))])


def textbook(problem: Problem, seconds: float) -> tuple[float, float, bool]:
    """Return the linf distance that a plain mixed-integer program finds for the only point, its seconds, and whether it was solved: dense layers and
    convolutions as they are, intervals over the region for its constants."""
    import highspy

    graph, begun = graph_of(problem.classifier, problem.x).to(torch.float64), time.perf_counter()
    region = problem.threat.region(problem.x.double(), outward=True)
    boxes: dict[int, Box] = relax(graph, region, CHECKED, refine=False).boxes
    best, solved = np.inf, True
    margins = problem.goal.rows(problem.y, problem.classes)[0].double()
    for row in margins:
        h = highspy.Highs()  # type: ignore[no-untyped-call]
        for name, value in {"output_flag": False, "threads": 1, "time_limit": max(0.01, seconds - (time.perf_counter() - begun))}.items():
            h.setOptionValue(name, value)
        distance = _plain(h, graph, boxes, problem, region, row)
        h.run()
        done = h.getModelStatus() in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kInfeasible)
        solved &= done
        if h.getModelStatus() == highspy.HighsModelStatus.kOptimal:
            best = min(best, h.getSolution().col_value[distance])
    return best, time.perf_counter() - begun, solved


def _plain(h: object, graph: object, boxes: dict[int, Box], problem: Problem, region: object, row: Tensor) -> int:
    """Fill a solver: columns of every number, one row for each unit of an affine layer, four for each unit that bends."""
    solver, place, count = h, {}, 0  # type: ignore[var-annotated]
    for number in range(len(graph.nodes) + 1):  # type: ignore[attr-defined]
        low, high = (end[0].flatten().numpy() for end in (boxes[number].lower, boxes[number].upper))
        solver.addVars(len(low), low, high)  # type: ignore[attr-defined]
        place[number], count = count, count + len(low)
    radius = float(problem.threat.radii(1)[0])
    solver.addVars(1, np.zeros(1), np.full(1, radius))  # type: ignore[attr-defined]
    solver.changeColCost(count, 1.0)  # type: ignore[attr-defined]
    distance, count, x = count, count + 1, problem.x[0].double().flatten().numpy()

    def add(low: float, high: float, columns: list[int], values: list[float]) -> None:
        solver.addRow(low, high, len(columns), np.array(columns, dtype=np.int32), np.array(values, dtype=np.float64))  # type: ignore[attr-defined]

    for i, value in enumerate(x.tolist()):
        add(-np.inf, value, [i, distance], [1.0, -1.0])
        add(value, np.inf, [i, distance], [1.0, 1.0])
    for number, node in enumerate(graph.nodes, start=1):  # type: ignore[attr-defined]
        size = boxes[number].lower[0].numel()
        if node.op.kind == "affine":
            zero = node.op.value(*(torch.zeros(1, *graph.shape(i), dtype=torch.float64) for i in node.inputs)).flatten().numpy()  # type: ignore[attr-defined]
            backs = node.op.adjoint(torch.eye(size, dtype=torch.float64).view(size, *node.shape))
            for e in range(size):
                columns, values = [place[number] + e], [1.0]
                for i, back in zip(node.inputs, backs, strict=True):
                    weights = back[e].flatten().numpy()
                    used = np.flatnonzero(weights)
                    columns, values = columns + (place[i] + used).tolist(), values + (-weights[used]).tolist()
                add(float(zero[e]), float(zero[e]), columns, values)
            continue
        low, high = (end[0].flatten().tolist() for end in (boxes[node.inputs[0]].lower, boxes[node.inputs[0]].upper))
        for e in range(size):
            z, y = place[node.inputs[0]] + e, place[number] + e
            if low[e] >= 0 or high[e] <= 0:
                add(0.0, 0.0, [y, z] if low[e] >= 0 else [y], [1.0, -1.0] if low[e] >= 0 else [1.0])
                continue
            solver.addVars(1, np.zeros(1), np.ones(1))  # type: ignore[attr-defined]
            solver.changeColsIntegrality(1, np.array([count], dtype=np.int32), np.array([1], dtype=np.uint8))  # type: ignore[attr-defined]
            add(0.0, np.inf, [y, z], [1.0, -1.0])
            add(-np.inf, -low[e], [y, z, count], [1.0, -1.0, -low[e]])
            add(-np.inf, 0.0, [y, count], [1.0, -high[e]])
            count += 1
    last = place[len(graph.nodes)]  # type: ignore[attr-defined]
    add(-np.inf, 0.0, [last + k for k in range(len(row))], row.tolist())
    return distance


def speed(options: argparse.Namespace) -> None:
    """Print seconds against the textbook's program."""
    found = common.start("Exact linf distances, seconds against a plain mixed-integer program with the same solver", ("pyscipopt", "maraboupy"))
    print(f"not run yet, though importable: {', '.join(found)}" if found else "", end="\n" if found else "")
    print(f"{'network':20} points   ours: solved, seconds   plain: solved, seconds   ratio  apart")
    for name in ("mnist_tiny_mlp20", "mnist_wk17a", "mnist_fc_3layer"):
        model = common.network(name)
        if model is None:
            continue
        x, y = common.right(model, *common.digits(5 * (options.points or 50)))
        whole = Problem.pose(model, x[: options.points or 50], y[: options.points or 50], Ball("linf", 0.1))
        radii, mine, theirs = reach(whole), [], []
        for i in range(len(whole)):
            part = whole.take([i]).at(radii[i])
            mine.append(ends(part, options.seconds))
            theirs.append(textbook(part, options.seconds))
        both = [(m, t) for m, t in zip(mine, theirs, strict=True) if t[2] and 1 - m[0] / m[1] <= 1e-4]
        apart = sum(not (m[0] * (1 - 1e-5) <= t[0] <= m[1] * (1 + 1e-5)) for m, t in both)
        closed = sum(1 - m[0] / m[1] <= 1e-4 for m in mine)
        ours, other = sum(m[2] for m in mine), sum(t[1] for t in theirs)
        print(f"{name:20} {len(mine):6}   {closed:6} {ours:12.1f}     {sum(t[2] for t in theirs):6} {other:12.1f}   {other / ours:8.1f}  {apart:5}", flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=None, help="of each network; default: all published ones, 10 of others, 50 for speed")
    parser.add_argument("--seconds", type=float, default=60.0, help="for a point")
    parser.add_argument("--only", nargs="*", default=["tiny", "wk17a", "l2", "others", "speed"])
    options = parser.parse_args()
    common.start("Exact distances by mixed-integer programming")
    print(f"{'network':24} points closed widest gap  median s    max s    sum s")
    if "tiny" in options.only:
        published(options, (0, 1), 1e-6)
    if "wk17a" in options.only:
        published(options, (2,), 1e-4)
    if "l2" in options.only:
        unpublished("mnist_tiny_mlp20", "l2", 1.0, argparse.Namespace(points=options.points or 20, seconds=options.seconds))
    for name in OTHERS if "others" in options.only else ():
        unpublished(name, "linf", 0.1, options)
    if "speed" in options.only:
        speed(options)


if __name__ == "__main__":
    main()
