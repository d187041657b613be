"""Every attack there is, small enough to run by the dozen, each on a threat that it answers: what
holds for attacks is tested on all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from calipers.attacks.apgd import APGD
from calipers.attacks.pgd import PGD
from calipers.certificates.attack_starts import RelaxationMinimizers
from calipers.errors import BadInput
from calipers.presets import ATTACKS
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt
from calipers.threats.ball import Ball
from calipers.threats.substitutions import Substitutions, one_hot_groups

F64 = torch.float64
_SMALL = {
    "steps": 8,
    "queries": 60,
    "pairs": 4,
    "probes": 6,
    "starts": 20,
    "rounds": 2,
    "samples": 2,
    "eval_samples": 3,
    "limit": 200,
}
_OWN: dict[str, dict[str, Any]] = {
    "AdaptiveRestarts": {"restarts": 2},
    "FiniteDifferences": {"search": 20},
}
_HANDED: dict[str, Any] = {
    "attack": PGD(steps=8, restarts=2),
    "starts": RelaxationMinimizers(1),
    "backward": (),
    "refine": PGD(steps=8),
    "restart": PGD(steps=8),
}
_THREATS: dict[str, Callable[[float], Any]] = {
    "linf": lambda r: Ball("linf", 0.15 * r, box=(0, 1)),
    "l2": lambda r: Ball("l2", 0.3 * r, box=(0, 1)),
    "l0": lambda r: Ball("l0", 2.0, box=(0, 1)),
    "letters": lambda r: Substitutions(one_hot_groups(4, 3), k=2),
}


def _fitting(tool: type[Any]) -> Attack | None:
    """Return the tool with small settings; None where it needs something that nobody can guess."""
    settings = {
        f.name: _SMALL[f.name] for f in dataclasses.fields(tool) if f.name in _SMALL
    } | _OWN.get(tool.__name__, {})
    required = [
        f.name
        for f in dataclasses.fields(tool)
        if f.default is f.default_factory is dataclasses.MISSING
    ]
    if any(name not in _HANDED for name in required):
        return None
    settings |= {name: _HANDED[name] for name in required}
    if "starts" in required:
        settings["attack"] = APGD(steps=8, targets=2, successive_halving=True)
    return tool(**settings)  # type: ignore[no-any-return]


@cache
def arsenal() -> dict[str, tuple[Attack, str]]:
    """Return for each name in the table of attacks a small one, and the threat it is tried on;
    targeted APGD besides.
    """
    found: dict[str, tuple[Attack, str]] = {}
    tools = {name: _fitting(tool) for name, tool in ATTACKS.items()} | {
        "APGD, targets": APGD(steps=8, targets=2)
    }
    for name, attack in tools.items():
        for threat in _THREATS if attack is not None else ():
            try:
                list(attack(pose(net(threat), threat, n=1)))  # type: ignore[misc]
            except BadInput:
                continue
            found[name] = (attack, threat)  # type: ignore[assignment]
            break
    return found


class RowWise(nn.Module):
    """A network of sums instead of matrix products: every point's answer is the same to the last
    bit in every batch.
    """

    def __init__(self, inputs: int = 12, hidden: int = 10, classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(torch.randn(hidden, inputs, generator=generator, dtype=F64))
        self.last = nn.Parameter(torch.randn(classes, hidden, generator=generator, dtype=F64))
        self.shift = nn.Sequential(nn.BatchNorm1d(hidden).double(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, *D) -> (N, K)."""
        hidden = (x.flatten(1)[:, None, :] * self.first).sum(2).tanh()
        return (self.shift(hidden)[:, None, :] * self.last).sum(2)


def net(threat: str = "linf", classes: int = 4) -> nn.Module:
    """Return a network for the points of a threat, in evaluation."""
    return RowWise(classes=classes).eval()


def points(threat: str = "linf", n: int = 10) -> Tensor:
    """Return points (n, 12): random ones of the box, or random symbols."""
    generator = torch.Generator().manual_seed(11)
    if threat == "letters":
        return (
            nn.functional.one_hot(torch.randint(3, (n, 4), generator=generator), 3)
            .flatten(1)
            .to(F64)
        )
    return torch.rand(n, 12, generator=generator, dtype=F64)


def pose(model: Any, threat: str = "linf", n: int = 10, size: float = 1.0) -> Problem:
    """Return the question about points that the model gets right."""
    x = points(threat, n)
    with torch.no_grad():
        y = model(x).argmax(1)
    return Problem.pose(model, x, y, _THREATS[threat](size))


def collected(attack: Attack, problem: Problem, seed: int = 0) -> tuple[Tensor, list[Attempt]]:
    """Return the candidates in the problem's order; every point is mentioned once."""
    attempts = list(attack(problem, seed=seed))
    index = torch.cat([a.index for a in attempts])
    assert sorted(index.tolist()) == list(range(len(problem)))
    return torch.cat([a.candidate for a in attempts])[index.argsort()], attempts


class Noise(nn.Module):
    """Adds normal noise to its input, from the shared generator as users' models do."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(N, *D) -> (N, *D)."""
        return x + self.size * torch.randn_like(x)


def keep_last(self: Any, slots: Any, take: list[int]) -> None:
    """Stand in for `Queue._keep`, and hold the last iterate in place of the best: a bug that most
    libraries have.
    """
    for i in take:
        self.best[int(slots.job[i]) % self.n] = slots.x[i]
