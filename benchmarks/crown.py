"""How long does CROWN take, and are its bounds anywhere looser than auto_LiRPA's? Whole networks,
linf, the points that are classified correctly.

Like for like is float32 against float32 without rounding allowances ("search"); "checked" is what
calipers claims: float64 with the allowance for rounding. Bounds of intermediate values are part of
every figure, capturing the network and building auto_LiRPA's module are not. auto_LiRPA runs method
CROWN in patches mode (--all: in matrix mode too) on batches of 1, 10 and 50, and keeps the fastest
of a trial. Looser: by how much the worst margin's bound is below auto_LiRPA's at most, over all
points; as claimed (checked), and like for like (both then err by float32 rounding).

    PYTHONPATH=src python benchmarks/crown.py [--rounds 5] [--points 500] \\
        [--only mnist_6x100_nat] [--all]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import common
import torch
import trained
from torch import Tensor, nn

from calipers.bounds.rounding import CHECKED, SEARCH, Arithmetic
from calipers.certificates.crown import CROWN, batches
from calipers.graph.capture import graph_of
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

BATCHES = (1, 10, 50)
TRIAL_POINTS = 50


class Case(NamedTuple):
    network: str
    radius: float
    points: int


CASES = (
    Case("mnist_wk17a", 0.1, 500), Case("mnist_6x100_nat", 0.026, 500), Case("residual", 0.02, 100),
    Case("mnist_rsl18a", 0.1, 500), Case("mnist_madry_tiny", 0.3, 200),
    Case("cifar_cnn_a_adv4", 2 / 255, 200),
    Case("sigmoid", 0.02, 500), Case("tanh", 0.02, 200), Case("vit", 0.01, 50),
)  # fmt: skip


def ours(problem: Problem, arithmetic: Arithmetic) -> Tensor:
    """Return the bound of each point's worst margin."""
    return torch.cat(
        [CROWN().bound(problem.take(index), arithmetic).worst for index in batches(problem)]
    )


def theirs(
    library: ModuleType, problem: Problem, radius: float, batch: int, mode: str
) -> Callable[[], Tensor]:
    """Return auto_LiRPA's CROWN on the same question, its module built."""
    from auto_LiRPA.perturbations import PerturbationLpNorm

    rows = problem.goal.rows(problem.y, problem.classes)
    module = library.BoundedModule(
        problem.classifier.network, problem.x[:batch], bound_opts={"conv_mode": mode}, device="cpu"
    )

    def parts() -> Iterator[Tensor]:
        for x, c in zip(problem.x.split(batch), rows.split(batch), strict=True):
            ball = PerturbationLpNorm(
                norm=torch.inf,
                eps=radius,
                x_L=(x - radius).clamp(0, 1),
                x_U=(x + radius).clamp(0, 1),
            )
            lower, _ = module.compute_bounds(
                x=(library.BoundedTensor(x, ball),), C=c, method="CROWN", bound_upper=False
            )
            yield lower.amin(1)

    def run() -> Tensor:
        with torch.no_grad():
            return torch.cat(list(parts()))

    return run


def trial(
    library: ModuleType, problem: Problem, radius: float, batch: int, mode: str
) -> float | None:
    """Return the seconds of a second run on a few points; None, with a message, where the library
    fails.
    """
    try:
        run = theirs(library, problem, radius, batch, mode)
        run()
        return common.clock(run)
    except Exception as error:
        print(
            f"auto_LiRPA, {mode}, batch {batch}: fails ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})"
        )
        return None


def compare(case: Case, library: ModuleType | None, options: argparse.Namespace) -> None:
    model = trained.network(case.network)
    if model is None:
        return
    points = min(options.points, case.points)
    x, y = common.right(
        model,
        *(common.cifar(points) if case.network.startswith("cifar") else common.digits(points)),
    )
    problem = Problem.pose(model, x, y, Ball("linf", case.radius))
    captured = common.clock(lambda: graph_of(problem.classifier, problem.x))
    sides: dict[str, Callable[[], Tensor]] = {
        "calipers, search (float32)": lambda: ours(problem, SEARCH),
        "calipers, checked (float64)": lambda: ours(problem, CHECKED),
    }
    modes = (
        ("patches", "matrix")
        if options.all and any(isinstance(m, nn.Conv2d) for m in model.modules())
        else ("patches",)
    )
    few = problem.take(torch.arange(min(TRIAL_POINTS, len(problem))))
    for mode in modes if library is not None else ():
        taken = {
            batch: seconds
            for batch in BATCHES
            if (seconds := trial(library, few, case.radius, batch, mode)) is not None
        }
        if not taken:
            continue
        batch = min(taken, key=taken.__getitem__)
        sides[f"auto_LiRPA, {mode}, batch {batch}"] = theirs(
            library, problem, case.radius, batch, mode
        )
    bounds = {name: run() for name, run in sides.items()}
    seconds = common.alternate(sides, options.rounds, warm=False)
    search, checked = list(bounds.values())[:2]
    notes = {name: f"verified {int((bound > 0).sum())}" for name, bound in bounds.items()}
    for name in list(bounds)[2:]:
        looser, as_searched, tighter = (
            float(t.max())
            for t in (bounds[name] - checked, bounds[name] - search, checked - bounds[name])
        )
        notes[name] += (
            f", checked is looser by at most {looser:.1e}, tighter by at most {tighter:.1e}; "
            f"search looser by at most {as_searched:.1e}"
        )
        notes[name] += (
            f"; checked looser by over 1e-4 at {int((bounds[name] - checked > 1e-4).sum())} "
            f"points; bounds of size {float(checked.abs().median()):.1e}"
        )
    print(
        f"\n{case.network}, linf {case.radius:.4g}: {len(x)} of {points} points are classified "
        f"correctly; captured in {captured:.2f} s"
    )
    common.table(seconds, notes)


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--only", choices=[case.network for case in CASES])
    parser.add_argument(
        "--all", action="store_true", help="auto_LiRPA's matrix mode as well: minutes"
    )
    options = parser.parse_args()
    library = common.start(
        "CROWN: seconds, verified points and the tightness of bounds", ["auto_LiRPA"]
    ).get("auto_LiRPA")
    for case in CASES:
        if options.only in (None, case.network):
            compare(case, library, options)


if __name__ == "__main__":
    main()
