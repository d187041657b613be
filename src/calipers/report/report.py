"""Summaries of a ledger: pure functions that return frozen numbers.

Two kinds of uncertainty stay apart in every number: the gap between the certified and the attacked
count (what is not known about these points; it shrinks with compute) and the interval (sampling; it
shrinks with more points). Points that cannot be measured belong to no rate; they are listed with
their reasons.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.errors import BadInput, Contradiction
from calipers.record.bracket import Bracket, Verdict
from calipers.record.chain import Trust
from calipers.record.estimates import Interval, clopper_pearson, two_sided, wilson
from calipers.record.evidence import Evidence, Point, Question, Run
from calipers.record.record import Record
from calipers.report.distances import (
    Curve,
    Histogram,
    Quantile,
    curve_of,
    histogram_of,
    quantiles_of,
)
from calipers.report.gallery import Exhibit, hang
from calipers.report.naming import Names
from calipers.report.provenance import facts_of

# stands for an unlimited radius: any finite distance lies within it, infinity (no witness) does not
_LARGEST = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Rate:
    """`count` of `of` points.

    Without points the share is NaN and both intervals are [0, 1].
    """

    count: int
    of: int
    confidence: float = 0.95

    @property
    def share(self) -> float:
        """Return count / of."""
        return self.count / self.of if self.of else math.nan

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ({self.count} of {self.of})"

    @property
    def wilson(self) -> Interval:
        """Return the Wilson interval."""
        return (
            wilson(self.count, self.of, self.confidence)
            if self.of
            else Interval(math.nan, 0.0, 1.0, self.confidence)
        )

    @property
    def exact(self) -> Interval:
        """Return the Clopper-Pearson interval.

        It is to be preferred where the count is very small or very large.
        """
        return (
            clopper_pearson(self.count, self.of, self.confidence)
            if self.of
            else Interval(math.nan, 0.0, 1.0, self.confidence)
        )


@dataclass(frozen=True)
class PointRow:
    """One point: prediction, bounds on its distance, tools and cost.

    `index` is the position in the data; `margin` is the clean one, in logits; `verdict` is read at
    the point's own `radius`; `seen` tells whether the model was run on the point at all; `note` is
    the reason of an invalid point.
    """

    index: int
    name: str
    label: int
    prediction: int
    margin: float
    radius: float
    verdict: Verdict
    lower: float
    upper: float
    lower_tool: str
    upper_tool: str
    guarantee: str
    forwards: int
    backwards: int
    seconds: float
    seen: bool
    note: str
    settled_by: str

    @property
    def is_clean_error(self) -> bool:
        """Return whether the model is wrong at the point itself."""
        return self.upper == 0

    @property
    def tool(self) -> str:
        """Return the short name of the tool that settled the verdict, or ""."""
        return (
            "clean error"
            if self.is_clean_error and self.verdict == "broken"
            else short_name(self.settled_by)
        )


@dataclass(frozen=True)
class ToolCount:
    """How many points a tool settled."""

    name: str
    points: int


@dataclass(frozen=True)
class RobustAccuracy:
    """Bounds on the robust accuracy: certified <= robust <= attacked.

    They hold on these points; `interval` contains the population's robust accuracy with the given
    confidence, whatever the attacks missed.
    """

    certified: Rate
    attacked: Rate
    unknown: int
    interval: tuple[float, float]
    confidence: float

    @property
    def unknown_share(self) -> float:
        """Return the share of points that are neither certified nor broken."""
        return self.attacked.share - self.certified.share

    def __str__(self) -> str:
        from calipers.report.wording import at_least, at_most

        low, high = self.interval
        return (
            f"certified {at_least(self.certified)} % <= robust accuracy <= "
            f"{at_most(self.attacked)} % attacked, {self.certified.of} points "
            f"({100 * self.confidence:g} % interval {100 * low:.1f} .. {100 * high:.1f} %)"
        )


@dataclass(frozen=True)
class AtRadius:
    """The rates of all points at one of several radii asked.

    The radius is the same for every point.
    """

    radius: float
    robust: RobustAccuracy


@dataclass(frozen=True)
class ClassRow:
    """The rates of one class.

    Each interval holds on its own, without correction for the number of classes.
    """

    label: int
    clean: Rate
    certified: Rate
    attacked: Rate


@dataclass(frozen=True)
class ToolCost:
    """What one tool was tried on, what it settled and what it cost.

    `tool` is its full repr; `notes` are the commonest reasons of failed attempts.
    """

    tool: str
    tried: int
    settled: int
    forwards: int
    backwards: int
    seconds: float
    notes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Summary:
    """Everything the record says about one question.

    `rows` holds every point, also the invalid ones; rates are over the others. `radius` is the
    smallest and largest radius asked; `at_radii` are the rates where several were asked in one run
    (else none); `guarantees` counts the certified points by the arithmetic in which their claim
    holds; `trust` is whether the record is as it was written, and checked; `facts` are what is
    known of question and latest run, `runs` all of them, oldest first.
    """

    question: Question
    record: str
    confidence: float
    rows: tuple[PointRow, ...]
    radius: tuple[float, float]
    clean: Rate
    robust: RobustAccuracy
    at_radii: tuple[AtRadius, ...]
    certified_by: tuple[ToolCount, ...]
    broken_by: tuple[ToolCount, ...]
    clean_errors: int
    guarantees: tuple[tuple[str, int], ...]
    classes: tuple[ClassRow, ...]
    curve: Curve
    histogram: Histogram
    quantiles: tuple[Quantile, ...]
    costs: tuple[ToolCost, ...]
    gallery: tuple[Exhibit, ...] = field(repr=False)
    trust: Trust = field(default_factory=Trust)
    facts: dict[str, Any] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()

    @property
    def n(self) -> int:
        """Return how many points the rates are over."""
        return self.robust.certified.of

    @property
    def invalid(self) -> tuple[PointRow, ...]:
        """Return the points that cannot be measured; each note says why."""
        return tuple(r for r in self.rows if r.verdict == "invalid")

    @property
    def names(self) -> Names:
        """Return the names of columns, symbols and classes."""
        return Names.of(self.question)

    @property
    def unseen(self) -> int:
        """Return how many points the model has not been run on yet."""
        return sum(not r.seen for r in self.rows if r.verdict != "invalid")

    @property
    def title(self) -> str:
        """Return the name of the model, or of the question where it has none."""
        model = self.facts.get("model")
        name = model.get("name") if isinstance(model, dict) else None
        return str(name or self.question.title or "unnamed model")


def short_name(tool: str) -> str:
    """Return the tool's name without its settings.

    >>> short_name("PGD(steps=100, restarts=20)")
    'PGD'
    """
    return tool.split("(", 1)[0].strip()


def summaries(ledger: Record, confidence: float = 0.95) -> tuple[Summary, ...]:
    """Return one summary for each question of the ledger, oldest first.

    Raises `Contradiction` where two tools cannot both be right.
    """
    try:
        return tuple(summarise(ledger, question, confidence) for question in ledger.questions())
    except Contradiction as error:
        if altered := ledger.trust().altered:
            raise Contradiction(
                f"the record was altered after it was written ({'; '.join(altered)}), and now "
                f"says: {error}"
            ) from error
        raise


def summarise(ledger: Record, question: Question, confidence: float = 0.95) -> Summary:
    """Return what the ledger says about one question.

    Intervals are at the given confidence.
    """
    points, facts = ledger.points(question.fingerprint), ledger.evidence(question.fingerprint)
    runs = tuple(ledger.runs(question.fingerprint))
    known = facts_of(question, runs)
    rows = point_rows(points, facts)
    valid = [r for r in rows if r.verdict != "invalid"]
    return Summary(
        question=question,
        record=ledger.path.name if ledger.path else "",
        rows=rows,
        **_rates(rows, known, confidence),
        certified_by=_count(r.settled_by for r in valid if r.verdict == "robust" and r.settled_by),
        broken_by=_count(
            r.settled_by for r in valid if r.verdict == "broken" and not r.is_clean_error
        ),
        clean_errors=sum(r.is_clean_error for r in valid),
        guarantees=tuple(
            Counter(
                r.guarantee for r in valid if r.verdict == "robust" and r.guarantee
            ).most_common()
        ),
        costs=tool_costs(rows, facts),
        gallery=hang(ledger, question, points, facts, _ends(valid)),
        trust=ledger.trust(),
        facts=known,
        runs=runs,
    )


def at_confidence(summary: Summary, confidence: float) -> Summary:
    """Return the same summary with intervals at another confidence."""
    return replace(summary, **_rates(summary.rows, summary.facts, confidence))


def _rates(rows: Sequence[PointRow], known: dict[str, Any], confidence: float) -> dict[str, Any]:
    """Return the parts of a summary that hold intervals, by name.

    Raises `BadInput` for a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise BadInput(
            f"the confidence is a share between 0 and 1, such as 0.95; got {confidence:g}"
        )
    valid = [r for r in rows if r.verdict != "invalid"]
    lower, upper = _column(r.lower for r in valid), _column(r.upper for r in valid)
    asked = [r.radius for r in rows]
    radius = (min(asked), max(asked)) if asked else (math.nan, math.nan)
    seen = np.array([r.seen for r in valid], dtype=bool)
    curve = curve_of(lower, upper, seen, radius[1], confidence)
    return {
        "confidence": confidence,
        "radius": radius,
        "clean": clean_accuracy(valid, confidence),
        "robust": robust_accuracy(valid, confidence),
        "at_radii": tuple(AtRadius(r, robust_at(valid, r, confidence)) for r in _radii(known)),
        "classes": class_rows(valid, confidence),
        "curve": curve,
        "histogram": histogram_of(lower, upper, curve.reach),
        "quantiles": quantiles_of(lower, upper, curve.half_width),
    }


def all_exhibits(ledger: Record, summary: Summary) -> tuple[Exhibit, ...]:
    """Return the nearest stored witness of every point, not of a dozen."""
    fingerprint = summary.question.fingerprint
    points, facts = ledger.points(fingerprint), ledger.evidence(fingerprint)
    valid = [r for r in summary.rows if r.verdict != "invalid"]
    return hang(ledger, summary.question, points, facts, _ends(valid), limit=None)


def told_rows(ledger: Record, summary: Summary) -> list[dict[str, Any]]:
    """Return the rows of all points as dicts, classes by their names.

    With named columns or symbols each row also tells the point's nearest stored example.
    """
    names = summary.names
    found = {e.name: e for e in all_exhibits(ledger, summary)} if names.tell_changes else {}
    rows = list[dict[str, Any]]()
    for row in summary.rows:
        told = asdict(row)
        if names.classes:
            told["label"] = names.of_class(row.label)
            told["prediction"] = names.of_class(row.prediction) if row.seen else ""
        if names.tell_changes:
            one = found.get(row.name)
            told["taken_for"] = "" if one is None else names.of_class(one.fooled)
            told["changes"] = "" if one is None else one.words
        rows.append(told)
    return rows


def _ends(rows: Iterable[PointRow]) -> dict[str, tuple[float, str, int]]:
    """Return of each point the upper bound, its tool and the prediction."""
    return {r.name: (r.upper, r.upper_tool, r.prediction) for r in rows}


def point_rows(points: Sequence[Point], facts: Sequence[Evidence]) -> tuple[PointRow, ...]:
    """Return one row for each point, in the order of `points`.

    An `invalid` fact overrides everything else known about its point.
    """
    bracket = Bracket.of([p.name for p in points], facts)
    verdicts = bracket.verdicts(np.minimum([p.radius for p in points], _LARGEST))
    about: dict[str, list[Evidence]] = defaultdict(list)
    for fact in facts:
        about[fact.point].append(fact)
    return tuple(_row(p, about[p.name], bracket, i, verdicts[i]) for i, p in enumerate(points))


def _row(
    point: Point, facts: Sequence[Evidence], bracket: Bracket, i: int, verdict: Verdict
) -> PointRow:
    clean = next((f for f in facts if f.kind == "clean"), None)
    invalid = next((f for f in facts if f.kind == "invalid"), None)
    lower, tool = float(bracket.lower[i]), bracket.lower_tool[i]
    if verdict == "robust" and lower == 0 and clean is None:
        verdict = "unknown"  # a lower bound of 0 counts only if the model is right there
    return PointRow(
        index=point.position,
        name=point.name,
        label=point.label,
        prediction=clean.prediction if clean else -1,
        margin=clean.margin if clean else math.nan,
        radius=point.radius,
        verdict="invalid" if invalid else verdict,
        lower=lower,
        upper=float(bracket.upper[i]),
        lower_tool=tool,
        upper_tool=bracket.upper_tool[i],
        guarantee=next(
            (
                f.guarantee
                for f in facts
                if f.kind == "certificate" and f.tool == tool and f.radius == lower
            ),
            "",
        ),
        forwards=sum(f.forwards for f in facts),
        backwards=sum(f.backwards for f in facts),
        seconds=sum(f.seconds for f in facts),
        seen=clean is not None,
        note=invalid.note if invalid else "",
        settled_by=_first_to_settle(facts, verdict, point.radius),
    )


def _first_to_settle(facts: Sequence[Evidence], verdict: Verdict, radius: float) -> str:
    """Return the tool whose fact first gave the verdict.

    A tool that only narrowed the bracket later is not credited.
    """
    kind = {"robust": "certificate", "broken": "witness"}.get(verdict)
    settling = (
        f.tool
        for f in facts
        if f.kind == kind and (f.radius >= radius if kind == "certificate" else f.radius <= radius)
    )
    return next(settling, "")


def clean_accuracy(rows: Sequence[PointRow], confidence: float = 0.95) -> Rate:
    """Return the clean accuracy on the points that the model was run on."""
    seen = [r for r in rows if r.seen]
    return Rate(sum(not r.is_clean_error for r in seen), len(seen), confidence)


def robust_accuracy(rows: Sequence[PointRow], confidence: float = 0.95) -> RobustAccuracy:
    """Return the certified and the attacked rate of measurable points.

    The interval contains the true robust accuracy between them.
    """
    n, verdicts = len(rows), Counter(r.verdict for r in rows)
    certified, surviving = verdicts["robust"], n - verdicts["broken"]
    interval = two_sided(certified, surviving, n, confidence) if n else (0.0, 1.0)
    return RobustAccuracy(
        Rate(certified, n, confidence),
        Rate(surviving, n, confidence),
        verdicts["unknown"],
        interval,
        confidence,
    )


def robust_at(rows: Sequence[PointRow], radius: float, confidence: float = 0.95) -> RobustAccuracy:
    """Return the same rates read at another radius.

    What was found at a radius counts at all larger ones, what was proved at all smaller ones.
    """

    def verdict(row: PointRow) -> Verdict:
        return "broken" if row.upper <= radius else "robust" if row.lower >= radius else "unknown"

    return robust_accuracy([replace(row, verdict=verdict(row)) for row in rows], confidence)


def _radii(facts: dict[str, Any]) -> list[float]:
    """Return the radii that one run asked, rising.

    None where it asked one, or where the record holds something else in their place.
    """
    asked = facts.get("radii")
    numbers = (
        asked
        if isinstance(asked, list)
        and all(isinstance(r, float | int) and math.isfinite(r) and r > 0 for r in asked)
        else []
    )
    return sorted({float(r) for r in numbers})


def class_rows(rows: Sequence[PointRow], confidence: float = 0.95) -> tuple[ClassRow, ...]:
    """Return the rates of each class that occurs, by label."""
    groups: dict[int, list[PointRow]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    parts = (
        (label, groups[label], robust_accuracy(groups[label], confidence))
        for label in sorted(groups)
    )
    return tuple(
        ClassRow(label, clean_accuracy(group, confidence), robust.certified, robust.attacked)
        for label, group, robust in parts
    )


def tool_costs(rows: Sequence[PointRow], facts: Sequence[Evidence]) -> tuple[ToolCost, ...]:
    """Return what each tool was tried on, settled and cost.

    Tools are in the order in which they first appear.
    """
    settled = Counter(r.settled_by for r in rows if r.verdict in ("robust", "broken"))
    groups: dict[str, list[Evidence]] = defaultdict(list)
    for fact in facts:
        # a point that was refused as invalid was not tried
        if fact.kind != "invalid" or fact.forwards or fact.seconds:
            groups[fact.tool].append(fact)
    return tuple(_cost(tool, group, settled[tool]) for tool, group in groups.items())


def _cost(tool: str, facts: Sequence[Evidence], settled: int) -> ToolCost:
    notes = Counter(f.note for f in facts if f.kind == "attempt" and f.note)
    forwards, backwards = sum(f.forwards for f in facts), sum(f.backwards for f in facts)
    return ToolCost(
        tool,
        len({f.point for f in facts}),
        settled,
        forwards,
        backwards,
        sum(f.seconds for f in facts),
        tuple(notes.most_common(3)),
    )


def _count(tools: Iterable[str]) -> tuple[ToolCount, ...]:
    counts = Counter(short_name(tool) for tool in tools)
    return tuple(
        ToolCount(name, k)
        for name, k in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    )


def _column(values: Iterable[float]) -> NDArray[np.float64]:
    return np.array(list(values), dtype=np.float64)
