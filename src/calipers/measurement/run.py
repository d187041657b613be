"""The measurement loop: stage by stage, on the points still open.

Everything that is admitted goes to the ledger at once.

A stage deals its points in fixed blocks, chosen from what *earlier* stages left open. So a run that
was killed and started again deals the same blocks, skips those recorded as tried, and ends with the
same brackets; and a block that was cut short is simply done again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calipers.errors import CaptureError, ToolFailed, UnsupportedOp
from calipers.measurement import portfolio
from calipers.measurement.ask import Answer, ask
from calipers.measurement.budget import Purse, Turn, as_told
from calipers.measurement.gaps import met
from calipers.measurement.joined import Known
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.question import begin, keep_inputs
from calipers.measurement.referee import CLEAN, Referee, Ruling
from calipers.problem.gradient_faults import gradients
from calipers.problem.interrupts import Limit, counted, give_way, limited
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim, Forecast, Foreseeing
from calipers.progress import Meter, Watch, meter
from calipers.record.bracket import Bracket
from calipers.record.evidence import Evidence, Run
from calipers.record.record import Record

_OPENING_BLOCK = 256


def run(
    problem: Problem,
    plan: Plan,
    ledger: Record,
    *,
    progress: Meter | Watch | None = None,
    begun: Run | None = None,
    after: Collection[str] = (),
    clock: Callable[[], float] = time.process_time,
) -> bool:
    """Carry out the plan; return whether it came to its end.

    False: the time limit or Ctrl-C stopped it; what was admitted stands.

    `begun` is the run that this is a part of, which has registered the question and its points;
    without one a run of its own begins. `clock` measures the cost of attacks and certifiers, where
    the plan bounds that. `after` names tools that will be asked when the plan
    is through: what they found in an earlier pass decides nothing here, so that a resumed run
    proceeds as the first one did. Raises `Contradiction` as soon as a certificate exceeds a
    witness's distance, and `RecordError` where the record is about another program of this name.
    """
    begun = begun or begin(problem, plan, ledger)
    counter = meter(progress, len(problem))
    session = _Session(problem, plan, ledger, begun, counter, clock, frozenset(after))
    limits = (
        () if plan.seconds is None else (Limit(time.monotonic, session.started + plan.seconds),)
    )
    try:
        session.opening()
        with limited(*limits), counted(counter.step):
            return all(session.part(ks) for ks in portfolio.parts(plan.stages)) and all(
                session.stage(k, last=True) for k in list(session.waiting)
            )
    except KeyboardInterrupt:
        return False
    finally:
        session.known.bracket()  # raises where the bounds cross


@dataclass(eq=False)
class _Session:
    """The state of one run: what is known, and the time it has taken."""

    problem: Problem
    plan: Plan
    ledger: Record
    begun: Run
    meter: Meter
    clock: Callable[[], float]
    after: frozenset[str]

    def __post_init__(self) -> None:
        problem, plan, begun = self.problem, self.plan, self.begun
        self.seed, self.fingerprint = plan.seed, problem.fingerprint()
        self.place = {name: i for i, name in enumerate(problem.names)}
        self.referee = Referee(problem)
        self.radii = problem.threat.radii(len(problem)).numpy()
        self.known = Known(problem.names, self.radii)
        self.run, self.notes = begun.number, dict(self.ledger.run(begun.number).notes)
        self.no_lower_jaw = False
        self.started = time.monotonic()
        self.process = f"{os.getpid()} {time.time_ns()}"
        self.scope = scope_of(plan, problem.names, self.radii)
        self.purse = None if plan.lower_share is None else Purse(plan.lower_share, self.clock)
        self.through: set[str] = set()
        self.waiting: list[int] = []  # certifiers that are put off to the end
        self.forecasts: dict[int, Forecast | None] = {}
        self.turns: dict[int, Turn] = {}

    def decide(self, key: str, make: Callable[[], Any]) -> Any:
        """Return a decision that depends on a clock or a measured rate.

        It is made once, kept in the record, and repeated when the run is resumed.
        """
        return self.ledger.decide(self.fingerprint, self.scope, key, make)

    def opening(self) -> None:
        """Run the model on every point itself."""
        self.known = Known(
            self.problem.names,
            self.radii,
            (e for e in self.ledger.evidence(self.fingerprint) if e.point in self.place),
        )
        seen = {e.point for e in self.known.facts if e.kind in ("clean", "invalid")}
        for block in torch.arange(len(self.problem)).split(_OPENING_BLOCK):
            # always the whole block: rounding depends on which points are in it
            if any(self.problem.names[i] not in seen for i in block.tolist()):
                self._admit(self.referee.open(block.to(self.problem.x.device)))
        if self.purse is not None:
            attacks = {s.name for s in self.plan.stages if s.kind == "attack"}
            self.purse.attacks = sum(
                e.seconds for e in self.known.facts if e.kind == "attempt" and e.tool in attacks
            )
        self._note(
            "gradients", self.decide("gradients", lambda: gradients(self.problem, self.seed))
        )

    def part(self, ks: list[int]) -> bool:
        """Run one stage, or families of attacks that stand side by side.

        Returns False when the time is up.
        """
        stages = [self.plan.stages[k] for k in ks]
        if not stages[0].family:
            return self.stage(ks[0])
        later = self._later()
        table = portfolio.Table(
            names=self.problem.names,
            radii=self.radii,
            known=self.known.facts,
            before=[e for e in self.known.facts if e.tool not in later],
            attacks={s.name for s in self.plan.stages if s.kind == "attack"},
            open=lambda facts: self._todo(
                stages[0],
                Bracket.of(self.problem.names, facts),
                {e.point for e in facts if e.kind == "invalid"},
            )[0],
            deal=lambda stage, places: self._blocks(stage, places, self.radii),
            broken=lambda stage, places: self.known.settled_by(stage.name, places, self.radii),
            drawn=self._drawn,
            decide=lambda key, make: self.decide(f"{ks[0]} {key}", make),
            told=self.meter.stage,
            missed=lambda stage, counts: self._note_of(
                "audits", stage, {"kind": stage.kind, **counts}
            ),
        )
        begun = self.clock()
        in_time = portfolio.Portfolio(table, stages, self.clock).run()
        if self.purse is not None:
            self.purse.attacks += self.clock() - begun
        self.through |= {stage.name for stage in stages}
        return in_time

    def stage(self, k: int, *, last: bool = False) -> bool:
        """Run one stage on what earlier ones left open.

        Returns False when the time is up. Without a graph of the model the certifiers are skipped.
        `last`: the stage was put off, and has its turn now.
        """
        stage = self.plan.stages[k]
        begun = 0.0 if self.purse is None else self.purse.clock()
        in_time = self._passed(k, stage, last=last)
        if self.purse is not None and stage.kind == "attack":
            self.purse.attacks += self.purse.clock() - begun
        if last or k not in self.waiting:
            self.through.add(stage.name)
        return in_time

    def _later(self) -> AbstractSet[str]:
        """Return the names of the tools that have not had their turn."""
        return ({s.name for s in self.plan.stages} - self.through) | self.after

    def _passed(self, k: int, stage: Stage, *, last: bool) -> bool:
        if stage.kind == "certifier" and self.no_lower_jaw:
            return True
        try:
            in_time = self._stage(k, stage, last=last)
        except (UnsupportedOp, CaptureError) as error:
            self.no_lower_jaw = True
            # unless another certifier was able to run
            if self.notes.get("lower_jaw") != "available":
                self._note("lower_jaw", str(error))
            return True
        except ToolFailed as error:  # that tool is done, others still run
            self._note_of("failed", stage, {"error": str(error)})
            return True
        if stage.kind == "certifier":
            self._note("lower_jaw", "available")
        return in_time

    def _note(self, key: str, fact: object) -> None:
        """Let the run note a circumstance."""
        if key not in self.notes or self.notes[key] != fact:
            self.notes[key] = fact
            self.ledger.note(self.run, key, fact)

    def _stage(self, k: int, stage: Stage, *, last: bool) -> bool:
        if stage.fallback and not (k - 1 in self.turns and self.turns[k - 1].too_dear):
            return True
        later = self._later()
        before = [e for e in self.known.facts if e.tool not in later]
        open_points, radii = self._todo(
            stage,
            Bracket.of(self.problem.names, before),
            {e.point for e in before if e.kind == "invalid"},
        )
        self.meter.stage(stage.name, len(open_points))
        if stage.kind == "certifier" and self.purse is not None and open_points:
            return self._turn(k, stage, open_points, radii, last=last)
        if stage.pilot is None or stage.pilot >= len(open_points):
            return self._blocks(stage, open_points, radii)
        sample = self._sample(open_points, stage.pilot)
        if not self._blocks(stage, sample, radii):
            return False
        rest = sorted(set(open_points) - set(sample))
        if self._gained(stage, sample, radii):
            return self._blocks(stage, rest, radii)
        self._note_of(
            "audits",
            stage,
            {
                "kind": stage.kind,
                "open": len(open_points),
                "tried": len(sample),
                **portfolio.aimed(stage),
            },
        )
        self.meter.done(len(rest))
        return True

    def _turn(
        self,
        k: int,
        stage: Stage,
        places: list[int],
        radii: np.ndarray[tuple[int], np.dtype[np.float64]],
        *,
        last: bool,
    ) -> bool:
        """Let a certifier do what its share of the time allows.

        Where more time may help later, the stage is put off.
        """
        purse = self.purse
        assert purse is not None

        def make() -> dict[str, Any]:
            self._begin_time(stage)
            return as_told(
                purse.turn(
                    stage,
                    self._drawn(places),
                    lambda chunk: self._blocks(stage, chunk, radii),
                    lambda chunk: self._proved(stage, chunk, radii),
                    lambda: self._forecast(k, stage, places, radii),
                    last=last,
                )
            )

        turn = Turn(**self.decide(f"{k} {stage.name}{' at the end' if last else ''}", make))
        self.turns[k] = turn
        if turn.worth_waiting and not last:
            self.waiting.append(k)
            return True
        tried = len(places) - len(turn.left)
        if tried and turn.left and not turn.proved:
            self._note_of(
                "audits", stage, {"kind": stage.kind, "open": len(places), "tried": tried}
            )
        if turn.left and turn.end != "nothing":
            self._note_of("not_run", stage, turn.fact(len(places)))
        self.meter.done(len(turn.left))
        return True

    def _forecast(
        self,
        k: int,
        stage: Stage,
        places: list[int],
        radii: np.ndarray[tuple[int], np.dtype[np.float64]],
    ) -> Forecast | None:
        """Return the tool's forecast of its cost; None where it gives none.

        It is asked once, about a random point of the places.
        """
        if k not in self.forecasts:
            place = self._sample(places, 1)
            part = self.problem.take(torch.tensor(place, device=self.problem.x.device)).at(
                torch.as_tensor(radii[place], dtype=torch.float64)
            )
            self.forecasts[k] = (
                stage.tool.forecast(part) if isinstance(stage.tool, Foreseeing) else None
            )
        return self.forecasts[k]

    def _proved(
        self, stage: Stage, places: list[int], radii: np.ndarray[tuple[int], np.dtype[np.float64]]
    ) -> bool:
        """Return whether this very tool settled any of the points.

        For a stage that seeks distances: whether it has a bound for any of them.
        """
        if stage.objective == "verdict":
            return self.known.settled_by(stage.name, places, radii) > 0
        return self.known.narrowed_by(stage.name, places)

    def _gained(
        self, stage: Stage, sample: list[int], radii: np.ndarray[tuple[int], np.dtype[np.float64]]
    ) -> bool:
        """Return whether a stage is worth its time on all points, by a sample."""
        if stage.objective == "distance":
            return portfolio.gains(self.problem.names, self.known.facts, stage, sample, radii)
        return self._proved(stage, sample, radii)

    def _blocks(
        self, stage: Stage, places: list[int], radii: np.ndarray[tuple[int], np.dtype[np.float64]]
    ) -> bool:
        """Deal the points in blocks, those recorded as tried left out.

        Where the time is up in between, `OutOfTime` passes through here.
        """
        tried = self.known.tried(stage.name)
        for start in range(0, len(places), stage.block):
            block = places[start : start + stage.block]
            left = [i for i in block if (self.problem.names[i], float(radii[i])) not in tried]
            if left:
                give_way()
                if stage.by_the_clock:
                    self._begin_time(stage)
                dealt = left if stage.by_the_clock else block
                self._deal(stage, dealt, radii[dealt])
            self.meter.decided(self.known.settled)
            self.meter.done(len(block))
        return True

    def _begin_time(self, stage: Stage) -> None:
        """Note that a tool with a time limit was stopped in another process.

        Its time begins again, which no record can undo.
        """
        if self.decide(f"first at work: {stage.name}", lambda: self.process) != self.process:
            held = self.notes.get("begun_anew")
            self._note(
                "begun_anew", sorted({*(held if isinstance(held, list) else []), stage.name})
            )

    def _sample(self, places: list[int], count: int) -> list[int]:
        """Return `count` random places, in order."""
        return sorted(self._drawn(places)[:count])

    def _drawn(self, places: list[int]) -> list[int]:
        """Return the places in random order.

        Each point's own random stream says how early it is drawn, whatever other points there are.
        """
        draw = (
            self.problem.streams(self.seed)
            .take(torch.tensor(places, device=self.problem.x.device))
            .uniform(1, torch.float64)[:, 0]
        )
        return [places[i] for i in draw.argsort().tolist()]

    def _note_of(self, key: str, stage: Stage, fact: dict[str, object]) -> None:
        """Add a circumstance of one stage."""
        held = self.notes.get(key)
        self._note(key, {**(held if isinstance(held, dict) else {}), stage.name: fact})

    def _todo(
        self, stage: Stage, bracket: Bracket, invalid: set[str]
    ) -> tuple[list[int], np.ndarray[tuple[int], np.dtype[np.float64]]]:
        """Return the places a stage is for, and the radius to ask at each.

        A search for a distance begins at the distance of the known witness.
        """
        verdicts = bracket.verdicts(self.radii)
        usable = [name not in invalid for name in self.problem.names]
        if stage.objective == "verdict":
            return [
                i
                for i, v in enumerate(verdicts)
                if v == "unknown" and usable[i] and self.radii[i] > 0
            ], self.radii
        start = (
            bracket.upper
            if stage.kind == "attack"
            else self.problem.threat.below(bracket.upper, bracket.lower)
        )
        done = met(
            bracket, self.problem.threat, self.problem.threat.widest(self.problem.x).cpu().numpy()
        )
        return [
            i for i in range(len(verdicts)) if bracket.upper[i] > 0 and usable[i] and not done[i]
        ], np.where(np.isfinite(bracket.upper), start, self.radii)

    def _deal(
        self, stage: Stage, block: list[int], radii: np.ndarray[tuple[int], np.dtype[np.float64]]
    ) -> None:
        """Run the tool on one block.

        Witnesses and certificates are recorded as they come; that the block was tried only at its
        end.
        """
        index = torch.tensor(block, dtype=torch.long, device=self.problem.x.device)
        part = self.problem.take(index).at(torch.as_tensor(radii, dtype=torch.float64))
        tried, found, answered = list[Evidence](), list[Evidence](), set[str]()

        def admit(answer: Answer, ruling: Ruling) -> tuple[Evidence, ...]:
            # told first: what the watch raises must find nothing half done
            self.meter.decided(self.known.settled)
            answered.update(fact.point for fact in ruling.tried)
            self.meter.within(len(answered))
            self._admit(ruling.evidence)
            found.extend(ruling.evidence)
            if stage.by_the_clock and isinstance(answer, Claim):  # its time is not granted again
                self._finish(ruling.tried, found)
                return ()
            return ruling.tried

        for tried_now in ask(stage, part, admit, seed=self.seed):
            tried += tried_now
        self._finish(tried, found)

    def _finish(self, tried: Sequence[Evidence], found: Sequence[Evidence]) -> None:
        """Record that a tool came to its end at some points.

        Findings of an interrupted pass there that this pass did not repeat are disregarded.
        """
        left = self.ledger.finish(self.fingerprint, tried, found, run=self.run)
        self.known.finish(left, tried)

    def _admit(self, facts: Sequence[Evidence]) -> None:
        keep_inputs(self.problem, self.place, self.ledger, facts)
        self.ledger.append(self.fingerprint, facts, run=self.run)
        self.known.add(facts)
        if self.purse is not None and any(e.kind == "certificate" for e in facts):
            self.purse.proved()


def scope_of(
    plan: Plan, names: Sequence[str], radii: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> str:
    """Return a name for runs that proceed alike.

    That is a digest of the stages, seed, points and radii.
    """
    told = repr(
        (
            [(s.name, s.objective, s.pilot, s.family, s.waits, s.near) for s in plan.stages],
            plan.lower_share,
            plan.seed,
            tuple(names),
        )
    ).encode()
    return hashlib.blake2b(told + radii.tobytes(), digest_size=8).hexdigest()


__all__ = ["CLEAN", "run", "scope_of"]
