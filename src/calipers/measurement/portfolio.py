"""Families of attacks side by side: which are worth their time here.

No family of attacks is the strongest everywhere: gradient ascents are blind where gradients vanish
far inside a region, searches for the nearest example where a boundary is ragged, both where only
score-based attacks get further. First each family is tried on the same few random points: how many
it breaks per second determines its place in the order. Then each has its turn on what those before
have left: it is tried on a sample of it, and run on all of it where it breaks any of the sample. A
family that breaks none is left out, and the record says how many it may have missed; a stage
without an audit is run on all in any case. A family may have several stages, the quick one first:
the later ones follow where it was of use, or where few points are left. Families that wait come
last, in the plan's order. Stages for near misses look at a few points whose nearest known example
lies hardly beyond the radius, at all such points where that breaks any, and at no others. Such a
further look, for which there is no evidence yet, takes at most as long as all that came before it:
on a large network it would take hours.

The sample: as many random points as the stage's audit says, and eight more that came nearest to
being broken so far, by what the record holds. Only the random ones count for what may have been
missed. Seconds are the process's own, so that a busy machine does not change the order; they are
decided once and kept in the record, so that a resumed run deals the same blocks in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.measurement.plan import Stage
from calipers.problem.interrupts import Limit, OutOfTime, limited
from calipers.record.bracket import Bracket
from calipers.record.evidence import Evidence

_FIRST = 8  # random points on which every family is tried to find its place in the order
_FEW = 3 * _FIRST  # if no more points than this are open, the plan's own order is kept
# average relative gain in distance over a sample below which a search for the nearest example is
# not run on all points
_NEARER = 0.003
_LEAST = 10.0  # seconds that any further look may take
_DEALT = 0.02  # share of the recorded seconds: a process that spent less did not do the work itself


Counts = Callable[[str, int], bool]
"""(tool, place) -> whether the tool's findings there count by now.

A record may hold more than this run has come to.
"""


@dataclass(frozen=True)
class Table:
    """What a run lets its families of attacks see and do.

    Places are those of the problem's points. `known` is all evidence, as it grows; `before` what
    counts of earlier stages; `attacks` the names of all attacks of the plan. `open` says which
    places evidence leaves open; `deal` runs a stage on places (False when the time is up); `broken`
    counts those of them that this very tool has broken; `drawn` puts places in a random order, in
    which the order of two does not depend on the others; `decide` makes a decision or repeats it;
    `told` is called with the stage that begins and its number of points; `missed` with a stage that
    broke none of a sample and was not run on the rest.
    """

    names: Sequence[str]
    radii: NDArray[np.float64]
    known: list[Evidence]
    before: list[Evidence]
    attacks: set[str]
    open: Callable[[list[Evidence]], list[int]]
    deal: Callable[[Stage, list[int]], bool]
    broken: Callable[[Stage, list[int]], int]
    drawn: Callable[[list[int]], list[int]]
    decide: Callable[[str, Callable[[], Any]], Any]
    told: Callable[[str, int], None]
    missed: Callable[[Stage, dict[str, int]], None]

    def facts(self, counts: Counts) -> list[Evidence]:
        """Return the evidence that counts."""
        place = {name: i for i, name in enumerate(self.names)}
        return self.before + [e for e in self.known if counts(e.tool, place[e.point])]

    def seconds(self, stage: Stage, places: list[int]) -> float:
        """Return the recorded seconds of a tool on places, waiting included."""
        names = {self.names[i] for i in places}
        return sum(
            e.seconds
            for e in self.known
            if e.kind == "attempt" and e.tool == stage.name and e.point in names
        )

    def shares(self, counts: Counts) -> NDArray[np.float64]:
        """Return each nearest known example's distance as a share of the radius.

        The radius is the one asked. Infinite where no example is known.
        """
        upper = Bracket.of(self.names, self.facts(counts)).upper
        return np.divide(upper, self.radii, out=np.full_like(upper, np.inf), where=self.radii > 0)

    def spent(self) -> float:
        """Return the recorded seconds of all attacks of the plan.

        Waiting is included.
        """
        return sum(e.seconds for e in self.known if e.kind == "attempt" and e.tool in self.attacks)

    def nearest(self, places: list[int], counts: Counts) -> list[int]:
        """Return the places, those that came nearest to being broken first.

        They are sorted by the better of two ranks: by the lowest margin above 0 that an attack
        reached, and by the nearest example beyond the radius.
        """
        margin, at = np.full(len(self.names), np.inf), np.array(places)
        share, place = self.shares(counts), {name: i for i, name in enumerate(self.names)}
        for e in self.facts(counts):
            if e.kind == "attempt" and e.margin > 0 and e.tool in self.attacks:
                margin[place[e.point]] = min(margin[place[e.point]], e.margin)
        rank = np.minimum(
            *(value[at].argsort(kind="stable").argsort() for value in (margin, share))
        )
        return [places[i] for i in rank.argsort(kind="stable")]


def gains(
    names: Sequence[str],
    known: list[Evidence],
    stage: Stage,
    places: list[int],
    asked: NDArray[np.float64],
) -> bool:
    """Return whether a search for nearest examples is worth running on all.

    That is judged by a sample, the `places`: by how much nearer it came than the distances asked
    about. A certifier is worth it where it proved any distance there.
    """
    found = Bracket.of(names, [e for e in known if e.tool == stage.name])
    if stage.kind == "certifier":
        return bool((found.lower[places] > 0).any())
    share = found.upper[places] / asked[places]  # an infinite upper bound is no gain
    return bool(np.maximum(1 - share, 0).mean() >= _NEARER)


def aimed(stage: Stage) -> dict[str, str]:
    """Return {"aim": "distance"} for a stage that seeks distances, else {}.

    It is added to the counts in the record's note on an audit.
    """
    return {"aim": stage.objective} if stage.objective == "distance" else {}


def parts(stages: Sequence[Stage]) -> list[list[int]]:
    """Return the places of stages that belong together.

    Families that follow each other are one part, any other stage is its own.
    """
    grouped = groupby(range(len(stages)), key=lambda k: -1 if stages[k].family else k)
    return [list(ks) for _, ks in grouped]


def in_turn(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages for a run that cannot audit attacks, as plain stages.

    Kept are the certifiers, the attacks without an audit, and of each family that does not wait the
    first stage; stages for near misses are left out.
    """
    firsts = {stage.family: stage for stage in reversed(stages) if stage.family and not stage.waits}
    wanted = [stage for stage in stages if stage.near is None]
    kept = [
        stage
        for stage in wanted
        if stage.kind == "certifier" or stage.pilot is None or stage is firsts.get(stage.family)
    ]
    return tuple(replace(stage, pilot=None, family="") for stage in kept)


@dataclass
class Portfolio:
    """The families of one part of a plan, and what each was tried on so far."""

    table: Table
    stages: Sequence[Stage]
    clock: Callable[[], float]
    tried: dict[str, set[int]] = field(default_factory=dict)
    useful: set[str] = field(default_factory=set)
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def run(self) -> bool:
        """Give each family its turn; return False when the time is up."""
        families = {
            stage.family: [s for s in self.stages if s.family == stage.family]
            for stage in self.stages
        }
        order = self._order([stages[0] for stages in families.values()])
        return order is not None and all(
            self._turn(stage, stage is families[stage.family][0])
            for first in order
            for stage in families[first.family]
        )

    def _order(self, firsts: list[Stage]) -> list[Stage] | None:
        """Return the first stage of each family, the most effective first.

        That is by how many points of the first sample it breaks per second; families that wait come
        last. None when the time is up.
        """
        left, rates = self._open(), dict[str, float]()
        if len(left) > _FEW:
            sample = sorted(self.table.drawn(left)[:_FIRST])
            for stage in firsts:
                begun = self.clock()
                if stage.waits:
                    continue
                if not self._deal(stage, sample):
                    return None
                rates[stage.name] = self.table.broken(stage, sample) / max(
                    self._seconds(stage, sample, self.clock() - begun), 1e-6
                )
        return sorted(firsts, key=lambda stage: (stage.waits, -rates.get(stage.name, 0.0)))

    def _turn(self, stage: Stage, first: bool) -> bool:
        """Try a stage on a sample of what is left, and if useful on the rest.

        Returns False when the time is up.
        """
        left = self._open()
        if not left or not (
            first or not stage.pilot or stage.family in self.useful or len(left) <= _FEW
        ):
            return True
        if stage.pilot is None:
            return self._deal(stage, left)
        close, drawn = self._close(stage, left), self.table.drawn(left)
        chosen, rest = drawn[: stage.pilot], close.difference(drawn[: stage.pilot])
        near = [i for i in self.table.nearest(left, self._counts) if i in rest][:_FIRST]
        deal = (
            self._deal
            if stage.pilot and (first or stage.family in self.useful)
            else self._looked_again
        )
        if not deal(stage, sorted(chosen + near)):
            return False
        self.useful.discard(stage.family)
        wanted = set[int]()
        if self.table.broken(stage, chosen + near):
            self.useful.add(stage.family)
            far = [i for i in chosen if i not in close]
            wanted = set(left) if self.table.broken(stage, far) else close
        others, tried = set(left) - wanted, {"tried": chosen, "near": near}
        if stage.pilot and not others.issubset(chosen + near):
            self.table.missed(
                stage,
                {
                    "open": len(others),
                    **{key: len(others.intersection(places)) for key, places in tried.items()},
                },
            )
        return self._deal(stage, [i for i in self._open() if i in wanted])

    def _looked_again(self, stage: Stage, places: list[int]) -> bool:
        """Deal a stage without evidence for its use yet, with a time limit.

        It may take as long as all that came before it, and some seconds at least.
        """
        limit = Limit(self.clock, np.inf)

        def end() -> str:
            limit.ends = self.clock() + max(_LEAST, self.clock() - self.begun, self.table.spent())
            try:
                with limited(limit):
                    self._deal(stage, places)
            except OutOfTime as up:
                if up.limit is not limit:
                    raise
                return "time"
            return "through"

        if self.table.decide(f"looked again: {stage.name}", end) == "through":
            return self._deal(stage, places)  # in a resumed run; nothing is done twice
        self.tried.setdefault(stage.name, set()).update(places)
        return True

    def _close(self, stage: Stage, left: list[int]) -> set[int]:
        """Return the places whose nearest known example is near enough.

        A point without a known example counts as near unless `near` is 0: nobody may have searched
        for one.
        """
        if stage.near is None:
            return set(left)
        share = self.table.shares(self._counts)
        return {i for i in left if stage.near and not 1 + stage.near < share[i] < np.inf}

    def _seconds(self, stage: Stage, sample: list[int], spent: float) -> float:
        """Return the seconds of a stage on the sample: decided once, then fixed."""

        def seconds() -> float:
            # If the run was stopped just after the sample, the sample was not dealt again now: the
            # recorded seconds are used instead.
            recorded = self.table.seconds(stage, sample)
            return spent if spent > _DEALT * recorded else recorded

        return float(self.table.decide(f"seconds of {stage.name}", seconds))

    def _deal(self, stage: Stage, places: list[int]) -> bool:
        """Run a stage on those places that it was not tried on before.

        Returns False when the time is up.
        """
        tried = self.tried.setdefault(stage.name, set())
        fresh = [i for i in places if i not in tried]
        if fresh:
            self.table.told(stage.name, len(fresh))
            if not self.table.deal(stage, fresh):
                return False
        tried.update(fresh)
        return True

    def _counts(self, tool: str, place: int) -> bool:
        return place in self.tried.get(tool, ())

    def _open(self) -> list[int]:
        return self.table.open(self.table.facts(self._counts))
