"""Conversion of facts, points, runs and models to rows, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from calipers.record.evidence import Evidence, Model, Point, Question, Run, digest_of
from calipers.record.packing import pack, pack_data, unpack, unpack_data

Row = tuple[Any, ...]

BY_VALUE = 1 << 16
"""Bytes up to which an input is kept by value.

Of a larger one its digest is kept, and its value only where a witness needs it.
"""
NO_RADIUS = -1.0  # stands for NaN, which SQLite stores as null, and nulls are never equal
_NAN = math.nan

FACT = """point, kind, tool, radius, margin, guarantee, prediction, forwards, backwards, seconds,
    note, asked, run, confidence"""
"""The columns of `fact`; `point` and `tool` are numbers there."""


def stored(radius: float) -> float:
    """Return a radius as it is stored."""
    return NO_RADIUS if radius != radius else float(radius) + 0.0


def row_of(number: int, fingerprint: str, e: Evidence, run: int) -> Row:
    """Return a fact as a row under the chain, texts in full."""
    radius, margin, asked = float(e.radius), float(e.margin), float(e.asked_radius)
    return (
        number,
        fingerprint,
        e.point,
        e.kind,
        e.tool,
        NO_RADIUS if radius != radius else radius + 0.0,  # SQLite keeps no sign of a zero
        None if margin != margin else margin + 0.0,
        e.guarantee,
        int(e.prediction),
        int(e.forwards),
        int(e.backwards),
        float(e.seconds) + 0.0,
        e.note,
        None if e.array is None else pack(e.array),
        None if asked != asked else asked + 0.0,
        e.run or run,
        float(e.confidence),
    )


def fact(row: Row, names: Mapping[int, str]) -> Evidence:
    """Return the fact of a row of the columns `FACT`; `names` gives its texts."""
    point, kind, tool, radius, margin, guarantee, prediction, *cost, note, asked, run, sure = row
    forwards, backwards, seconds = cost
    return Evidence(
        names.get(point, ""),
        kind,
        names.get(tool, ""),
        _NAN if radius == NO_RADIUS else radius,
        _NAN if margin is None else margin,
        guarantee,
        prediction,
        forwards,
        backwards,
        seconds,
        note,
        None,
        _NAN if asked is None else asked,
        run,
        sure,
    )


def row_of_point(number: int, fingerprint: str, p: Point, *, whole: bool = False) -> Row:
    """Return a point as a row under the chain.

    It is kept by value; a large one by its digest alone, unless `whole`.
    """
    by_value = p.array is not None and (whole or p.array.nbytes <= BY_VALUE)
    return (
        number,
        fingerprint,
        p.name,
        int(p.position),
        int(p.label),
        None if p.target is None else int(p.target),
        float(p.radius) + 0.0,
        p.digest or ("" if by_value or p.array is None else digest_of(p.array)),
        pack(p.array) if p.array is not None and by_value else None,
    )


def point(row: Row) -> Point:
    """Return the point of a row.

    The columns are name, position, label, target, radius, digest, array.
    """
    name, position, label, target, radius, digest, array = row
    return Point(
        name, position, label, radius, None if array is None else unpack(array), target, digest
    )


def row_of_question(number: int, q: Question) -> Row:
    """Return a question as a row under the chain."""
    data = None if q.data is None else pack_data(q.data)
    return number, q.fingerprint, q.title, json.dumps(q.facts, sort_keys=True), data


def question(row: Row) -> Question:
    """Return the question of a row: fingerprint, title, facts, data."""
    fingerprint, title, facts, data = row
    return Question(
        fingerprint, title, json.loads(facts), None if data is None else unpack_data(data)
    )


def row_of_run(r: Run) -> Row:
    """Return a run as a row under the chain."""
    listed: Sequence[Any] = (r.plan, r.radius, r.radii, r.versions, r.argv, r.notes)
    told = (json.dumps(value, sort_keys=True) for value in listed)
    return r.number, r.question, r.time, r.title, int(r.seed), *told


def run(row: Row) -> Run:
    """Return the run of a row under the chain."""
    number, question, time, title, seed, *told = row
    plan, radius, radii, versions, argv, notes = map(json.loads, told)
    listed = (tuple(plan), tuple(radius), tuple(radii))
    return Run(question, seed, *listed, versions, title, tuple(argv), notes, time, number)


def row_of_model(number: int, m: Model) -> Row:
    """Return a model as a row under the chain."""
    texts = (json.dumps(m.circumstances, sort_keys=True), json.dumps(m.parts))
    return number, m.digest, m.name, m.met, *texts, pack(m.points), pack(m.logits)


def model(row: Row) -> Model:
    """Return the model of a row.

    The columns are digest, name, met, circumstances, parts, points, logits.
    """
    digest, name, met, circumstances, parts, points, logits = row
    told = json.loads(circumstances), json.loads(parts)
    return Model(digest, name, met, *told, unpack(points), unpack(logits))
