"""The adversarial examples that a page shows, and how they differ.

The nearest ones come first, then every class in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.record.evidence import Evidence, Point, Question
from calipers.record.record import Record
from calipers.report.naming import Change, Names, Piece

Span = tuple[float, float]
_NEAREST, _LIMIT = 4, 12


@dataclass(frozen=True)
class Exhibit:
    """One witness beside the point it belongs to.

    `distance` is the admitted one, in the threat's norm. `l2`, `linf`, `changed` (number of
    features that differ) and `psnr` (decibels, on the data range of the box; NaN without a box)
    describe the same difference for the eye. `span` is the range of values to draw. `changes` are
    the named columns or symbols that differ, `pieces` a sequence with these marked; both are empty
    where a picture says more.
    """

    name: str

    index: int
    label: int
    prediction: int
    fooled: int
    distance: float
    tool: str
    clean: NDArray[Any] = field(compare=False, repr=False)
    adversarial: NDArray[Any] = field(compare=False, repr=False)
    span: Span
    l2: float
    linf: float
    psnr: float
    changed: int
    changes: tuple[Change, ...] = ()
    pieces: tuple[Piece, ...] = ()

    @property
    def words(self) -> str:
        """What the example changes, in a line; "" where a picture says more."""
        return "".join(map(str, self.pieces)) or ", ".join(map(str, self.changes))


def hang(
    ledger: Record,
    question: Question,
    points: Sequence[Point],
    facts: Sequence[Evidence],
    ends: Mapping[str, tuple[float, str, int]],
    limit: int | None = _LIMIT,
) -> tuple[Exhibit, ...]:
    """Return stored witnesses of a question, a dozen at most.

    `ends` gives for each point its upper bound, the tool that set it and the clean prediction.
    `limit=None` returns all.
    """
    at = {
        p.name: p
        for p in points
        if p.name in ends and math.isfinite(ends[p.name][0]) and ends[p.name][0] > 0
    }
    nearest = {
        f.point: f
        for f in facts
        if f.kind == "witness" and f.point in at and (f.radius, f.tool) == ends[f.point][:2]
    }
    # words tell a box of numbers alone, not one by feature
    box, names = data_range(question.data or question.facts), Names.of(question)
    shown: list[Exhibit] = []
    for point in _order(
        [at[name] for name in nearest], {name: fact.radius for name, fact in nearest.items()}
    ):
        fact = nearest[point.name]
        array = ledger.witness(question.fingerprint, fact)
        clean = point.array
        if array is not None and clean is not None and array.shape == clean.shape and array.size:
            shown.append(_exhibit(point, clean, fact, array, ends[point.name][2], box, names))
        if len(shown) == limit:
            break
    return tuple(shown)


def _order(points: Sequence[Point], distance: Mapping[str, float]) -> list[Point]:
    """Return the nearest few points, then the rest class by class.

    After the nearest few come the nearest that is left of each class, then the second nearest of
    each, and so on.
    """
    ranked = sorted(points, key=lambda p: (distance[p.name], p.position))
    turn: dict[int, int] = {}
    rounds = []
    for point in ranked[_NEAREST:]:
        turn[point.label] = turn.get(point.label, 0) + 1
        rounds.append((turn[point.label], point.label))
    later = sorted(range(len(rounds)), key=lambda i: rounds[i])
    return ranked[:_NEAREST] + [ranked[_NEAREST + i] for i in later]


def _exhibit(
    point: Point,
    original: NDArray[Any],
    fact: Evidence,
    array: NDArray[Any],
    prediction: int,
    box: Span | None,
    names: Names,
) -> Exhibit:
    clean, adversarial = (np.asarray(a, dtype=np.float64) for a in (original, array))
    delta = adversarial - clean
    squared = float(np.sum(delta**2))
    span = box or (
        float(min(clean.min(), adversarial.min())),
        float(max(clean.max(), adversarial.max())),
    )
    psnr = (
        10 * math.log10((box[1] - box[0]) ** 2 * delta.size / squared)
        if box and squared > 0
        else math.nan
    )
    return Exhibit(
        name=point.name,
        index=point.position,
        label=point.label,
        prediction=prediction,
        fooled=fact.prediction,
        distance=fact.radius,
        tool=fact.tool,
        clean=clean,
        adversarial=adversarial,
        span=span,
        l2=math.sqrt(squared),
        linf=float(np.max(np.abs(delta))),
        psnr=psnr,
        changed=int(np.count_nonzero(delta)),
        changes=names.changes(original, array),
        pieces=names.pieces(original, array),
    )


def data_range(facts: Mapping[str, Any]) -> Span | None:
    """Return the box of the threat as two numbers, over all features.

    None without a usable box.
    """
    threat = facts.get("threat")
    box = threat.get("box") if isinstance(threat, dict) else None
    try:
        low, high = (np.asarray(side, dtype=np.float64) for side in box or ())
        span = (float(low.min()), float(high.max()))
    except (TypeError, ValueError):
        return None
    return span if span[0] < span[1] and all(map(math.isfinite, span)) else None
