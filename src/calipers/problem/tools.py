"""Who may answer the question? The protocols of the two jaws, and what they hand over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from calipers.problem.problem import Problem


@dataclass(frozen=True, eq=False)
class Attempt:
    """What an attack proposes for some points: the best candidate it found for each, and what it
    spent.

    `index (M,)` places in the problem, `candidate (M, *D)`, `forwards`, `backwards (M,)` passes
    spent on each point. Whether a candidate counts is the referee's word.
    """

    index: Tensor
    candidate: Tensor
    forwards: Tensor
    backwards: Tensor


@dataclass(frozen=True, eq=False)
class Claim:
    """What a certifier claims for some points: nothing adversarial within `radius (M,)` (0 claims
    nothing), float64, closed ball.

    `margin (M,)` is the lower bound of the worst margin at that radius (at the asked radius where
    nothing could be proved), `guarantee` the arithmetic it holds in, `forwards`, `backwards (M,)`
    the cost in passes through the network (one pass for each row of bounds). `proofs`, where they
    were asked for: a file for each point that is claimed, from which anybody can prove the claim
    again. Not `final`: an interrupt came while the points were at work; what is claimed stands, but
    the tool has not come to its end there, and a run that is taken up asks it again.
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
    """What a certifier expects to need, from a small measurement on one point: `seconds` of
    processor time a point, and `held` bytes at once.

    `hopeless` says why it will not prove the point, where a cheaper bound shows that; empty
    otherwise. Estimates, not promises.
    """

    seconds: float
    held: int = 0
    hopeless: str = ""


class Attack(Protocol):
    """Proposes points. Settings are the fields of a frozen dataclass; its repr is its identity in
    the record.
    """

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield candidates as soon as points are decided; every point of the problem is mentioned
        exactly once.
        """


class Startable(Protocol):
    """An attack that takes starts."""

    def __call__(
        self, problem: Problem, *, seed: int = 0, starts: Tensor | None = None
    ) -> Iterator[Attempt]:
        """Yield candidates; `starts (N, R, S, *D)` are R for each of the S margins, and jobs beyond
        them begin at the attack's own.
        """


class Certifier(Protocol):
    """Claims radii. Settings are the fields of a frozen dataclass; its repr is its identity in the
    record.
    """

    def __call__(
        self, problem: Problem, *, seed: int = 0
    ) -> Iterator[Claim] | Iterator[Claim | Attempt]:
        """Yield claims as soon as points are decided, one about every point; a complete tool also
        hands over the counterexamples it meets.
        """


@runtime_checkable
class Foreseeing(Protocol):
    """A certifier that can tell what it will cost."""

    def forecast(self, problem: Problem) -> Forecast:
        """Return what one point of this problem, which holds one, will cost; itself cheap beside
        that.
        """
