"""Attacks that start where lower bounds of the margins are lowest."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from calipers.attacks.engine.targets import looked_at, rank_targets, target_count
from calipers.errors import CaptureError, UnsupportedOp
from calipers.problem.capabilities import Capabilities
from calipers.problem.interrupts import relayed
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Startable

# bytes of the starts of a block of points, and starts per target class that this assumes
_BYTES, _STARTS = 2**28, 4


class Guide(Protocol):
    """Names points worth starting from."""

    def __call__(self, problem: Problem, columns: Tensor | None = None) -> Tensor:
        """Return starts (N, R, S, *D): R for each of the S margins' classes.

        All classes, or those of the margin columns `columns (N, S)`.

        Raises `UnsupportedOp` or `CaptureError` where the model has no graph.
        """


@dataclass(frozen=True)
class WarmStarted:
    """An attack that starts where lower bounds of the margins are lowest.

    Those points are the adversarial examples of the relaxed network; the attack begins there
    instead of at random. A linear lower bound covers the whole region at once, so its minimiser
    lies in the right corner also where gradients at the point carry no information. On a model that
    cannot be captured, the attack starts as it does alone. The bounds are handed over as points
    only: no certificate is involved.

    Cost: the attack's, and the guide's.

    Args:
        attack: An attack that takes `starts`, such as APGD.
        starts: Computes the starts from the problem.

    Raises:
        BadInput: At the call, where the attack does not fit the problem. Models that cannot be
            captured raise nothing here.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "an attack started where linear bounds of the network are lowest",
        needs="operations",
        inner=("attack",),
    )

    attack: Startable
    starts: Guide

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the attack's candidates.

        Of many classes, only those that the attack will take are asked about, and of large inputs a
        block of points at a time: starts for a thousand classes of one image of 224 x 224 take a
        gigabyte.
        """
        targets, margins = (
            target_count(problem, getattr(self.attack, "targets", 0)),
            problem.classes - 1,
        )
        few = (
            targets > 0
            and looked_at(problem, targets) < margins
            and "columns" in inspect.signature(self.attack).parameters
        )
        size = (
            _STARTS
            * (targets if few else margins)
            * problem.x[:1].numel()
            * problem.x.element_size()
        )
        for places in torch.arange(len(problem), device=problem.x.device).split(
            max(1, _BYTES // max(1, size))
        ):
            part = problem.take(places)
            yield from relayed(
                self._block(part, rank_targets(part, targets) if few else None, seed),
                partial(Attempt.at_places, places=places),
            )

    def _block(self, problem: Problem, columns: Tensor | None, seed: int) -> Iterator[Attempt]:
        named = {} if columns is None else {"columns": columns}
        try:
            starts: Tensor | None = self.starts(problem, **named)
        except (UnsupportedOp, CaptureError):
            starts = None
        yield from self.attack(problem, seed=seed, starts=starts, **named)
