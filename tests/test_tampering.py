"""Does a record tell that it was altered? Every kind of edit by hand is seen by the report and
fails the check; an older record still opens.
"""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import calipers
from calipers.api.check import check
from calipers.errors import RecordError
from calipers.measurement.plan import Plan, Stage
from calipers.record import chain
from calipers.record.evidence import Evidence, Point, Question
from calipers.record.record import Record
from calipers.report.render import render_html
from calipers.report.text import render_text

PLAN = Plan(
    "both",
    (
        Stage(calipers.attacks.PGD(steps=5), "attack"),
        Stage(calipers.certificates.IBP(), "certifier"),
    ),
)
BALL = calipers.Ball("linf", 0.05)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a record with witnesses, certificates and decisions."""
    path = tmp_path_factory.mktemp("record") / "run.calipers"
    x = torch.rand(24, 4, generator=torch.Generator().manual_seed(0))
    with Record(path) as ledger:
        result = calipers.measure(net(), x, net()(x).argmax(1), BALL, plan=PLAN, record=ledger)
        assert (
            0 < result.robust_accuracy.certified.count < result.robust_accuracy.attacked.count < 24
        )
        ledger.decide(result.summary.question.fingerprint, "scope", "key", lambda: 1)
    return path.read_bytes()


@pytest.fixture
def record(measured: bytes, tmp_path: Path) -> Path:
    (tmp_path / "run.calipers").write_bytes(measured)
    return tmp_path / "run.calipers"


def edited(record: Path, *statements: str) -> None:
    with sqlite3.connect(record) as db:
        for statement in statements:
            assert db.execute(statement).rowcount, "the edit must change something"
    db.close()


EDITS: dict[str, tuple[str, ...]] = {
    "labels": ("update point set label = 1 - label where label < 2",),
    "radii tripled": ("update evidence set radius = 3 * radius where kind = 'certificate'",),
    "a certificate above a witness": (
        "insert into evidence select 9999, question, point, 'certificate', (select id from name "
        "where text = 'IBP()'), radius * 2, 1, 'float64-checked', -1, 0, 0, 0, '', null, null, 1, "
        "1.0 from evidence where kind = 'witness' limit 1",
    ),
    "a margin": ("update evidence set margin = margin + 1 where kind = 'certificate'",),
    "a guarantee": (
        "update evidence set guarantee = 'float32-executed' where kind = 'certificate'",
    ),
    "a point": (
        "update point set array = (select array from point where position = 1) where position = 0",
    ),
    "a witness": (
        "update evidence set array = (select array from point where position = 1) where kind = "
        "'witness'",
    ),
    "the last rows": ("delete from evidence where rowid > (select max(rowid) - 3 from evidence)",),
    "the last rows and their links": (
        "delete from evidence where id > (select max(id) from evidence) - (select length(rows) / 8 "
        "from chain where kind = 'evidence' order by place desc limit 1)",
        "delete from chain where place in (select place from chain where kind = 'evidence' order "
        "by place desc limit 1)",
    ),
    "all witnesses": ("delete from evidence where kind = 'witness'",),
    "the question's facts": (
        """update question set facts = replace(facts, '"parameters": ', '"parameters": 1')""",
    ),
    "the question's data": ("update question set data = null",),
    "the run's plan": ("update run set plan = '[]'",),
    "whose run it was": ("update evidence set run = 2 where kind = 'witness'",),
    "how sure it is": ("update evidence set confidence = 0.5 where kind = 'certificate'",),
    "the name of a tool": ("update name set text = 'IBP(x)' where text = 'IBP()'",),
    "a decision": ("update decision set value = '2'",),
    "a fact passed over": (
        "insert into passed select id, 1 from evidence where kind = 'witness' limit 1",
    ),
    "the model's parts": ("update model set parts = '{}'",),
    "a check that never was": (
        "insert into checked values (1, (select fingerprint from question), '2026-01-01', 9, 9, "
        "0, 99)",
    ),
    "the head": ("""update meta set value = '[1, "00"]' where name = 'head'""",),
    "an unreadable head": ("update meta set value = 'x' where name = 'head'",),
    "a digest": ("update chain set digests = x'00' where place = 3",),
    "a link's rows": ("update chain set rows = x'00' where place = 3",),
}


def shown(record: Path) -> tuple[str, str]:
    with Record(record, read_only=True) as ledger:
        text = render_text(ledger)
        return text, render_html(ledger, record.with_suffix(".html")).read_text()


@pytest.mark.one_in(1)
@pytest.mark.parametrize("edit", [e for e in EDITS if e != "a certificate above a witness"])
def test_an_edit_by_hand_is_told_by_text_page_and_check(record: Path, edit: str) -> None:
    edited(record, *EDITS[edit])
    assert_told(record)
    asked = Record(record, read_only=True)
    found = check(asked, net(), certificates=False)
    assert not any(one.sound for one in found) and any(
        "altered after it was written" in line for one in found for line in one.failures
    )


def assert_told(record: Path) -> None:
    text, page = shown(record)
    assert (
        "WARNING: this record was altered after it was written" in text
        and "this record was altered after it was written" in page
    )


def test_a_contradiction_put_in_by_hand_is_told_as_an_alteration(record: Path) -> None:
    """The jaws cross, so there is no table to show; the message still says who is to blame."""
    edited(record, *EDITS["a certificate above a witness"])
    with Record(record, read_only=True) as ledger:
        assert any("fact was put in" in said for said in ledger.trust().altered)
        with pytest.raises(
            calipers.Contradiction, match="the record was altered after it was written"
        ):
            render_text(ledger)


def test_an_untouched_record_says_that_it_was_not_checked_and_then_that_it_was(
    record: Path,
) -> None:
    text, page = shown(record)
    assert "WARNING" not in text and "altered" not in page
    assert "record   not checked: calipers check run.calipers" in text and "not checked" in page
    assert all(one.sound for one in check(record, net()))
    text, page = shown(record)
    assert (
        "record   checked on 20" in text
        and "certificates replayed, none failed" in text
        and "none failed" in page
        and "WARNING" not in text
    )
    with Record(record) as ledger:
        ledger.append(ledger.questions()[0].fingerprint, [Evidence("p", "attempt", "PGD()", 0.1)])
    assert "none failed; 1 facts were added since" in shown(record)[0]


def test_reading_writes_nothing(record: Path) -> None:
    before = record.read_bytes()
    shown(record)
    assert record.read_bytes() == before
    with (
        Record(record, read_only=True) as ledger,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        ledger.append(ledger.questions()[0].fingerprint, [Evidence("p", "attempt", "PGD()", 0.1)])


def test_a_record_in_a_folder_without_leave_to_write_is_read(record: Path) -> None:
    folder = record.parent / "locked"
    folder.mkdir()
    locked = folder / "run.calipers"
    locked.write_bytes(record.read_bytes())
    locked.chmod(stat.S_IRUSR)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with Record(locked, read_only=True) as ledger:
            assert not ledger.trust().altered and ledger.questions()
        assert [p.name for p in folder.iterdir()] == ["run.calipers"]
    finally:
        folder.chmod(stat.S_IRWXU)


def test_merging_keeps_the_chain_and_takes_nothing_from_an_altered_record(
    record: Path, tmp_path: Path
) -> None:
    with Record(tmp_path / "other") as other, Record(record, read_only=True) as whole:
        other.merge(whole)
        assert (
            not other.trust().altered
            and other.trust().facts == whole.trust().facts
            and other.models() == whole.models()
        )
    edited(record, *EDITS["labels"])
    with (
        Record(tmp_path / "third") as third,
        Record(record, read_only=True) as whole,
        pytest.raises(RecordError, match="altered after it was written"),
    ):
        third.merge(whole)


def test_a_failed_append_leaves_no_link(tmp_path: Path) -> None:
    with Record(tmp_path / "r") as ledger:
        ledger.ask(Question("q", "q"), [Point("p", 0, 1, 0.1, np.zeros(2))])
        with pytest.raises(sqlite3.IntegrityError):
            ledger.append(
                "q",
                [
                    Evidence("p", "witness", "a", 0.1),
                    Evidence("p", "witness", "b", 0.1, seconds=float("nan")),
                ],
            )
        assert ledger.trust() == Record(tmp_path / "r").trust() and not ledger.trust().altered
        ledger.append("q", [Evidence("p", "witness", "a", 0.1)])
        assert not ledger.trust().altered and ledger.trust().facts == 1


# ---- mutants: a part of the chain left out
# --------------------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[str, Callable[..., object]]] = {
    "rows are not hashed": ("a margin", lambda table, row: b"same" * 4),
    "blobs are not hashed": (
        "a witness",
        lambda table, row: chain.hashlib.sha256(
            repr([c for c in row if not isinstance(c, bytes)]).encode()
        ).digest()[:16],
    ),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_chain_with_a_gap_is_found_out(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, instead = MUTANTS[mutant]
    monkeypatch.setattr(chain, "digest_of", instead)
    x = torch.rand(24, 4, generator=torch.Generator().manual_seed(0))
    with Record(tmp_path / "run.calipers") as ledger:
        calipers.measure(net(), x, net()(x).argmax(1), BALL, plan=PLAN, record=ledger)
    edited(tmp_path / "run.calipers", *EDITS[edit])
    with pytest.raises(AssertionError):
        assert_told(tmp_path / "run.calipers")


def test_a_chain_whose_head_nobody_compares_is_found_out(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(record, *EDITS["the last rows and their links"])

    def believed(db: sqlite3.Connection) -> tuple[int, bytes]:
        head, count = bytes(16), 0
        for table, name, digest in db.execute(
            "select kind, rows, digests from chain order by place"
        ):
            head, count = chain._link(head, table, name, digest), count + 1
        return count, head

    assert_told(record)
    monkeypatch.setattr(chain, "held_head", believed)
    with pytest.raises(AssertionError):
        assert_told(record)
