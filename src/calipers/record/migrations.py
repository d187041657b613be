"""Migration of records of earlier versions to this version.

Version 1 had no chain. Version 2 kept descriptions of the question in words, which included the
seed, plan and radius of the latest run, and chained every row by itself. Where its words say all
there is to say about threat model and goal they become data; where they do not (a box by features,
a mask, weights, a specification) the question stays known in words until it is measured again.

Alterations are looked for before the migration and stay on record: the chain of the new version
begins with them, and with the head of the old one.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from calipers.record import chain
from calipers.record.packing import pack_data
from calipers.record.schema import create

_OLD = {
    "question": 1,
    "point": 2,
    "evidence": 5,
    "decision": 3,
    "passed": 5,
    "model": 1,
    "checked": 1,
}
"""The tables of version 2, and how many first columns named a row."""

_OF_THE_RUN = ("seed", "plan", "versions", "radii", "title")
_NOTES = (
    "next_step",
    "gradients",
    "lower_jaw",
    "audits",
    "not_run",
    "failed",
    "begun_anew",
    "exact",
)
"""Facts of a question in version 2 that were those of its latest run."""

Facts = dict[str, Any]
_PUT_QUESTION = "insert into question (fingerprint, title, facts, data) values (?, ?, ?, ?)"


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Migrate the tables of version 1 or 2, inside a transaction."""
    held = [table for table in (*_OLD, "chain", "meta") if _exists(db, table)]
    told = {"version": version, "head": "", "altered": []}
    if version == 2:
        told |= {"head": chain.held_head(db)[1].hex(), "altered": list(_altered(db))}
    for table in held:
        db.execute(f"alter table {table} rename to old_{table}")
    create(db)
    if version == 2:
        db.execute("insert into meta select name, value from old_meta where name != 'head'")
    else:
        count = db.execute("select count(*) from old_evidence").fetchone()[0]
        db.execute("insert into meta values ('unchained', ?)", (json.dumps(count),))
    _move(db, version)
    for table in held:
        db.execute(f"drop table old_{table}")
    links = chain.Chain(db)
    links.earlier(told)
    for table, sql in chain.TABLES.items():
        links.add(table, db.execute(sql).fetchall())
    links.seal()


def _exists(db: sqlite3.Connection, table: str) -> bool:
    sql = "select 1 from sqlite_master where type = 'table' and name = ?"
    return db.execute(sql, (table,)).fetchone() is not None


def _move(db: sqlite3.Connection, version: int) -> None:
    """Copy the rows of the old tables into the new ones."""
    db.execute(
        """insert or ignore into name (text) select fingerprint from old_question
        union all select question from old_point union all select question from old_evidence
        union all select tool from old_evidence union all select name from old_point
        union all select point from old_evidence"""
    )
    for fingerprint, title, facts in db.execute("select * from old_question order by rowid"):
        _move_question(db, fingerprint, title, facts)
    db.execute(
        """insert into point (question, name, position, label, radius, digest, array)
        select q.id, n.id, p.position, p.label, p.radius, '', p.array from old_point p
        join name q on q.text = p.question join name n on n.text = p.name order by p.rowid"""
    )
    asked = "e.asked" if version > 1 else "null"
    db.execute(
        f"""insert into evidence (question, point, kind, tool, radius, margin, guarantee,
        prediction, forwards, backwards, seconds, note, array, asked, run, confidence)
        select q.id, p.id, e.kind, t.id, e.radius, e.margin, e.guarantee, e.prediction,
        e.forwards, e.backwards, e.seconds, e.note, e.array, {asked},
        coalesce((select r.id from run r where r.question = q.id), 0), 1.0
        from old_evidence e join name q on q.text = e.question join name t on t.text = e.tool
        join name p on p.text = e.point
        order by e.rowid"""
    )
    if version == 1:
        return
    db.execute(
        """insert into decision (question, scope, key, value)
        select question, scope, key, value from old_decision order by rowid"""
    )
    db.execute(
        """insert into passed select e.id, p.over from old_passed p join name q on q.text =
        p.question join name t on t.text = p.tool join name n on n.text = p.point
        join evidence e on e.question = q.id and e.point = n.id and e.kind = p.kind
        and e.tool = t.id and e.radius = p.radius"""
    )
    db.execute(
        """insert into model (digest, name, met, circumstances, parts, points, logits)
        select digest, name, met, circumstances, parts, points, logits from old_model
        order by rowid"""
    )
    db.execute("insert into checked select * from old_checked order by number")


def _move_question(db: sqlite3.Connection, fingerprint: str, title: str, text: str) -> None:
    """Split the facts of a question from those of its latest run."""
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):  # altered by hand: kept as it stands, the chain reports it
        db.execute(_PUT_QUESTION, (fingerprint, title, text, None))
        return
    data = data_of(facts)
    run = {key: facts.pop(key) for key in _OF_THE_RUN if key in facts}
    notes = {key: facts.pop(key) for key in _NOTES if key in facts}
    threat, given = facts.get("threat"), facts.get("data")
    threat = threat if isinstance(threat, dict) else {}
    radius = threat.pop("radius", [])
    threat.pop("radius_standardised", None)
    if isinstance(given, dict):
        notes["points"] = given.pop("points", None)
    try:
        facts["threat"] = in_words(threat)
    except (LookupError, TypeError):  # altered by hand
        facts["threat"] = threat
    packed = None if data is None else pack_data(data)
    db.execute(_PUT_QUESTION, (fingerprint, title, json.dumps(facts, sort_keys=True), packed))
    row = (
        fingerprint,
        "",
        str(run.get("title", title)),
        run["seed"] if isinstance(run.get("seed"), int) else 0,
        *(
            json.dumps(value, sort_keys=True)
            for value in (
                run.get("plan", []),
                radius if isinstance(radius, list) else [radius],
                run.get("radii", []),
                run.get("versions", {}),
                [],
                notes,
            )
        ),
    )
    db.execute(
        """insert into run (question, time, title, seed, plan, radius, radii, versions, argv, notes)
        values ((select id from name where text = ?), ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        row,
    )


def in_words(threat: Facts) -> Facts:
    """Return a threat's description without the lists that version 2 kept."""
    words = dict(threat)
    constraints, symbols = words.get("constraints"), words.get("letters")
    if isinstance(constraints, list) and len(constraints) == 2:
        words["constraints"] = len(constraints[1])
    if isinstance(symbols, dict):
        numeric = symbols.get("numeric")
        words["letters"] = {
            "groups": len(symbols["groups"]),
            "restricted": symbols.get("allowed") is not None,
            "numeric": None
            if numeric is None
            else {"norm": numeric["norm"], "radius": numeric["radius"]},
        }
    return words


def data_of(facts: Facts) -> dict[str, Any] | None:
    """Return threat model and goal as data, None where words do not suffice."""
    try:
        threat, goal = _threat(facts["threat"]), _goal(facts["goal"])
    except (LookupError, TypeError, ValueError):
        return None
    return None if threat is None or goal is None else {"threat": threat, "goal": goal}


def _threat(words: Facts) -> Facts | None:
    symbols = words.get("letters")
    if symbols is not None:
        allowed, numeric = symbols["allowed"], symbols["numeric"]
        return {
            "kind": "substitutions",
            "groups": symbols["groups"],
            "allowed": None if allowed is None else np.array(allowed, dtype=bool),
            "continuous": None if numeric is None else _numeric(numeric),
        }
    box, norm = words["box"], words["norm"]
    by_feature = box is not None and not all(isinstance(end, int | float) for end in box)
    if by_feature or words["masked_features"] is not None or words["weights"] is not None:
        return None
    rows = words.get("constraints")
    return _ball(norm, box, None, None, rows)


def _numeric(said: Facts) -> Facts:
    box = said["box"]
    return {
        **_ball(
            said["norm"],
            None if box is None else [np.array(end, dtype=np.float64) for end in box],
            None if said["mask"] is None else np.array(said["mask"], dtype=bool),
            None if said["weights"] is None else np.array(said["weights"], dtype=np.float64),
            said.get("constraints"),
        ),
        "radius": np.array(said["radius"], dtype=np.float64),
    }


def _ball(norm: str, box: Any, mask: Any, weights: Any, rows: Any) -> Facts:
    constraints = None if rows is None else [np.array(part, dtype=np.float64) for part in rows]
    return {
        "kind": "ball",
        "norm": norm,
        "box": box,
        "mask": mask,
        "weights": weights,
        "constraints": constraints,
    }


def _goal(words: str) -> Facts | None:
    if words == "untargeted":
        return {"kind": "untargeted"}
    name, _, target = words.partition(" at class ")
    return {"kind": name, "target": int(target)} if name == "targeted" else None


def _altered(db: sqlite3.Connection) -> Iterator[str]:
    """Yield in words where the rows of version 2 do not match its chain."""
    head, count, last = bytes(16), 0, dict[tuple[str, str], bytes]()
    for table, name, digest in db.execute("select kind, name, digest from chain order by place"):
        held = digest if isinstance(digest, bytes) else repr(digest).encode()
        linked = head + f"{table}\0{name}\0".encode() + held
        head, count = hashlib.sha256(linked).digest()[:16], count + 1
        last[table, name] = digest
    if (count, head) != chain.held_head(db):
        yield "its chain of digests was cut or rewritten"
    for table, named in _OLD.items():
        found = {"changed": 0, "put in": 0}
        for row in db.execute(f"select * from {table}"):
            expected = last.pop((table, _plain(row[:named])), None)
            what = "put in" if expected is None else "changed"
            found[what] += expected != _digest(table, row)
        found["taken out"] = sum(kind == table for kind, _ in last)
        for what, many in found.items():
            if many:
                yield f"{many} of the {table} rows {'was' if many == 1 else 'were'} {what}"


def _plain(cells: Sequence[Any]) -> str:
    return json.dumps([cell.hex() if isinstance(cell, bytes) else cell for cell in cells])


def _digest(table: str, row: Sequence[Any]) -> bytes:
    cells = [
        {"bytes": hashlib.sha256(cell).hexdigest()} if isinstance(cell, bytes) else cell
        for cell in row
    ]
    return hashlib.sha256(json.dumps([table, cells]).encode()).digest()[:16]
