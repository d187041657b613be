"""Has the product a blind side? The standard plan against all its attacks with five times their
steps, and against AutoAttack, on many nets, norms and radii.

Rows are every published network and those of `grid_nets.py`, in linf, l2 and l1, at three radii
around the median distance. For each: how many points the standard plan leaves and in how many
seconds of the process; how many are left when everything else, at five times its usual steps, has
tried those too; and AutoAttack's number and seconds where it is importable (`autoattack`), run on
the points that the model gets right. With
--distances, how many times the nearest example that anybody finds the upper ends of the plans
 `distance` and
`brackets` are: median and 95 % over the points.

Plans were tuned on the networks of TUNED_ON alone; judge by the others. Results are appended to a
file of JSON lines, and rows that it holds are not run again, so a long run can be stopped and taken
up.

    PYTHONPATH=src python benchmarks/grid.py [--points 100] [--nets own-linf ...] \\
        [--norms l1 ...] [--radii 0 1 2] [--no-union] [--no-peer] [--distances]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cascade
import common
import grid_nets
import numpy as np
import torch

# the library's own import takes seconds, once in a process; AutoAttack has done its own before it
# is timed
import torch.export
from torch import Tensor, nn

import calipers
from calipers.attacks.adaptive_restarts import AdaptiveRestarts
from calipers.attacks.apgd import APGD
from calipers.attacks.carlini_wagner import CarliniWagner
from calipers.attacks.ddn import DDN
from calipers.attacks.fab import FAB
from calipers.attacks.fmn import FMN
from calipers.attacks.iterative_tightening import IterativeTightening
from calipers.attacks.mi_fgsm import MIFGSM
from calipers.attacks.multi_epsilon import MultiEpsilon
from calipers.attacks.pgd import PGD
from calipers.attacks.square import Square
from calipers.attacks.warm_start import WarmStarted
from calipers.certificates.attack_starts import RelaxationMinimizers
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.threats.ball import Ball

PUBLISHED = (
    "mnist_madry_tiny",
    "mnist_wk17a",
    "mnist_rsl18a",
    "mnist_fc_3layer",
    "mnist_6x100_nat",
    "mnist_tiny_mlp20",
    "cifar_cnn_a_adv4",
    "cifar_marabou_small",
)
NETS = (*PUBLISHED, *grid_nets.OWN)
TUNED_ON = ("mnist_madry_tiny", "own-linf", "own-l1", "mnist_fc_3layer", "own-pooled")
NORMS = ("linf", "l2", "l1")
AROUND = (0.7, 1.0, 1.4)  # of the median distance
KEPT = Path(tempfile.gettempdir()) / "calipers-grid.jsonl"

Row = dict[str, Any]


def harder(norm: str) -> list[Attack]:
    """Return all attacks of the product at five times their usual steps, the cheap ones first."""
    l2: list[Attack] = (
        [DDN(steps=500, inside=True), CarliniWagner(steps=500)] if norm == "l2" else []
    )
    return [
        PGD(steps=200, restarts=5),
        MIFGSM(steps=50),
        FAB(steps=250, targets=9, beta=0.8, inside=True),
        FAB(steps=250, targets=9, inside=True),
        FMN(steps=500, targets=9, gamma=0.2, inside=True),
        FMN(steps=500, targets=9, inside=True),
        *l2,
        APGD(steps=500, restarts=2),
        APGD(steps=500, targets=9),
        MultiEpsilon(steps=500, targets=9),
        AdaptiveRestarts(
            WarmStarted(
                APGD(steps=300, restarts=2, targets=5, successive_halving=True),
                RelaxationMinimizers(2),
            ),
            MultiEpsilon(steps=500),
        ),
        IterativeTightening(
            FMN(steps=250, targets=3),
            WarmStarted(
                APGD(steps=100, targets=9, successive_halving=True), RelaxationMinimizers(2)
            ),
        ),
        Square(queries=4000, proposals_per_step=8),
    ]


def broken(problem: Problem, attack: Attack) -> Tensor:
    """Return which points the attack breaks, (N,) bool; a float64 copy of the model decides."""
    found = problem.region.snap(candidates(problem, attack))
    return problem.region.contains(found) & is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits64(found)))
    )


def candidates(problem: Problem, attack: Attack) -> Tensor:
    """Return the attack's candidates."""
    found = problem.x.clone()
    for attempt in attack(problem, seed=1):
        found[attempt.index] = attempt.candidate
    return found


def distances(problem: Problem, attack: Attack) -> Tensor:
    """Return how far the examples are that the attack finds, (N,) float64, infinite where it finds
    none.
    """
    wide = problem.at(1e30)
    found = wide.region.snap(candidates(problem, attack))
    hit = is_adversarial(wide.goal.worst(wide.margins(wide.classifier.logits64(found))))
    return torch.where(hit, wide.region.distance(found), torch.inf)


def images(name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the images that a network is asked about."""
    return common.cifar(count) if name.startswith("cifar") else common.digits(count)


def radii(model: nn.Module, name: str, norm: str) -> list[float]:
    """Return three radii around the median distance of 40 points, as two searches see it, with two
    digits.
    """
    x, y = common.right(model, *images(name, 40))
    problem = Problem.pose(model, x, y, Ball(norm, 1.0))
    nearest = torch.minimum(
        distances(problem, FMN(steps=60, targets=3, gamma=0.2)),
        distances(problem, FAB(steps=40, targets=3, beta=0.8)),
    )
    return [float(f"{share * float(nearest.median()):.2g}") for share in AROUND]


def clocked(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and the processor seconds that it took."""
    begin = time.process_time()
    result = run()
    return result, time.process_time() - begin


def strength(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    row: Row,
    library: ModuleType | None,
    options: argparse.Namespace,
) -> Row:
    """Return what the standard plan, the union and AutoAttack leave of a row."""
    threat = Ball(row["norm"], row["radius"])
    result, seconds = clocked(lambda: calipers.measure(model, x, y, threat, plan=row["plan"]))
    at = np.full(len(x), row["radius"])
    left = [i for i, verdict in enumerate(result.bracket.verdicts(at)) if verdict == "unknown"]
    robust, found = result.robust_accuracy, dict[str, int]()
    out = {"left": robust.attacked.count, "certified": robust.certified.count, "seconds": seconds}
    problem = (
        Problem.pose(model, x[left], y[left], threat) if left and not options.no_union else None
    )
    for attack in harder(row["norm"]):
        if problem is None or not len(problem):
            break
        fell = broken(problem, attack)
        if bool(fell.any()):
            found[repr(attack)] = int(fell.sum())
            problem = problem.take(torch.nonzero(~fell).flatten())
    if not options.no_union:
        out |= {"union": out["left"] - sum(found.values()), "found": found}
    if library is not None:
        kept_x, kept_y = common.right(model, x, y)
        theirs, out["theirs_seconds"] = clocked(
            lambda: cascade.theirs(
                library, model, kept_x, kept_y, cascade.Row(row["net"], row["norm"], row["radius"])
            )
        )
        out["theirs"] = cascade.standing(Problem.pose(model, kept_x, kept_y, threat), theirs)
    return out


def nearness(model: nn.Module, x: Tensor, y: Tensor, row: Row) -> Row:
    """Return how many times the best known distance the ends of the plans for distances are, with
    seconds.
    """
    threat, out, ends = Ball(row["norm"], row["radius"]), Row(), dict[str, Tensor]()
    for plan in ("distance", "brackets"):
        result, out[f"{plan}_seconds"] = clocked(
            lambda: calipers.measure(model, x, y, threat, plan=plan)
        )
        ends[plan] = torch.from_numpy(result.bracket.upper.copy())
    right = ends["distance"] > 0
    problem, norm = Problem.pose(model, x[right], y[right], threat), row["norm"]
    best = torch.minimum(ends["distance"], ends["brackets"])[right]
    closer = IterativeTightening(
        FMN(steps=250, targets=9, gamma=0.2),
        WarmStarted(APGD(steps=100, targets=9, successive_halving=True), RelaxationMinimizers(2)),
        rounds=5,
    )
    seekers: list[Attack] = [
        FAB(steps=250, targets=9, beta=0.8),
        FAB(steps=250, targets=9),
        FMN(steps=500, targets=9, gamma=0.2),
        FMN(steps=500, targets=9),
        closer,
    ]
    for attack in seekers + ([DDN(steps=500)] if norm == "l2" else []):
        best = torch.minimum(best, distances(problem, attack))
    for plan, end in ends.items():
        ratio = end[right] / best
        out |= {
            f"{plan}_median": float(ratio.median()),
            f"{plan}_95": float(ratio.quantile(0.95)),
            f"{plan}_most": float(ratio.max()),
        }
    return out


def held(path: Path) -> list[Row]:
    """Return the rows of the file, the latest of each question."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {json.dumps(row["key"]): row for row in map(json.loads, lines)}
    return list(rows.values())


def line(row: Row) -> str:
    """Return a row of the table."""
    text = (
        f"{row['net'] + (' *' if row['net'] in TUNED_ON else ''):21} {row['norm']:4} "
        f"{row['radius']:7.4g} {row['points']:4}"
    )
    if "distance_median" in row:
        return text + "".join(
            f"   {plan} {row[f'{plan}_median']:.3f} {row[f'{plan}_95']:.3f} in "
            f"{row[f'{plan}_seconds']:.1f} s"
            for plan in ("distance", "brackets")
        )
    text += f"  left {row['left']:4} (certified {row['certified']:3}) in {row['seconds']:6.1f} s"
    if "union" in row:
        text += f"  union {row['union']:4}"
    if "theirs" in row:
        text += (
            f"  AutoAttack {row['theirs']:4} in {row['theirs_seconds']:6.1f} s, "
            f"{row['theirs_seconds'] / row['seconds']:5.1f} times"
        )
    return text


def summary(rows: list[Row]) -> None:
    """Print what all rows say together."""
    union = [(row["left"] - row["union"]) * 100 / row["points"] for row in rows if "union" in row]
    if union:
        print(
            f"{len(union)} rows; points of 100 more than the union: at most {max(union):.1f}; more "
            f"than 1 on {sum(gap > 1 for gap in union)}"
        )
    theirs = [row for row in rows if "theirs" in row]
    if theirs:
        ratios = [row["theirs_seconds"] / row["seconds"] for row in theirs]
        behind = sum(row["left"] > row["theirs"] for row in theirs)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(
            f"{len(theirs)} rows; more left than by AutoAttack on {behind}; AutoAttack's seconds "
            f"over ours: geometric mean {mean:.1f}, worst {min(ratios):.1f}"
        )
    for plan in ("distance", "brackets"):
        known = [row for row in rows if f"{plan}_median" in row]
        if known:
            print(
                f"{plan}: worst median {max(row[f'{plan}_median'] for row in known):.3f}, worst 95 "
                f"% {max(row[f'{plan}_95'] for row in known):.3f}"
            )


def main() -> None:
    """Print a row for each question that is not held yet, and what all say together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--nets", nargs="*", default=NETS)
    parser.add_argument("--norms", nargs="*", default=NORMS)
    parser.add_argument(
        "--radii", nargs="*", type=int, default=[0, 1, 2], help="which of the three radii"
    )
    parser.add_argument("--plan", default="standard")
    parser.add_argument(
        "--no-union", action="store_true", help="do not try what is left with everything else"
    )
    parser.add_argument("--no-peer", action="store_true", help="no AutoAttack")
    parser.add_argument(
        "--distances",
        action="store_true",
        help="the plans distance and brackets instead, at the middle radius",
    )
    parser.add_argument("--results", type=Path, default=KEPT, help="the file of JSON lines")
    options = parser.parse_args()
    library = common.start(
        "The standard plan against everything",
        [] if options.no_peer or options.distances else ["autoattack"],
    ).get("autoattack")
    torch.set_num_threads(1)
    print(f"results: {options.results}; * plans were tuned on this network", flush=True)
    mode = (
        "distances"
        if options.distances
        else options.plan + (" alone" if options.no_union else "") + (" peer" if library else "")
    )
    shown, known = list[Row](), {json.dumps(row["key"]): row for row in held(options.results)}
    for net in options.nets:
        model = grid_nets.network(net)
        if model is None:
            continue
        for norm in options.norms:
            wanted = [1] if options.distances else options.radii
            keys = [[mode, net, norm, k, options.points] for k in wanted]
            around = (
                [] if all(json.dumps(key) in known for key in keys) else radii(model, net, norm)
            )
            for key in keys:
                row = known.get(json.dumps(key)) or measured(
                    model, key, around[key[3]], library, options
                )
                shown.append(row)
                print(line(row), flush=True)
    summary(shown)


def measured(
    model: nn.Module,
    key: list[Any],
    radius: float,
    library: ModuleType | None,
    options: argparse.Namespace,
) -> Row:
    """Measure a row, and append it to the file."""
    x, y = images(key[1], options.points)
    torch.manual_seed(0)
    row = {
        "key": key,
        "net": key[1],
        "norm": key[2],
        "radius": radius,
        "points": len(x),
        "plan": options.plan,
    }
    row |= (
        nearness(model, x, y, row)
        if options.distances
        else strength(model, x, y, row, library, options)
    )
    with options.results.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
