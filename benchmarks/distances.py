"""How near do the attacks come to the nearest adversarial example? Against exact distances, and
against the same attacks in three libraries.

First table: networks whose exact distances are published (mixed-integer programs), the attack of
the plan "distance" or those given with --tool; how many times the exact distance is what it finds.
Nothing may lie below the exact value by more than its own stated gap. Second table: each library's
minimum-norm attack and ours of the same name with the same number of steps, and with --fewer, on
the same points; the median distance over the points that both break, all judged by the model's own
arithmetic after the few roundings that exact membership asks for, and seconds for one run each, by
turns. A median hides where the other is nearer: "behind" is the largest lead in percentage points
that the other has in the share of points broken, over a grid of radii; --curve prints the grid.

    PYTHONPATH=src python benchmarks/distances.py [--points 100] [--steps 100] [--fewer 20 30] \\
        [--rounds 1] [--curve] [--only FMN] [--no-peers]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from statistics import median
from types import ModuleType

import common
import numpy as np
import torch
from torch import Tensor, nn

from calipers.attacks.carlini_wagner import CarliniWagner
from calipers.attacks.ddn import DDN
from calipers.attacks.deepfool import DeepFool
from calipers.attacks.fmn import FMN
from calipers.presets import plan_for, tool_from
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.threats.ball import Ball

EXACT = (
    ("mnist_tiny_mlp20", "linf", 0.1, "tiny_mlp20_linf_exact.csv"),
    ("mnist_tiny_mlp20", "l1", 5.0, "tiny_mlp20_l1_exact.csv"),
    ("mnist_wk17a", "linf", 0.1, "wk17a_linf_exact_idx0-249.csv"),
)
NEARLY = 1.01  # an upper bound so near to its lower bound counts as exact
NETWORKS = ("mnist-plain", "mnist-robust", "mnist_wk17a")

Run = Callable[[], Tensor]
Peer = Callable[[ModuleType, nn.Module, int], Callable[[Tensor, Tensor], Tensor]]
"""(library, model, steps) -> (x, y) -> candidates."""


def with_exact(
    name: str, norm: str, radius: float, file: str
) -> tuple[Problem, Tensor, Tensor] | None:
    """Return the problem of the points whose exact distance is known, and its lower and upper ends;
    None, with a message, where a file is absent.
    """
    path, images = common.DATA / "truth" / file, common.DATA / "data" / "mnist_test_2k.npz"
    model = common.network(name) if path.exists() and images.exists() else None
    if model is None:
        print(f"{name}: skipped, no {path.name} among the published distances")
        return None
    with path.open() as lines:
        rows = [
            row
            for row in csv.DictReader(lines)
            if row["upper"] and 0 < float(row["upper"]) < NEARLY * float(row["lower"])
        ]
    index = [int(row["mnist_test_index"]) for row in rows]
    with np.load(images) as arrays:
        x, y = (
            torch.tensor(arrays["x"][index]).float()[:, None] / 255,
            torch.tensor(arrays["y"][index]).long(),
        )
    low, high = (
        torch.tensor([float(row[end]) for row in rows], dtype=torch.float64)
        for end in ("lower", "upper")
    )
    return Problem.pose(model, x, y, Ball(norm, radius)), low, high


def candidates(attack: Attack, problem: Problem) -> Tensor:
    found = problem.x.clone()
    for attempt in attack(problem):
        found[attempt.index] = attempt.candidate
    return found


def distances(problem: Problem, found: Tensor) -> Tensor:
    """Return the distance of each candidate, (N,) float64, infinite where it is not adversarial."""
    inside = problem.at(1e30).region.snap(found)
    broken = is_adversarial(problem.goal.worst(problem.margins(problem.classifier.logits(inside))))
    return torch.where(broken, problem.region.distance(inside), torch.inf)


def against_exact(named: list[str] | None) -> None:
    """Print the first table: of the tools named, or of those that the plan distance asks in each
    norm.
    """
    print(f"\n{'network':18} {'norm':4} points  median    95 %     max   below  seconds  tool")
    for row in EXACT:
        known = with_exact(*row)
        if known is None:
            continue
        problem, low, high = known
        tools = named or [
            repr(stage.tool)
            for stage in plan_for(problem.threat, "distance").stages
            if stage.kind == "attack"
        ]
        for text in tools:
            results: list[Tensor] = []
            seconds = common.clock(lambda: results.append(candidates(tool_from(text), problem)))  # type: ignore[arg-type]
            found = distances(problem, results[0])
            ratio, below = found / high, int((found < low * (1 - 1e-6)).sum())
            line = (
                f"{ratio.median():7.4f} {ratio.quantile(0.95):7.4f} {ratio.max():7.4f} {below:7} "
                f"{seconds:8.1f}"
            )
            print(f"{row[0]:18} {row[1]:4} {len(low):6} {line}  {text}", flush=True)


def foolbox_attack(kind: str, **settings: object) -> Peer:
    def make(
        library: ModuleType, model: nn.Module, steps: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        wrapped, attack = (
            library.PyTorchModel(model, bounds=(0, 1)),
            getattr(library.attacks, kind)(steps=steps, **settings),
        )

        def run(x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = attack(
                wrapped, x, library.criteria.Misclassification(y), epsilons=None
            )[1]
            return found

        return run

    return make


def torchattacks_deepfool(
    library: ModuleType, model: nn.Module, steps: int
) -> Callable[[Tensor, Tensor], Tensor]:
    attack: Callable[[Tensor, Tensor], Tensor] = library.DeepFool(model, steps=steps)
    return attack


def art_deepfool(
    library: ModuleType, model: nn.Module, steps: int
) -> Callable[[Tensor, Tensor], Tensor]:
    from art.attacks.evasion import DeepFool as Theirs
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = Theirs(wrapped, max_iter=steps, epsilon=0.02, batch_size=128, verbose=False)
    return lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


PAIRS: tuple[tuple[str, str, str, Peer, Callable[[int], Attack]], ...] = (
    ("foolbox", "FMN", "linf", foolbox_attack("LInfFMNAttack"), lambda steps: FMN(steps)),
    ("foolbox", "FMN", "l2", foolbox_attack("L2FMNAttack"), lambda steps: FMN(steps)),
    ("foolbox", "FMN", "l1", foolbox_attack("L1FMNAttack"), lambda steps: FMN(steps)),
    ("foolbox", "FMN", "l0", foolbox_attack("L0FMNAttack"), lambda steps: FMN(steps)),
    ("foolbox", "DDN", "l2", foolbox_attack("DDNAttack"), lambda steps: DDN(steps)),
    (
        "foolbox",
        "C&W",
        "l2",
        foolbox_attack("L2CarliniWagnerAttack", binary_search_steps=9),
        lambda steps: CarliniWagner(steps, rounds=9),
    ),
    (
        "foolbox",
        "DeepFool",
        "l2",
        foolbox_attack("L2DeepFoolAttack"),
        lambda steps: DeepFool(min(steps, 20)),
    ),
    (
        "torchattacks",
        "DeepFool",
        "l2",
        torchattacks_deepfool,
        lambda steps: DeepFool(min(steps, 20)),
    ),
    ("art", "DeepFool", "l2", art_deepfool, lambda steps: DeepFool(min(steps, 20))),
)
RADII = {"linf": 0.1, "l2": 1.0, "l1": 6.0, "l0": 20.0}
GRID = 20  # radii, from 0 to the largest distance that either side finds


def against_peers(name: str, found: dict[str, ModuleType], options: argparse.Namespace) -> None:
    """Print the second table's lines of one network."""
    model = common.network(name)
    if model is None:
        return
    x, y = common.right(model, *common.digits(options.points))
    for library, attack, norm, peer, own in PAIRS:
        if library not in found or (options.only and attack not in options.only):
            continue
        problem, theirs = (
            Problem.pose(model, x, y, Ball(norm, RADII[norm])),
            peer(found[library], model, options.steps),
        )
        results: dict[str, Tensor] = {}

        def keeping(side: str, run: Run, results: dict[str, Tensor] = results) -> None:
            results[side] = run()

        counts = [options.steps, *options.fewer]
        sides: dict[str, Callable[[], object]] = {
            str(steps): partial(keeping, str(steps), partial(candidates, own(steps), problem))
            for steps in counts
        }
        sides["theirs"] = partial(keeping, "theirs", partial(theirs, x, y))
        torch.manual_seed(0)
        np.random.seed(0)
        seconds = common.alternate(sides, options.rounds, warm=False)
        there = distances(problem, results["theirs"].detach())
        for steps in counts:
            here, times = (
                distances(problem, results[str(steps)]),
                (median(seconds[str(steps)]), median(seconds["theirs"])),
            )
            print(
                f"{name:13} {norm:4} {attack:8} {library:12} {steps:5} {len(x):5} "
                f"{compared(here, there, times)}",
                flush=True,
            )
            if options.curve:
                for radius, mine, other in curve(here, there):
                    print(f"    {radius:9.4f} {mine:7.1%} {other:7.1%}")


def compared(here: Tensor, there: Tensor, times: tuple[float, float]) -> str:
    """Return the numbers of one line: points broken, medians and their ratio, the largest lead of
    the other over the curve, seconds, times as fast.
    """
    both = here.isfinite() & there.isfinite()
    a, b = float(here[both].median()), float(there[both].median())
    behind = max(other - mine for _, mine, other in curve(here, there))
    broken = f"{int(here.isfinite().sum()):4} {int(there.isfinite().sum()):4}"
    return (
        f"{broken} {a:9.4f} {b:9.4f} {a / b:6.3f} {behind:7.1%} {times[0]:8.2f} {times[1]:8.2f} "
        f"{times[1] / times[0]:6.1f}"
    )


def curve(here: Tensor, there: Tensor) -> list[tuple[float, float, float]]:
    """Return (radius, share that we break there, share that they break there) over the grid."""
    known = torch.cat([here, there])
    radii = torch.linspace(0, float(known[known.isfinite()].max()), GRID + 1, dtype=torch.float64)[
        1:
    ]
    return [
        (float(r), float((here <= r).double().mean()), float((there <= r).double().mean()))
        for r in radii
    ]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (("--points", 100), ("--steps", 100), ("--rounds", 1)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument(
        "--tool",
        action="append",
        help="what to compare with exact distances; may be given several times",
    )
    parser.add_argument(
        "--fewer",
        type=int,
        nargs="*",
        default=[30],
        help="other numbers of steps for ours, beside those of the peers",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        help="attacks of the second table: FMN, DDN, C&W, DeepFool; the first table is left out",
    )
    parser.add_argument(
        "--curve",
        action="store_true",
        help="also print the share broken at each radius of a grid, ours and theirs",
    )
    parser.add_argument("--no-peers", action="store_true", help="the first table only")
    options = parser.parse_args()
    found = common.start(
        "Distances of minimum-norm attacks",
        [] if options.no_peers else ["foolbox", "torchattacks", "art"],
    )
    if not options.only:
        against_exact(options.tool)
    if found:
        print(
            f"\n{'network':13} norm {'attack':8} {'library':12} our steps, points, broken, median, "
            "theirs, ratio; behind, seconds, theirs, speed"
        )
        for name in NETWORKS:
            against_peers(name, found, options)


if __name__ == "__main__":
    main()
