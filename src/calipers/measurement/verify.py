"""Verification of properties of a network's outputs over boxes.

Tools take turns, until a witness, or a proof for every box, decides.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from calipers.calls import with_gradients
from calipers.errors import CaptureError, ToolFailed, UnsupportedOp
from calipers.measurement.ask import Answer, answers, ask
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import Ruling
from calipers.models.classifier import Classifier
from calipers.problem.interrupts import Limit, OutOfTime, give_way, limited
from calipers.problem.io_property import Query, posed_together, read
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim

_EACH_CASE = 16  # number of cases up to which each is attacked by itself
_MANY = 8  # number of boxes from which one evaluation of all of them is worthwhile


@dataclass(frozen=True)
class Witness:
    """An unsafe input as decimals inside its box, and the outputs there.

    `outputs` are those that the model, on this input alone and in its own precision, gives to the
    numbers as it reads them.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def text(self) -> str:
        """Return the competition's form: ((X_0 0.5) ... (Y_0 1.0) ...)."""
        pairs = [
            f"({name}_{i} {text})"
            for name, texts in (("X", self.inputs), ("Y", self.outputs))
            for i, text in enumerate(texts)
        ]
        return f"({chr(10).join(pairs)})"


@dataclass(frozen=True)
class Verdict:
    """The answer to a verification query.

    Args:
        answer: "sat" (a witness is unsafe), "unsat" (proved safe), "unknown" (every tool has had
            its turn) or "timeout".
        seconds: Wall-clock time.
        tool: The tool that decided, "" if none did.
        witness: The witness of "sat".
        notes: Tools that could not be run, and why.
        proofs: For "unsat", where proofs were asked for: a file for each box, in order; None for a
            box whose tool writes none.
    """

    answer: Literal["sat", "unsat", "unknown", "timeout"]
    seconds: float
    tool: str = ""
    witness: Witness | None = None
    notes: tuple[str, ...] = ()
    proofs: tuple[bytes | None, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether the answer is "sat" or "unsat"."""
        return self.answer in ("sat", "unsat")


@with_gradients()
def verify(
    classifier: Classifier,
    queries: Sequence[Query],
    shape: tuple[int, ...],
    plan: Plan,
    together: Sequence[Stage] = (),
) -> Verdict:
    """Return the verdict on all queries together, about inputs of this shape.

    One unsafe input in any of them is "sat". Where there are many queries, the certifiers of
    `together` are asked first about all of their boxes at once, and the plan about each box that is
    left. A tool that is still at work after the plan's seconds is interrupted.
    """
    case = _Case(classifier, list(queries), shape, time.monotonic(), plan.seed)
    try:
        with time_limit(plan.seconds):
            return case.decide(plan.stages, together)
    except OutOfTime:
        return case.verdict("timeout")


@dataclass
class _Case:
    classifier: Classifier
    queries: list[Query]
    shape: tuple[int, ...]
    begun: float
    seed: int
    notes: tuple[str, ...] = ()
    proofs: dict[Query, bytes | None] = field(default_factory=dict)

    def decide(self, stages: Sequence[Stage], together: Sequence[Stage]) -> Verdict:
        open_, quick = list(self.queries), ""
        for stage in together:
            if len(open_) >= _MANY:
                try:
                    open_ = self.sifted(stage, open_)
                except (UnsupportedOp, CaptureError, ToolFailed) as error:
                    self.notes += (f"{stage.name}: {error}",)
                quick = quick if open_ else stage.name
        if quick:
            return self.verdict("unsat", quick)
        left = [(query, query.posed(self.classifier, self.shape)) for query in open_]
        last = ""
        for stage in stages if left else ():
            try:
                found, left = self.turn(stage, left)
            except (UnsupportedOp, CaptureError, ToolFailed) as error:
                self.notes += (f"{stage.name}: {error}",)
                continue
            last = stage.name
            if found is not None:
                return self.verdict("sat", last, found)
            if not left:
                break
        return self.verdict("unknown" if left else "unsat", "" if left else last)

    def sifted(self, stage: Stage, queries: list[Query]) -> list[Query]:
        """Let a certifier bound all boxes at once; return the queries still open."""
        left = []
        for places, problem in posed_together(queries, self.classifier, self.shape):
            at = dict(zip(problem.names, places, strict=True))
            radii = dict(
                zip(problem.names, problem.threat.radii(len(places)).tolist(), strict=True)
            )

            def judge(
                answer: Answer,
                ruling: Ruling,
                at: dict[str, int] = at,
                radii: dict[str, float] = radii,
            ) -> list[int]:
                return [
                    at[fact.point]
                    for fact in ruling.evidence
                    if fact.kind == "certificate" and fact.radius >= radii[fact.point]
                ]

            proved = {
                place for some in ask(stage, problem, judge, seed=self.seed) for place in some
            }
            left += [place for place in places if place not in proved]
        return [queries[place] for place in sorted(left)]

    def turn(
        self, stage: Stage, left: list[tuple[Query, Problem]]
    ) -> tuple[Witness | None, list[tuple[Query, Problem]]]:
        """Let one tool try every open box; return a witness, or the open boxes."""
        still = []
        for query, problem in left:
            give_way()
            found, proved = (
                self.attacked(stage, query, problem)
                if stage.kind == "attack"
                else self.bounded(stage, query, problem)
            )
            if found is not None:
                return found, left
            still += [] if proved else [(query, problem)]
        return None, still

    def attacked(self, stage: Stage, query: Query, problem: Problem) -> tuple[Witness | None, bool]:
        """Search for all cases at once, then for each case by itself.

        The nearest case is not always the one that can be reached.
        """
        alone = query.alone() if len(query.cases) <= _EACH_CASE else ()
        for goal in (problem.goal, *(one.goal() for one in alone)):
            for attempt in answers(stage, dataclasses.replace(problem, goal=goal), self.seed):
                assert isinstance(attempt, Attempt)
                found = self.witness(query, attempt)
                if found is not None:
                    return found, False
        return None, False

    def bounded(self, stage: Stage, query: Query, problem: Problem) -> tuple[Witness | None, bool]:
        """Ask for a proof about the whole box.

        A certifier may also hand over counterexamples that it met.
        """
        radius, proved = float(problem.threat.radii(1)[0]), False

        def judge(answer: Answer, ruling: Ruling) -> Witness | None:
            nonlocal proved
            if not isinstance(answer, Claim):
                return self.witness(query, answer)
            if any(
                fact.kind == "certificate" and fact.radius >= radius for fact in ruling.evidence
            ):
                proved, self.proofs[query] = True, (answer.proofs or (None,))[0]
            return None

        for found in ask(stage, problem, judge, seed=self.seed):
            return found, False
        return None, proved

    def witness(self, query: Query, attempt: Attempt) -> Witness | None:
        """Return the first candidate that is a witness, or None."""
        return next(
            (
                found
                for point in attempt.candidate
                if (found := witness(self.classifier, query, point)) is not None
            ),
            None,
        )

    def verdict(
        self,
        answer: Literal["sat", "unsat", "unknown", "timeout"],
        tool: str = "",
        found: Witness | None = None,
    ) -> Verdict:
        proofs = (
            tuple(self.proofs.get(query) for query in self.queries) if answer == "unsat" else ()
        )
        return Verdict(answer, time.monotonic() - self.begun, tool, found, self.notes, proofs)


def witness(classifier: Classifier, query: Query, point: torch.Tensor) -> Witness | None:
    """Return the point as a witness, or None if it is none.

    What is written down has to be inside the exact box, and unsafe when it is read again and run
    alone, in the model's own precision and in float64, without any tolerance.
    """
    texts = query.written(point)
    if texts is None:
        return None
    again = (
        torch.tensor([read(text, point.dtype) for text in texts], dtype=torch.float64)
        .to(point)
        .reshape(1, *point.shape)
    )
    own, exact = classifier.logits(again), classifier.logits64(again)
    if not all(query.unsafe(z) and query.unsafe(z, texts) for z in (own, exact)):
        return None
    outputs = own.cpu().reshape(-1)[-query.outputs :].numpy()
    outputs = outputs[: len(outputs) - len(query.echoed)]
    return Witness(texts, tuple(str(v) for v in outputs))


class _Alarm(KeyboardInterrupt):
    """The alarm rang, at any step of the code that runs.

    It is no `OutOfTime`, which some tools catch to go on with what they hold: that is safe only
    where they asked for the time themselves.
    """


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` in what runs inside, once the time is over.

    In the main thread an alarm interrupts any tool at once. It is lost where it rings in a callback
    of the garbage collector or of C code, which cannot raise, and there is none in other threads:
    there the tool ends where it asks for the time next, as does the caller by `give_way`.
    """
    if seconds is None:
        yield
        return
    limit = Limit(time.monotonic, time.monotonic() + seconds)
    if seconds <= 0:
        raise OutOfTime(limit)
    try:
        with limited(limit), _alarm(seconds):
            yield
    except _Alarm:
        raise OutOfTime(limit) from None


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `_Alarm` inside after that time, in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def ring(*_: object) -> None:
        raise _Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
