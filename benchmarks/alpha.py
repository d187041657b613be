"""Optimised slopes against auto_LiRPA's CROWN-Optimized at equal iterations: seconds, verified
points, and how the bounds compare. linf, right points.

Both optimise the slopes of the margins and of all intermediate bounds for so many iterations, on
every point, whether plain CROWN proves it or not (the certifier `AlphaCROWN` spares those). Ours is
what is claimed: confirmed in float64 with rounding accounted for. The fastest of two runs is kept,
of auto_LiRPA's that of its batch sizes.

    PYTHONPATH=src python benchmarks/alpha.py [--iterations 20] [--points 50] \\
        [--only mnist_6x100_nat] [--batches 1 10 50]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType

import common
import torch
import trained
from crown import BATCHES, CASES, Case
from torch import Tensor

from calipers.bounds.backward import relax
from calipers.bounds.dual_bound import Dual, Root
from calipers.bounds.float64_check import confirmed
from calipers.bounds.intermediate import sharpening
from calipers.bounds.optimise import Ascent
from calipers.bounds.rounding import CHECKED, SEARCH, plain_sums
from calipers.certificates.alpha_crown import ALPHA_STEP
from calipers.certificates.crown import batches
from calipers.graph.capture import graph_of
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball


def ours(problem: Problem, iterations: int) -> Tensor:
    """Return the confirmed bound of each point's worst margin, slopes optimised everywhere."""
    return torch.cat(
        [
            _bounds(
                problem.take(index), Ascent(iterations, ALPHA_STEP, enough=torch.inf), iterations
            )
            for index in batches(problem)
        ]
    )


def _bounds(problem: Problem, ascent: Ascent, iterations: int) -> Tensor:
    graph = graph_of(problem.classifier, problem.x).to(CHECKED.dtype)
    region, small = (
        problem.threat.region(problem.x.double(), outward=True),
        problem.threat.region(problem.x.to(SEARCH.dtype)),
    )
    rows = problem.goal.rows(problem.y, problem.classes).double()
    with torch.no_grad(), plain_sums():
        known = relax(graph, region, CHECKED).boxes
        # Boxes that settle an element need not be the tightest: ascents of intermediate values may
        # stop there.
        root = Root.of(
            relax(
                graph,
                region,
                CHECKED,
                known,
                tighten=sharpening(Ascent(iterations, ALPHA_STEP), small),
            ),
            SEARCH.dtype,
            small,
        )
        place = torch.arange(len(problem)).repeat_interleave(rows.shape[1])
        spec = rows.flatten(0, 1)[:, None]
        dual = Dual(root, place, len(graph.nodes), spec.to(SEARCH.dtype))
        bounds = confirmed(dual, ascent(dual, dual.guess())[1], spec)
    return bounds.view(len(problem), -1).amin(1)


def theirs(
    library: ModuleType, problem: Problem, radius: float, batch: int, iterations: int
) -> Callable[[], Tensor]:
    """Return auto_LiRPA's optimised bounds on the same question; each batch gets fresh slopes."""
    from auto_LiRPA.perturbations import PerturbationLpNorm

    rows = problem.goal.rows(problem.y, problem.classes)
    options = {
        "conv_mode": "patches",
        "optimize_bound_args": {"iteration": iterations},
        "verbosity": 0,
    }
    module = library.BoundedModule(
        problem.classifier.network, problem.x[:batch], bound_opts=options, device="cpu"
    )

    def run() -> Tensor:
        found = []
        for x, c in zip(problem.x.split(batch), rows.split(batch), strict=True):
            ball = PerturbationLpNorm(
                norm=torch.inf,
                eps=radius,
                x_L=(x - radius).clamp(0, 1),
                x_U=(x + radius).clamp(0, 1),
            )
            lower, _ = module.compute_bounds(
                x=(library.BoundedTensor(x, ball),),
                C=c,
                method="CROWN-Optimized",
                bound_upper=False,
            )
            found.append(lower.detach().amin(1))
        return torch.cat(found)

    return run


def compare(case: Case, library: ModuleType | None, options: argparse.Namespace) -> None:
    model = trained.network(case.network)
    if model is None:
        return
    x, y = common.right(
        model,
        *(
            common.cifar(options.points)
            if case.network.startswith("cifar")
            else common.digits(options.points)
        ),
    )
    problem = Problem.pose(model, x, y, Ball("linf", case.radius))
    graph_of(problem.classifier, problem.x)
    bounds: list[Tensor] = []
    seconds = min(
        common.clock(lambda: bounds.append(ours(problem, options.iterations))) for _ in range(2)
    )
    print(
        f"\n{case.network}, linf {case.radius:.4g}, {len(x)} points, {options.iterations} "
        f"iterations\n  calipers (confirmed) {seconds:.2f} s",
        end="",
    )
    print(f", verified {int((bounds[0] > 0).sum())}, mean bound {float(bounds[0].mean()):.4f}")
    best: tuple[float, int, Tensor] | None = None
    for batch in options.batches if library is not None else ():
        try:
            held: list[Tensor] = []
            taken = common.clock(
                lambda: held.append(
                    theirs(library, problem, case.radius, batch, options.iterations)()
                )
            )
        except Exception as error:
            print(
                f"  auto_LiRPA, batch {batch}: fails ({type(error).__name__}: "
                f"{str(error).splitlines()[0]})"
            )
            continue
        best = (
            min(best, (taken, batch, held[0]), key=lambda t: t[0])
            if best
            else (taken, batch, held[0])
        )
    if best is None:
        return
    gap = (best[2].double() - bounds[0]) / bounds[0].abs().clamp_min(1e-6)
    print(
        f"  auto_LiRPA, batch {best[1]}: {best[0]:.2f} s, {best[0] / seconds:.2f} times ours",
        end="",
    )
    print(f", verified {int((best[2] > 0).sum())}, mean bound {float(best[2].mean()):.4f}")
    print(
        f"  ours looser by more than 1e-4 (relative) at {int((gap > 1e-4).sum())} points, at most "
        f"{float(gap.max()):.1e}",
        end="",
    )
    print(f"; tighter by at most {float(-gap.min()):.1e}")


def main() -> None:
    """Print three lines for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--only", choices=[case.network for case in CASES])
    parser.add_argument(
        "--batches", type=int, nargs="*", default=BATCHES, help="batch sizes to try auto_LiRPA with"
    )
    options = parser.parse_args()
    library = common.start(
        "Optimised slopes: seconds, verified points and tightness", ["auto_LiRPA"]
    ).get("auto_LiRPA")
    for case in CASES:
        if options.only in (None, case.network):
            compare(case, library, options)


if __name__ == "__main__":
    main()
