"""How long does PGD with restarts take, and how many points does it leave standing? calipers
against three libraries, same points, steps, step length and restarts.

Who does what: calipers drops a point at the step that breaks it, and refills the batch. The others
run all steps of a restart on their batch; between restarts only the points that still stand go on,
by the library's own means where it has them (torchattacks' MultiAttack), by our loop where it has
none (foolbox, ART: kinder to them than repeat(n) and num_random_init = n, which run every restart
on every point; --own-restarts takes these). All climb cross-entropy; calipers' default,
cross-entropy and margin by turns, is shown too. Our first restart starts at the point itself, all
others at random. Every library gets the batch size of 128 and 500 that is faster in a trial. All
results pass one judge: moved by the few roundings that exact membership asks for, then re-checked.

    PYTHONPATH=src python benchmarks/pgd.py [--points 500] [--steps 100] [--restarts 20] \\
        [--rounds 3] [--radius 0.1] [--own-restarts]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import ModuleType

import common
import numpy as np
import torch
from torch import Tensor, nn

from calipers.attacks.engine.losses import LossName
from calipers.attacks.pgd import PGD
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

BATCHES = (128, 500)
TRAVEL = 2.5  # radii that all steps together cover

Restart = Callable[[Tensor, Tensor], Tensor]
"""One restart on a batch of points and labels."""
Run = Callable[[], Tensor]


def survivors(
    model: nn.Module, x: Tensor, y: Tensor, once: Restart, restarts: int, batch: int
) -> Tensor:
    """Return the last candidate of each point, running every restart on the points that still
    stand.
    """
    adversarial, left = x.clone(), torch.arange(len(x))
    for _ in range(restarts):
        found = []
        for part in left.split(batch):
            adversarial[part] = once(x[part], y[part])
            with torch.no_grad():
                found.append(model(adversarial[part]).argmax(1) != y[part])
        left = left[~torch.cat(found)] if found else left
    return adversarial


def with_torchattacks(
    library: ModuleType, model: nn.Module, radius: float, options: argparse.Namespace
) -> Callable[[Tensor, Tensor, int], Tensor]:
    step = TRAVEL * radius / options.steps
    attack = library.MultiAttack(
        [
            library.PGD(model, eps=radius, alpha=step, steps=options.steps, random_start=True)
            for _ in range(max(2, options.restarts))
        ]
    )
    return lambda x, y, batch: torch.cat(
        [attack(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
    )


def with_foolbox(
    library: ModuleType, model: nn.Module, radius: float, options: argparse.Namespace
) -> Callable[[Tensor, Tensor, int], Tensor]:
    wrapped = library.PyTorchModel(model, bounds=(0, 1))
    attack = library.attacks.LinfPGD(
        abs_stepsize=TRAVEL * radius / options.steps, steps=options.steps, random_start=True
    )
    restarts = 1 if options.own_restarts else options.restarts
    attack = (
        attack.repeat(options.restarts) if options.own_restarts and options.restarts > 1 else attack
    )

    def once(x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = attack(wrapped, x, library.criteria.Misclassification(y), epsilons=radius)[
            1
        ]
        return result

    return lambda x, y, batch: survivors(model, x, y, once, restarts, batch)


def with_art(
    library: ModuleType, model: nn.Module, radius: float, options: argparse.Namespace
) -> Callable[[Tensor, Tensor, int], Tensor]:
    from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch import (
        ProjectedGradientDescentPyTorch,
    )
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    restarts = options.restarts if options.own_restarts else 1
    settings = {
        "norm": np.inf,
        "eps": radius,
        "eps_step": TRAVEL * radius / options.steps,
        "max_iter": options.steps,
        "num_random_init": restarts,
        "verbose": False,
    }

    def attacked(x: Tensor, y: Tensor, batch: int) -> Tensor:
        attack = ProjectedGradientDescentPyTorch(wrapped, batch_size=batch, **settings)

        def once(x: Tensor, y: Tensor) -> Tensor:
            return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

        return (
            once(x, y)
            if options.own_restarts
            else survivors(model, x, y, once, options.restarts, batch)
        )

    return attacked


PEERS = {"torchattacks": with_torchattacks, "foolbox": with_foolbox, "art": with_art}


def ours(problem: Problem, options: argparse.Namespace, loss: LossName = "cross_entropy") -> Tensor:
    candidates = problem.x.clone()
    for attempt in PGD(options.steps, options.restarts, step=TRAVEL / options.steps, loss=loss)(
        problem
    ):
        candidates[attempt.index] = attempt.candidate
    return candidates


def standing(problem: Problem, candidates: Tensor) -> int:
    """Return how many points no admissible candidate breaks; a float64 copy of the model
    decides.
    """
    snapped = problem.region.snap(candidates)
    broken = problem.region.contains(snapped) & is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits64(snapped)))
    )
    return int((~broken).sum())


def compare(name: str, found: dict[str, ModuleType], options: argparse.Namespace) -> None:
    model = common.network(name)
    assert model is not None
    x, y = common.right(model, *common.digits(options.points))
    problem = Problem.pose(model, x, y, Ball("linf", options.radius))
    results: dict[str, Tensor] = {}

    def keeping(side: str, run: Run) -> Run:
        def kept() -> Tensor:
            results[side] = run()
            return results[side]

        return kept

    sides: dict[str, Run] = {"calipers": keeping("calipers", lambda: ours(problem, options))}
    sides["calipers, default loss"] = keeping(
        "calipers, default loss", lambda: ours(problem, options, "alternate")
    )
    trial = argparse.Namespace(**{**vars(options), "restarts": 1, "steps": min(10, options.steps)})
    for peer, library in found.items():
        attack = PEERS[peer](library, model, options.radius, trial)
        trials = {size: common.clock(partial(attack, x, y, size)) for size in BATCHES}
        batch = min(trials, key=trials.__getitem__)
        attack, side = (
            PEERS[peer](library, model, options.radius, options),
            f"{peer}, batch {batch}",
        )
        sides[side] = keeping(side, partial(attack, x, y, batch))
    ours(problem, trial)  # warms up
    torch.manual_seed(0)
    np.random.seed(0)
    seconds = common.alternate(sides, options.rounds, warm=False)
    results[common.CONTROL] = results["calipers"]
    total = min(options.points, 500)
    print(
        f"\n{name}, linf {options.radius}: {len(x)} of {total} points are classified correctly "
        "and attacked"
    )
    common.table(
        seconds,
        {
            side: f"robust accuracy {standing(problem, found) / total:.1%}"
            for side, found in results.items()
        },
    )


def main() -> None:
    """Print a table for each embedded network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (
        ("--points", 500),
        ("--steps", 100),
        ("--restarts", 20),
        ("--rounds", 3),
    ):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--radius", type=float, default=0.1)
    parser.add_argument(
        "--own-restarts",
        action="store_true",
        help="foolbox by its own repeat(n), ART by its own num_random_init",
    )
    options = parser.parse_args()
    found = common.start(f"PGD-{options.steps} x {options.restarts} restarts, linf", list(PEERS))
    for name in ("mnist-plain", "mnist-robust"):
        compare(name, found, options)


if __name__ == "__main__":
    main()
