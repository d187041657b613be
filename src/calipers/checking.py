"""Does a record still hold? Every witness is run and measured again, every certificate proved
again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from calipers.certificates.proof import differs
from calipers.errors import BadInput, Contradiction, RecordError
from calipers.measurement.ask import ask
from calipers.measurement.plan import Stage
from calipers.measurement.probe import answers_differ, told_apart
from calipers.measurement.referee import CLEAN, Referee
from calipers.presets import tool_from
from calipers.problem.calls import with_gradients
from calipers.problem.classifier import Classifier
from calipers.problem.goals import Goal
from calipers.problem.problem import Problem
from calipers.problem.threat import Threat
from calipers.problem.tools import Attempt
from calipers.record.bracket import Bracket
from calipers.record.checker import prove
from calipers.record.evidence import Evidence, Question
from calipers.record.ledger import Ledger

_REPROVED = 64  # certificates re-proved at once


@dataclass(frozen=True)
class Checked:
    """What a check of a record found: how many witnesses and certificates were replayed, and a line
    for each that failed; `proofs` is a line for each certificate that was proved again from its
    file, by the checker that shares nothing with the tools.
    """

    witnesses: int
    certificates: int
    failures: tuple[str, ...]
    proofs: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether everything held."""
        return not self.failures


@with_gradients()
def check(
    record: str | Path | Ledger,
    model: nn.Module | Classifier,
    threat: Callable[[Question], Threat],
    *,
    goal: Goal | None = None,
    certificates: bool = True,
) -> tuple[Checked, ...]:
    """Replay what a record claims against the model: every witness is run and measured again, every
    certificate proved again at its radius: by the independent checker where a proof file is kept,
    else by its tool.

    One result for each question about this model (others are passed over); raises `BadInput` where
    there is none. A record that was altered after it was written fails, and so does a model that
    answers otherwise than it did when it was measured. That it was checked is noted in the record.
    """
    if not isinstance(record, Ledger):
        with Ledger(record, read_only=True) as ledger:
            return check(ledger, model, threat, goal=goal, certificates=certificates)
    classifier = model if isinstance(model, Classifier) else Classifier(model)
    mine = [
        q for q in record.questions() if q.facts.get("model", {}).get("hash") == classifier.digest()
    ]
    if not mine:
        raise BadInput(_no_question(record, classifier))
    found = tuple(
        _check_question(record, q, classifier, threat(q), goal, certificates) for q in mine
    )
    _note(record, mine, found)
    return found


def _note(ledger: Ledger, asked: list[Question], found: tuple[Checked, ...]) -> None:
    """Keep in the record that it was checked, where it can be written to."""
    with (
        contextlib.suppress(RecordError, sqlite3.OperationalError),
        contextlib.ExitStack() as stack,
    ):
        book = ledger if ledger.path is None else stack.enter_context(Ledger(ledger.path))
        for q, one in zip(asked, found, strict=True):
            book.note_check(q.fingerprint, one.witnesses, one.certificates, len(one.failures))


def _no_question(ledger: Ledger, classifier: Classifier) -> str:
    """Return how the model differs from those that were measured, the most similar one first."""
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


def _check_question(
    ledger: Ledger,
    asked: Question,
    classifier: Classifier,
    threat: Threat,
    goal: Goal | None,
    certificates: bool,
) -> Checked:
    points = ledger.points(asked.fingerprint)
    x, y = (
        torch.as_tensor(np.stack([p.array for p in points])),
        torch.tensor([p.label for p in points]),
    )
    problem = Problem.pose(classifier, x, y, threat, goal, places=True)
    if problem.fingerprint() != asked.fingerprint:
        raise BadInput(
            "the threat or goal given differs from the one recorded; check with the same norm, "
            "box, mask, weights and goal"
        )
    place, facts = (
        {name: i for i, name in enumerate(problem.names)},
        ledger.evidence(asked.fingerprint),
    )
    failures = [
        f"the record was altered after it was written: {what}" for what in ledger.trust().altered
    ]
    known = next((m for m in ledger.models() if m.digest == classifier.digest()), None)
    if known is not None and (wrong := answers_differ(classifier, known)):
        failures.append(wrong)
    witnesses = [e for e in facts if e.kind == "witness"]
    for fact in witnesses:
        failures += _replay(problem, place, ledger, asked, fact)
    claimed = [e for e in facts if e.kind == "certificate"] if certificates else []
    best = {e.point: e for e in sorted(claimed, key=lambda e: e.radius)}
    files = {
        e.key: data for e in claimed if (data := ledger.witness(asked.fingerprint, e)) is not None
    }
    checked = [
        _check_proof(problem, place, e, files[e.key].tobytes()) for e in claimed if e.key in files
    ]
    failures += [line for good, line in checked if not good]
    left = [e for e in best.values() if e.key not in files]
    for tool in sorted({e.tool for e in left}):
        failures += _reprove(problem, place, [e for e in left if e.tool == tool])
    try:
        Bracket.of(problem.names, facts)
    except Contradiction as error:
        failures.append(str(error))
    return Checked(
        len(witnesses), len(best), tuple(failures), tuple(line for good, line in checked if good)
    )


def _check_proof(
    problem: Problem, place: dict[str, int], fact: Evidence, data: bytes
) -> tuple[bool, str]:
    """Prove a file again, and compare what it claims with what the record says it does."""
    name = f"point {fact.point}: the proof of {fact.tool} at {fact.radius:.9g}"
    if fact.point not in place:
        return False, f"{name} is not stored with its point"
    verdict = prove(data)
    asked = problem.take([place[fact.point]]).at(torch.tensor([fact.radius], dtype=torch.float64))
    failed = verdict.reason or differs(asked, 0, data)
    return (
        not failed,
        f"{name} fails: {failed}"
        if failed
        else f"{name} holds ({verdict.leaves} leaves, {len(data)} bytes)",
    )


def _replay(
    problem: Problem, place: dict[str, int], ledger: Ledger, asked: Question, fact: Evidence
) -> list[str]:
    array = ledger.witness(asked.fingerprint, fact)
    if fact.point not in place or array is None:
        return [f"point {fact.point}: the witness of {fact.tool} is not stored with its point"]
    index = torch.tensor([place[fact.point]])
    point = torch.as_tensor(array)[None].to(problem.x)
    if fact.tool == CLEAN:
        return (
            []
            if any(e.kind == "witness" for e in Referee(problem).open(index))
            else [f"point {fact.point}: recorded as misclassified, but the model is right there"]
        )
    none = torch.zeros(1, dtype=torch.long)
    ruling = Referee(problem).attempt(
        Attempt(torch.zeros(1, dtype=torch.long), point, none, none), index, fact.tool, 0.0
    )
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


def _reprove(problem: Problem, place: dict[str, int], facts: list[Evidence]) -> list[str]:
    """Prove again at the recorded radius: for a search by the bounder it used, and what that leaves
    by the tool itself.
    """
    tool, failures = tool_from(facts[0].tool), list[str]()
    for start in range(0, len(facts), _REPROVED):
        left = facts[start : start + _REPROVED]
        for asked in dict.fromkeys((getattr(tool, "bounder", tool), tool)):
            try:
                left = _unproved(problem, place, left, Stage(asked, "certifier"))
            except Contradiction as error:
                failures.append(str(error))
        failures += [f"point {e.point}: {e.tool} does not prove {e.radius:.9g} again" for e in left]
    return failures


def _unproved(
    problem: Problem, place: dict[str, int], facts: list[Evidence], stage: Stage
) -> list[Evidence]:
    """Return the certificates that a tool, asked at their radii, does not prove as far as they
    claim.
    """
    if not facts:
        return []
    asked = problem.take([place[e.point] for e in facts]).at(
        torch.tensor([e.radius for e in facts], dtype=torch.float64)
    )
    proved = {
        e.point: e.radius
        for told in ask(stage, asked, lambda _, ruling: ruling.evidence)
        for e in told
        if e.kind == "certificate"
    }
    return [e for e in facts if not proved.get(e.point, -1.0) >= e.radius]
