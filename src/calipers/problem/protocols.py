"""Protocols of attacks and certifiers, and what they return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from calipers.problem.problem import Problem


@dataclass(frozen=True, eq=False)
class Attempt:
    """What an attack proposes for some points, and what that cost.

    `index (M,)` places in the problem, `candidate (M, *D)` the best candidate found for each,
    `forwards`, `backwards (M,)` passes spent on each point. Whether a candidate is adversarial is
    checked elsewhere.
    """

    index: Tensor
    candidate: Tensor
    forwards: Tensor
    backwards: Tensor

    def at_places(self, places: Tensor) -> Attempt:
        """Return the same for a larger problem, with the points at `places (N,)`."""
        return replace(self, index=places[self.index])


@dataclass(frozen=True, eq=False)
class Claim:
    """What a certifier claims for some points.

    Nothing adversarial lies within `radius (M,)` (0 claims nothing), float64, closed ball. `margin
    (M,)` is the lower bound of the worst margin at that radius (at the asked radius where nothing
    could be proved), `guarantee` the arithmetic that the proof holds in, `forwards`, `backwards
    (M,)` the cost in passes through the network (one pass for each row of bounds). `proofs`, where
    asked for: a file for each point that is claimed, from which anybody can check the claim again.
    `final` is False if an interrupt came while the points were in work; what is claimed stands, but
    the tool had not finished there, and a resumed run asks it again.
    """

    index: Tensor
    radius: Tensor
    margin: Tensor
    guarantee: Literal["real", "float64-checked", "float32-executed"]
    forwards: Tensor
    backwards: Tensor
    proofs: tuple[bytes | None, ...] | None = None
    final: bool = True


@dataclass(frozen=True)
class Forecast:
    """What a certifier expects to need, from a small test on one point.

    `seconds` of processor time for each point, and `held` bytes at once. `hopeless` says why it
    will not prove the point, where a cheaper bound shows that; empty otherwise. Estimates, not
    promises.
    """

    seconds: float
    held: int = 0
    hopeless: str = ""


class Attack(Protocol):
    """A tool that proposes adversarial examples.

    Its settings are the fields of a frozen dataclass; its repr is its identity in the record.
    """

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield candidates as soon as points are decided.

        Every point of the problem is mentioned exactly once.
        """


class Startable(Protocol):
    """An attack that accepts starting points."""

    def __call__(
        self, problem: Problem, *, seed: int = 0, starts: Tensor | None = None
    ) -> Iterator[Attempt]:
        """Yield candidates, from given starting points.

        `starts (N, R, S, *D)` are R starting points for each of the S margins; runs beyond these
        begin at the attack's own.
        """


class Certifier(Protocol):
    """A tool that proves radii.

    Its settings are the fields of a frozen dataclass; its repr is its identity in the record.
    """

    def __call__(
        self, problem: Problem, *, seed: int = 0
    ) -> Iterator[Claim] | Iterator[Claim | Attempt]:
        """Yield claims as soon as points are decided, one for every point.

        A complete tool also yields the counterexamples that it finds.
        """


@runtime_checkable
class Foreseeing(Protocol):
    """A certifier that can predict its cost."""

    def forecast(self, problem: Problem) -> Forecast:
        """Return what the point of this problem, which holds one, will cost.

        The forecast itself is cheap in comparison.
        """
