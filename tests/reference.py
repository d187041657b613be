"""The small trained networks that come with the tests, the points they are asked about, and exact
distances known there.

scripts/train_reference_nets.py makes the networks, scripts/reference_distances.py the distances.
"""

from __future__ import annotations

import csv
import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

FOLDER = Path(__file__).resolve().parent / "data" / "nets"
_SPEC = importlib.util.spec_from_file_location(
    "train_reference_nets",
    FOLDER.parents[2] / "scripts" / "train_reference_nets.py",
)
assert _SPEC is not None and _SPEC.loader is not None
TRAINING = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(TRAINING)


@cache
def network(name: str) -> nn.Module:
    """Return a stored network: float32, frozen, in evaluation mode."""
    model: nn.Module = TRAINING.NETS[name]()
    with np.load(FOLDER / f"{name}.npz") as arrays:
        model.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
    return model.eval().requires_grad_(False)


class Known(NamedTuple):
    """Points of a network with proved ends (N,) of the distance to the nearest adversarial one."""

    problem: Problem
    lower: Tensor
    upper: Tensor


def known(name: str, norm: str, radius: float = 0.1, most: int | None = None) -> Known:
    """Return the first `most` points whose distance is known, posed at a radius."""
    with (FOLDER / "distances.csv").open() as lines:
        rows = [
            row for row in csv.DictReader(lines) if (row["network"], row["norm"]) == (name, norm)
        ][:most]
    index = [int(row["point"]) for row in rows]
    _, _, x, y = TRAINING.points(name)
    lower, upper = (
        torch.tensor([float(row[end]) for row in rows], dtype=torch.float64)
        for end in ("lower", "upper")
    )
    problem = Problem.pose(network(name), x[index], y[index], Ball(norm, radius))
    return Known(problem, lower, upper)
