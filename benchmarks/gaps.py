"""How far from the truth does each method stop? Radii of certificates and distances of attacks over
exact distances, on random small networks.

Dense and convolutional networks of two to four layers, ReLU, max-pooling in every fourth; a random
point of the unit box each; three norms. "beyond" counts certificates above an example or attacks
below the exact lower end: any is a bug. The last line compares distances that the own linear region
decides (d_D <= d_B) with those of the mixed-integer search.

    PYTHONPATH=src python benchmarks/gaps.py [--networks 200] [--seconds 30]
"""

from __future__ import annotations

import argparse

import common
import numpy as np
import torch
from torch import nn

from calipers.geometry.regions import regions_of
from calipers.presets import tool_from
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.ball import Ball

CERTIFIERS = {
    "intervals": "CertifiedRadius(IBP())",
    "CROWN": "CertifiedRadius(CROWN())",
    "alpha-CROWN": "CertifiedRadius(AlphaCROWN())",
}
ATTACKS = {
    "FMN": "FMN(steps=50)",
    "IterativeTightening": "IterativeTightening(FMN(steps=50), "
    "WarmStarted(APGD(steps=20, targets=9, successive_halving=True), "
    "RelaxationMinimizers(2)))",
}
NORMS = ("linf", "l2", "l1")


def random_network(seed: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Return a random network, float64, and the shape of its points."""
    torch.manual_seed(seed)
    depth, pick = 2 + seed % 3, lambda low, high: int(torch.randint(low, high, ()))
    layers: list[nn.Module] = []
    if seed % 2:
        shape: tuple[int, ...] = (pick(1, 3), 4, 4)
        channels = shape[0]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(channels, channels := pick(2, 4), 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if seed % 4 == 1 else [nn.AvgPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(channels * 4, 4)]
    else:
        shape = (pick(4, 12),)
        width = shape[0]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width := pick(5, 12)), nn.ReLU()]
        layers += [nn.Linear(width, 4)]
    return nn.Sequential(*layers).double().eval().requires_grad_(False), shape


def ends(tool: str, problem: Problem) -> tuple[float, float]:
    """Return the radius that a tool proves for the only point, and the distance of the nearest
    example that it finds.
    """
    lower, upper = 0.0, np.inf
    for result in tool_from(tool)(problem):
        if not isinstance(result, Attempt):
            lower = max(lower, float(result.radius.max())) if len(result.radius) else lower
            continue
        for point in result.candidate:
            wrong = bool(
                (
                    problem.goal.worst(problem.margins(problem.classifier.logits64(point[None])))
                    <= 0
                ).all()
            )
            upper = min(upper, float(problem.region.distance(point[None]))) if wrong else upper
    return lower, upper


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0, help="for an exact distance")
    options = parser.parse_args()
    common.start(
        "Radii and distances of methods, as shares of the exact distance, on random small networks"
    )
    shares = {norm: {name: list[float]() for name in [*CERTIFIERS, *ATTACKS]} for norm in NORMS}
    closed, beyond, inside, apart, asked = (
        dict.fromkeys(NORMS, 0),
        0,
        0,
        0.0,
        dict.fromkeys(NORMS, 0),
    )
    for seed in range(options.networks):
        model, shape = random_network(seed)
        norm, x = NORMS[(seed // 2) % 3], torch.rand(1, *shape, dtype=torch.float64)
        widest = {"linf": 1.0, "l2": x.numel() ** 0.5, "l1": float(x.numel())}[norm]
        problem = Problem.pose(model, x, model(x).argmax(1), Ball(norm, widest))
        found = {name: ends(tool, problem)[1] for name, tool in ATTACKS.items()}
        nearest = min(found.values())
        if not np.isfinite(nearest):
            continue
        low, high = ends(
            f"MILP(seconds={options.seconds})", problem.at(torch.tensor([nearest * 1.001]))
        )
        high = min(high, nearest)
        asked[norm] += 1
        closed[norm] += high - low <= 1e-5 * high
        region = regions_of(problem)
        if bool(region.exact[0]):
            inside, apart = inside + 1, max(apart, abs(float(region.decision[0]) - low) / high)
        for name, tool in CERTIFIERS.items():
            radius = ends(tool, problem.at(torch.tensor([high * 1.001])))[0]
            beyond += radius >= high
            shares[norm][name].append(radius / high)
        for name, distance in found.items():
            beyond += distance < low
            if np.isfinite(distance):
                shares[norm][name].append(distance / high)
    print(f"{'norm':6} networks  exact  " + "  ".join(f"{name:>12}" for name in shares["linf"]))
    for norm in NORMS:
        print(
            f"{norm:6} {asked[norm]:8} {closed[norm]:6}  "
            + "  ".join(f"{np.mean(held):12.4f}" for held in shares[norm].values())
        )
    print(f"certificates or attacks beyond the exact end: {beyond}")
    print(
        f"points whose own region decides: {inside}; largest difference from the mixed-integer "
        f"search: {apart:.1e} of the distance"
    )


if __name__ == "__main__":
    main()
