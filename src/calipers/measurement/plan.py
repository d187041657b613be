"""Plans and stages: which tools run, in what order, on which points."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from calipers.errors import BadInput
from calipers.problem.protocols import Attack, Certifier

Guarantee = Literal["float64-checked", "float32-executed"]
_POINTS = {"attack": 256, "certifier": 256}


@dataclass(frozen=True)
class Stage:
    """A tool and the points it is run on.

    Args:
        tool: The attack or certifier.
        kind: "attack" or "certifier".
        objective: "verdict" runs the tool on the points whose verdict at the radius asked is open.
            "distance" runs it on every point that the model classifies correctly, to narrow its
            bracket; such a tool starts from what is known of the point.
        pilot: Number of random points, of those still open, that the tool is tried on first; the
            others are tried only where it settles any of these. The record keeps how many were
            tried, so that a bound on what the audit may have missed can be stated. None, the
            default, tries all points.
        fallback: Run the stage only where the stage before it, a better tool, was too expensive for
            its share of the time or for the memory.
        family: Name of a family of attacks, "" for none. Families that follow each other are not a
            sequence, they stand side by side (`measurement.portfolio`): each is tried on a sample
            of what is left, of the size that its audit says, and the family that breaks most points
            per second goes first.
        waits: Run the family after all families that do not wait.
        near: Relative excess of a deep search of a family. The search is worth its time on points
            whose nearest known adversarial example lies beyond the radius by no more than this
            share of it; the other points are tried only where it breaks any point of its sample
            that lies farther away. With an audit of 0 the other points are never tried, and a few
            of the nearest points decide. With `near` 0 no point counts as near, and the random
            sample alone decides. None, the default: the stage makes no such distinction.

    Returns:
        A frozen dataclass. Two stages with equal fields are equal.

    Raises:
        Nothing. Settings of a tool are checked by the tool.

    Example:
        >>> from calipers.attacks import PGD
        >>> from calipers.measurement.plan import Stage
        >>> stage = Stage(PGD(steps=10), "attack", pilot=32)
        >>> stage.objective, stage.block
        ('verdict', 256)
    """

    tool: Attack | Certifier
    kind: Literal["attack", "certifier"]
    objective: Literal["verdict", "distance"] = "verdict"
    pilot: int | None = None
    fallback: bool = False
    family: str = ""
    waits: bool = False
    near: float | None = None

    @property
    def name(self) -> str:
        """The tool's repr: its settings, which identify it in the record."""
        return repr(self.tool)

    @property
    def by_the_clock(self) -> bool:
        """Whether the tool has a time limit for each point.

        If so, each point is recorded as tried as soon as it is done, and its time is not granted
        again when a run is resumed.
        """
        return hasattr(self.tool, "seconds")

    def proving(self) -> Stage:
        """Return the stage with its tool writing proof files, if it can.

        The name of the tool in the record stays the same.
        """
        if not hasattr(self.tool, "proofs"):
            return self
        tool: Any = self.tool
        return dataclasses.replace(self, tool=dataclasses.replace(tool, proofs=True))

    @property
    def block(self) -> int:
        """The number of points dealt at once.

        A block is recorded as tried only when all of it has been.
        """
        return _POINTS[self.kind]


@dataclass(frozen=True)
class Plan:
    """Everything that a run is: its stages in order, and its settings.

    Args:
        name: Name of the plan, as reports print it. Without `stages` it is one of the plans of
            calipers: "quick", "standard", "brackets" (standard, then the distances of all points),
            "thorough", "complete" (branch and bound, which decides what it can), "autoattack",
            "distance", "categorical"; or "", the usual one for the threat.
        stages: The stages, in the order in which they run, cheapest first.
        next_step: Command (without the word calipers) that would settle more of what this plan
            leaves open; reports pass it on.
        seed: Seed of all random starts and samples.
        seconds: Time limit of the whole run in seconds of wall-clock time; it ends a tool inside a
            block too. None: no limit.
        lower_share: Bound on the time of certifiers that prove nothing, as a share of the processor
            time of the attacks (a few seconds are always granted); `math.inf` for no bound. What is
            not run for this reason is reported with the time that it would take. None: as the named
            plan says (0.75; "autoattack", "categorical" and "complete" have no bound), and no bound
            for `stages` of your own.
        proofs: Whether to keep a proof file for each certificate, which `check` verifies
            independently; needs a record to last.
        guarantee: What certificates are about: the network in real arithmetic ("float64-checked",
            the default) or as float32 runs it, whatever the order of its sums ("float32-executed").
            Certificates that a record holds already keep theirs.

    Returns:
        A frozen dataclass.

    Raises:
        BadInput: For a time or a share below 0. Names, tools and guarantees are checked when the
            plan is used.

    Example:
        >>> import calipers
        >>> calipers.Plan("quick", seconds=60, seed=1).stages  # those of the plan of that name
        ()
        >>> from calipers.attacks import PGD
        >>> from calipers.certificates import CROWN
        >>> from calipers.measurement.plan import Plan, Stage
        >>> stages = (Stage(PGD(), "attack"), Stage(CROWN(), "certifier"))
        >>> plan = Plan("mine", stages, seconds=600)
        >>> [stage.kind for stage in plan.stages]
        ['attack', 'certifier']
    """

    name: str = ""
    stages: tuple[Stage, ...] = ()
    next_step: str = ""
    seed: int = 0
    seconds: float | None = None
    lower_share: float | None = None
    proofs: bool = False
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds >= 0:
            raise BadInput(f"seconds is a time of 0 or more, or None; got {self.seconds}")
        if self.lower_share is not None and not self.lower_share >= 0:
            raise BadInput(
                "lower_share is a share of the attacks' time, 0 or more, or math.inf; got "
                f"{self.lower_share}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are set, by name, without the seed: for the record."""
        every = {
            "seconds": self.seconds,
            "lower_share": self.lower_share,
            "proofs": self.proofs or None,
            "guarantee": self.guarantee,
        }
        return {key: value for key, value in every.items() if value is not None}
