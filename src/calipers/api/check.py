"""Check of a record: replay witnesses, and prove certificates again."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calipers.calls import with_gradients
from calipers.certificates.proof_writer import differs
from calipers.errors import (
    BadInput,
    CaptureError,
    Contradiction,
    RecordError,
    ToolFailed,
    UnsupportedOp,
)
from calipers.interchange.door import read_points
from calipers.interchange.models import load
from calipers.measurement.ask import ask
from calipers.measurement.plan import Stage
from calipers.measurement.probe import answers_differ, told_apart
from calipers.measurement.referee import CLEAN, Referee
from calipers.models.classifier import Classifier
from calipers.presets import tool_from
from calipers.problem.goals import Goal
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Certifier
from calipers.problem.recorded import recorded_goal, recorded_threat
from calipers.record.bracket import Bracket
from calipers.record.checker import prove
from calipers.record.evidence import Evidence, Question, digest_of
from calipers.record.record import Key, Record
from calipers.renamed import modern
from calipers.threats.threat import Threat

_REPROVED = 64  # certificates proven again in one batch


@dataclass(frozen=True)
class CheckResult:
    """The result of checking what a record says about one question.

    Args:
        witnesses: How many adversarial examples were run and measured again, failures included.
        certificates: How many points have a certificate that the proof checker or a tool proved
            again.
        failures: A line for each witness, certificate or record entry that does not hold.
        proofs: A line for each certificate that was proven again from its proof file, by the
            checker that shares no code with the tools.
        left: A line for each claim, or group of claims, that could not be checked here, and why.

    Raises:
        Nothing: it holds what was found.

    Example:
        >>> CheckResult(witnesses=3, certificates=2, failures=()).sound
        True
    """

    witnesses: int
    certificates: int
    failures: tuple[str, ...]
    proofs: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether everything that was checked held."""
        return not self.failures


@with_gradients()
def check(
    record: str | Path | Record,
    model: Any,
    x: Any = None,
    *,
    threat: Threat | None = None,
    goal: Goal | None = None,
    tools: Sequence[Certifier] = (),
    certificates: bool = True,
) -> tuple[CheckResult, ...]:
    """Replay what a record claims against the model that it is about.

    Every witness is run and measured again, and every certificate is proven again at its radius:
    from its proof file where one is kept, by a checker that shares no code with the tools;
    otherwise by its tool. Threats, goals and points come from the record. If the record can be
    written to, it notes that it was checked.

    Args:
        record: The record, or its file name.
        model: The model that was measured, as for `measure`.
        x: The points (N, *D) that were measured, in any order. Needed for large inputs, of which
            the record keeps digests, and values only where a witness needs them.
        threat: For questions that a record keeps in words alone: of an earlier version, or with a
            goal of your own.
        goal: The goal of such questions.
        tools: Certifiers of your own, by which their certificates are proven again.
        certificates: Whether to prove certificates again, or to replay witnesses only.

    Returns:
        A `CheckResult` for each question about this model; questions about other models are
        ignored. A record that was altered after it was written fails, and so does a model whose
        outputs differ from those at the time of measuring. What could not be checked is in `left`.

    Raises:
        BadInput: Where no question of the record is about this model.
        RecordError: Where the record cannot be read.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> found = calipers.measure(model, x, y, calipers.Ball("linf", 0.1), plan="quick")
        >>> [one.sound for one in calipers.check(found.ledger, model)]
        [True]
    """
    if not isinstance(record, Record):
        with Record(record, read_only=True) as ledger:
            return check(
                ledger,
                model,
                x,
                threat=threat,
                goal=goal,
                tools=tools,
                certificates=certificates,
            )
    classifier = model if isinstance(model, Classifier) else load(model)
    mine = [
        q for q in record.questions() if q.facts.get("model", {}).get("hash") == classifier.digest()
    ]
    if not mine:
        raise BadInput(_no_question(record, classifier))
    given = {} if x is None else _by_digest(classifier, x)
    own = {repr(tool): tool for tool in tools}
    found = tuple(
        _Check(record, q, classifier, given, threat, goal, own).result(certificates) for q in mine
    )
    _note(record, mine, found)
    return found


def _by_digest(classifier: Classifier, x: Any) -> dict[str, NDArray[Any]]:
    """Return the given points by the digests under which a record knows them."""
    given = read_points(classifier, x)
    return {digest_of(row): row for row in given.detach().cpu().contiguous().numpy()}


def _note(ledger: Record, asked: list[Question], found: tuple[CheckResult, ...]) -> None:
    """Note in the record that it was checked, if it can be written to."""
    with (
        contextlib.suppress(RecordError, sqlite3.OperationalError),
        contextlib.ExitStack() as stack,
    ):
        book = ledger if ledger.path is None else stack.enter_context(Record(ledger.path))
        for q, one in zip(asked, found, strict=True):
            book.note_check(q.fingerprint, one.witnesses, one.certificates, len(one.failures))


def _no_question(ledger: Record, classifier: Classifier) -> str:
    """Return how the model differs from the measured ones, most similar first."""
    name = type(classifier.module).__name__
    known = {m.digest: m for m in ledger.models()}
    asked = {str(q.facts.get("model", {}).get("hash")): q.title for q in ledger.questions()}
    told = [
        told_apart(classifier, asked[digest], known.get(digest), digest, ledger) for digest in asked
    ]
    return (
        f"the record holds no question about this model ({name} {classifier.digest()[:8]}). "
        f"{min(told, key=len, default='It holds no question at all.')}"
    )


@dataclass(eq=False)
class _Check:
    """The check of one question."""

    ledger: Record
    asked: Question
    classifier: Classifier
    given: Mapping[str, NDArray[Any]]
    threat: Threat | None
    goal: Goal | None
    own: Mapping[str, Certifier]

    def __post_init__(self) -> None:
        points = [
            dataclasses.replace(p, array=self.given.get(p.digest)) if p.array is None else p
            for p in self.ledger.points(self.asked.fingerprint)
        ]
        self.points = [p for p in points if p.array is not None]
        self.missing = {p.name for p in points if p.array is None}
        self.misnamed, self.unposed = list[str](), ""
        self.problem = self._posed(self.threat, self.goal) if self.points else None
        self.place = {p.name: i for i, p in enumerate(self.points)}
        self.proved = set[str]()  # points with a certificate that was proven again

    def _posed(self, threat: Threat | None, goal: Goal | None) -> Problem | None:
        """Return the question as it was asked, restricted to the points at hand.

        None where it is not known; `unposed` then says why.
        """
        data = self.asked.data
        if data is not None:
            radii = torch.tensor([p.radius for p in self.points], dtype=torch.float64)
            threat = recorded_threat(data["threat"], radii)
            goal = recorded_goal(data["goal"], [p.target for p in self.points])
        elif threat is None:
            self.unposed = (
                f"the record keeps the threat and the goal of {self.asked.title!r} in words alone "
                "(it is of an earlier version, or the goal is your own): give those that were "
                "measured, check(record, model, threat=..., goal=...)"
            )
            return None
        x = torch.as_tensor(np.stack([p.array for p in self.points if p.array is not None]))
        y = torch.tensor([p.label for p in self.points])
        problem = Problem.pose(self.classifier, x, y, threat, goal, places=True)
        self.misnamed = self._misnamed(problem.names)
        if problem.fingerprint() != self.asked.fingerprint:
            self.unposed = (
                "the threat or goal given differs from the one recorded; check with the same norm, "
                "box, mask, weights and goal"
                if data is None
                else f"the threat and goal that the record keeps of {self.asked.title!r} are not "
                "those of its fingerprint"
            )
            return None
        # Equal points have numbered names; where points are missing, only the record has these.
        return dataclasses.replace(problem, names=tuple(p.name for p in self.points))

    def _misnamed(self, names: Sequence[str]) -> list[str]:
        """Return a line for each point whose name does not fit its contents.

        A point's name is a digest of its input, label and target.
        """
        return [
            f"point {p.name}: its input, label or target is not the one that it is named after"
            for p, name in zip(self.points, names, strict=True)
            if _stem(p.name) != _stem(name)
        ]

    def result(self, certificates: bool) -> CheckResult:
        """Return what holds, what fails and what could not be checked."""
        facts = self.ledger.evidence(self.asked.fingerprint)
        failures = [
            f"the record was altered after it was written: {what}"
            for what in self.ledger.trust().altered
        ] + self.misnamed
        digest = self.classifier.digest()
        known = next((m for m in self.ledger.models() if m.digest == digest), None)
        if known is not None and (wrong := answers_differ(self.classifier, known)):
            failures.append(wrong)
        if self.unposed:
            return CheckResult(0, 0, tuple(failures), (), (self.unposed,))
        claimed = [
            e for e in facts if e.kind == "witness" or (e.kind == "certificate" and certificates)
        ]
        left = [e for e in claimed if e.point in self.missing]
        here = [e for e in claimed if e.point not in self.missing]
        witnesses = [e for e in here if e.kind == "witness"]
        for fact in witnesses:
            failures += self._replay(fact)
        proved, wrong_proofs, again = self._certified([e for e in here if e.kind == "certificate"])
        unknown, failed = self._reprove(again)
        try:
            Bracket.of([*self.place, *sorted(self.missing)], facts)
        except Contradiction as error:
            failed.append(str(error))
        return CheckResult(
            len(witnesses),
            len(self.proved),
            (*failures, *wrong_proofs, *failed),
            tuple(proved),
            (*_without_input(left), *map(_no_tool, unknown)),
        )

    def _replay(self, fact: Evidence) -> list[str]:
        """Run a witness again; return a line if it fails or its distance differs."""
        array = self.ledger.witness(self.asked.fingerprint, fact)
        if self.problem is None or fact.point not in self.place:
            return [f"point {fact.point}: the witness of {fact.tool} is not stored with its point"]
        index = torch.tensor([self.place[fact.point]])
        if fact.tool == CLEAN:
            return (
                []
                if any(e.kind == "witness" for e in Referee(self.problem).open(index))
                else [
                    f"point {fact.point}: recorded as misclassified, but the model is right there"
                ]
            )
        if array is None:
            return [f"point {fact.point}: the witness of {fact.tool} is not stored with its point"]
        point, none = torch.as_tensor(array)[None].to(self.problem.x), torch.zeros(1).long()
        attempt = Attempt(torch.zeros(1, dtype=torch.long), point, none, none)
        ruling = Referee(self.problem).attempt(attempt, index, fact.tool, 0.0)
        if not ruling.evidence:
            return [
                f"point {fact.point}: the witness of {fact.tool} at {fact.radius:.9g} is not "
                "adversarial, or not admissible"
            ]
        found = ruling.evidence[0].radius
        return (
            []
            if found == fact.radius
            else [
                f"point {fact.point}: the witness of {fact.tool} stands at {found:.17g}, recorded "
                f"{fact.radius:.17g}"
            ]
        )

    def _certified(
        self, claimed: Sequence[Evidence]
    ) -> tuple[list[str], list[str], list[Evidence]]:
        """Prove again every certificate that has a proof file.

        Returns a line for each proof that holds, a line for each that does not, and of the
        certificates without a file the strongest of each point.
        """
        best = {e.point: e for e in sorted(claimed, key=lambda e: e.radius)}
        holds, fails, files = list[str](), list[str](), set[Key]()
        for fact in claimed:
            data = self.ledger.witness(self.asked.fingerprint, fact)
            if data is not None:
                files.add(fact.key)
                good, line = self._check_proof(fact, data.tobytes())
                (holds if good else fails).append(line)
                self.proved |= {fact.point} if good else set()
        return holds, fails, [e for e in best.values() if e.key not in files]

    def _check_proof(self, fact: Evidence, data: bytes) -> tuple[bool, str]:
        """Prove a file again, and compare its claim with that of the record."""
        name = f"point {fact.point}: the proof of {fact.tool} at {fact.radius:.9g}"
        if self.problem is None or fact.point not in self.place:
            return False, f"{name} is not stored with its point"
        verdict = prove(data)
        radius = torch.tensor([fact.radius], dtype=torch.float64)
        asked = self.problem.take([self.place[fact.point]]).at(radius)
        failed = verdict.reason or differs(asked, 0, data)
        return (
            not failed,
            f"{name} fails: {failed}"
            if failed
            else f"{name} holds ({verdict.leaves} leaves, {len(data)} bytes)",
        )

    def _reprove(self, facts: Sequence[Evidence]) -> tuple[list[Evidence], list[str]]:
        """Prove certificates again by their tools.

        Returns the certificates whose tool is not known, and a line for each that fails.
        """
        unknown, failures = list[Evidence](), list[str]()
        for name in sorted({e.tool for e in facts}):
            mine = [e for e in facts if e.tool == name]
            try:
                tool = self.own[name] if name in self.own else tool_from(modern(name))
            except BadInput:
                unknown += mine
                continue
            failed, lines = _reprove(self.problem, self.place, mine, tool)
            failures += lines
            self.proved |= {e.point for e in mine} - {e.point for e in failed}
        return unknown, failures


def _reprove(
    problem: Problem | None, place: Mapping[str, int], facts: Sequence[Evidence], tool: Any
) -> tuple[list[Evidence], list[str]]:
    """Prove certificates again at their recorded radii.

    Returns those that fail, and a line for each failure.

    For a search the certifier that it used is tried first, and the search itself on what that
    leaves.
    """
    failed, failures = list[Evidence](), list[str]()
    for start in range(0, len(facts), _REPROVED):
        left = list(facts[start : start + _REPROVED])
        for asked in dict.fromkeys((getattr(tool, "certifier", tool), tool)):
            try:
                left = _unproved(problem, place, left, Stage(asked, "certifier"))
            except (Contradiction, UnsupportedOp, CaptureError, ToolFailed) as error:
                failures.append(f"{facts[0].tool}: {error}")
        failed += left
        failures += [f"point {e.point}: {e.tool} does not prove {e.radius:.9g} again" for e in left]
    return failed, failures


def _unproved(
    problem: Problem | None, place: Mapping[str, int], facts: list[Evidence], stage: Stage
) -> list[Evidence]:
    """Return the certificates that a tool fails to prove at their radii."""
    here = [e for e in facts if e.point in place]
    if problem is None or not here:
        return facts
    asked = problem.take([place[e.point] for e in here]).at(
        torch.tensor([e.radius for e in here], dtype=torch.float64)
    )
    proved = {
        e.point: e.radius
        for told in ask(stage, asked, lambda _, ruling: ruling.evidence)
        for e in told
        if e.kind == "certificate"
    }
    return [e for e in facts if not proved.get(e.point, -1.0) >= e.radius]


def _stem(name: str) -> str:
    """Return a point's name without the number that tells equal points apart."""
    return name.partition("-")[0]


def _without_input(facts: Sequence[Evidence]) -> Iterator[str]:
    """Yield a line about the claims whose inputs are not at hand."""
    if facts:
        points = len({e.point for e in facts})
        yield (
            f"{len(facts)} claims about {points} points not checked: of their inputs the record "
            "keeps digests alone. Give the data that was measured: check(record, model, x)"
        )


def _no_tool(fact: Evidence) -> str:
    """Return the line about a certificate whose tool is not known."""
    return (
        f"point {fact.point}: not proved again at {fact.radius:.9g}: no tool called {fact.tool} "
        "here. Give a tool of your own to check(record, model, tools=[...])"
    )
