"""Find exact distances of the tests' reference network `small`, each twice and independently.

`calipers.distance(..., exact=True)` proves both ends. The distance is then computed once more by
means that share no code with the package: every pattern of the eight neurons by itself, with a
linear program of scipy, or non-negative least squares for l2. Where the two do not agree the
script stops.

    python scripts/reference_distances.py
"""

from __future__ import annotations

import csv
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls
from torch import nn

import calipers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_reference_nets import FOLDER, NETS, points

Array = NDArray[np.float64]
Layers = list[tuple[Array, Array]]  # weights and biases, a ReLU between two
ASKED = (("small", "linf", 8), ("small", "l2", 8), ("small", "l1", 8))
FIRST = {"linf": 0.5, "l2": 1.0, "l1": 1.5}  # a radius from which the search begins
CLOSE = 1e-6  # how near both are: the package's claims stop 2e-7 short of the distance
WIDE = 1e-4  # an example of float32 stands as much farther out


def stored(name: str) -> nn.Sequential:
    """Return a network as it was stored."""
    model = NETS[name]()
    with np.load(FOLDER / f"{name}.npz") as arrays:
        model.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
    return model.eval().requires_grad_(False)


def dense(model: nn.Sequential, shape: tuple[int, ...]) -> Layers:
    """Return the network as dense layers in float64: read off at unit inputs."""
    found, part, size = [], list[nn.Module](), shape
    for layer in [*model.double(), nn.ReLU()]:
        if not isinstance(layer, nn.ReLU):
            part.append(layer)
            continue
        step, count = nn.Sequential(*part), math.prod(size)
        bias = step(torch.zeros(1, *size, dtype=torch.float64))
        units = torch.eye(count, dtype=torch.float64).reshape(count, *size)
        found.append(((step(units) - bias).flatten(1).T.numpy(), bias.flatten().numpy()))
        part, size = [], tuple(bias.shape[1:])
    return found


def by_patterns(layers: Layers, x: Array, y: int, norm: str) -> float:
    """Return the distance within [0, 1] by trying every pattern of one hidden layer's neurons.

    Polytopes are taken in the order of their l2 distance, which rules out most of them: l1 is at
    least as long, and linf at least 1 / sqrt(features) of it.
    """
    (w, b), (v, c) = layers
    box, ends = np.vstack([np.eye(len(x)), -np.eye(len(x))]), np.repeat([1.0, 0.0], len(x))
    polytopes = []
    for pattern in itertools.product((0.0, 1.0), repeat=len(b)):
        on = np.array(pattern)
        sign = 1 - 2 * on  # sign * (w x + b) <= 0
        inner, outer = v @ (on[:, None] * w), v @ (on * b) + c
        for other in (k for k in range(len(c)) if k != y):
            rows = np.vstack([sign[:, None] * w, inner[y] - inner[other], box])
            limits = np.concatenate([-sign * b, [outer[other] - outer[y]], ends])
            polytopes.append((euclidean(rows, limits, x), len(polytopes), rows, limits))
    polytopes.sort()
    if norm == "l2":
        return polytopes[0][0]
    best, share = math.inf, 1.0 if norm == "l1" else 1 / math.sqrt(len(x))
    for length, _, rows, limits in polytopes:
        if length * share >= best:
            break
        best = min(best, nearest(rows, limits, x, norm))
    return best


def euclidean(rows: Array, limits: Array, x: Array) -> float:
    """Return the l2 distance from x to the polytope rows z <= limits, infinite if it is empty.

    Least distance programming (Lawson and Hanson 1974, chapter 23): -rows delta >= rows x - limits.
    """
    right = rows @ x - limits
    _, left = nnls(np.vstack([-rows.T, right]), np.append(np.zeros(len(x)), 1.0))
    return math.inf if left < 1e-6 else math.sqrt(max(0.0, 1 / left**2 - 1))


def nearest(rows: Array, limits: Array, x: Array, norm: str) -> float:
    """Return the linf or l1 distance to the polytope rows z <= limits, infinite if it is empty."""
    d = len(x)
    size = 1 if norm == "linf" else d
    spread = np.ones((d, 1)) if norm == "linf" else np.eye(d)
    program = linprog(
        np.append(np.zeros(d), np.ones(size)),
        np.block(
            [[rows, np.zeros((len(rows), size))], [np.eye(d), -spread], [-np.eye(d), -spread]]
        ),
        np.concatenate([limits, x, -x]),
        bounds=[(None, None)] * (d + size),
    )
    return float(program.fun) if program.status == 0 else math.inf


def rows_of(name: str, norm: str, count: int) -> list[list[str]]:
    """Return a row of the table for each of the first points that the network gets right."""
    model, (_, _, x, y) = stored(name), points(name)
    right = torch.nonzero(model(x).argmax(1) == y).flatten()[:count]
    x, y = x[right], y[right]
    threat = calipers.Ball(norm, FIRST[norm])
    found = calipers.distance(model, x, y, threat, exact=True, record=None, seconds=1e6)
    layers, rows = dense(model, tuple(x.shape[1:])), []
    for i, point in enumerate(right.tolist()):
        lower, upper = float(found.lower[i]), float(found.upper[i])
        here, label = x[i].double().flatten().numpy(), int(y[i])
        again = by_patterns(layers, here, label, norm)
        if abs(again - lower) > CLOSE * lower or not lower < upper <= lower * (1 + WIDE):
            sys.exit(f"{name}, {norm}, point {point}: {lower!r} to {upper!r}, but {again!r}")
        rows.append([name, norm, str(point), repr(lower), repr(upper), repr(again)])
    return rows


def main() -> None:
    """Write the table beside the networks."""
    with (FOLDER / "distances.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["network", "norm", "point", "lower", "upper", "again"])
        for name, norm, count in ASKED:
            begun = time.process_time()
            out.writerows(rows_of(name, norm, count))
            file.flush()
            print(f"{name}, {norm}: {count} agree; {time.process_time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
