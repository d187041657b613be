"""Records of earlier versions, written by the code of their time: do they open, show, pass the
check and go on?
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from torch import nn

import calipers
from calipers.api.check import check
from calipers.measurement.plan import Plan, Stage
from calipers.problem.recorded import recorded_threat
from calipers.record import chain
from calipers.record.record import SCHEMA_VERSION, Record
from calipers.report.render import render_html
from calipers.report.text import render_text
from calipers.threats.substitutions import Substitutions, one_hot_groups

DATA = Path(__file__).parent / "data"
MASK = torch.tensor([True, True, False, True])
PLAN = Plan(
    "both",
    (
        Stage(calipers.attacks.PGD(steps=5), "attack"),
        Stage(calipers.certificates.IBP(), "certifier"),
        Stage(calipers.certificates.CROWN(), "certifier"),
    ),
)


def net(inputs: int = 4) -> nn.Module:
    """The network that was measured: no generator draws its weights."""
    layers = [nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 3)]
    with torch.no_grad():
        for k, layer in enumerate(layers[::2]):
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
            turned = torch.arange(weight.numel()).mul(2.399963 + k).sin()
            weight.copy_(turned.view_as(weight))
            bias.copy_(torch.arange(len(bias)).mul(1.7).cos() / 4)
    return nn.Sequential(*layers).eval()


def points(n: int = 6) -> torch.Tensor:
    return (torch.arange(n * 4).mul(0.618034) % 1).view(n, 4)


@pytest.fixture(params=[1, 2])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, Path]:
    return request.param, copied(request.param, tmp_path)


def copied(version: int, folder: Path) -> Path:
    return Path(shutil.copy(DATA / f"version-{version}.calipers", folder / "run.calipers"))


def rows(path: Path) -> list[tuple[object, ...]]:
    """Return what a file of an earlier version holds of evidence."""
    with sqlite3.connect(path) as db:
        sql = "select question, point, kind, tool, radius, margin from evidence order by rowid"
        found = db.execute(sql).fetchall()
    db.close()
    return found


def held(ledger: Record) -> list[tuple[object, ...]]:
    return [
        (q.fingerprint, e.point, e.kind, e.tool, e.radius, e.margin)
        for q in ledger.questions()
        for e in ledger.evidence(q.fingerprint)
    ]


def test_an_old_record_is_read_without_a_write(old: tuple[int, Path]) -> None:
    version, path = old
    before, expected = path.read_bytes(), rows(path)
    with Record(path, read_only=True) as ledger:
        assert sorted(held(ledger)) == sorted(expected)
        text = render_text(ledger)
        page = render_html(ledger, path.with_suffix(".html")).read_text()
        trust = ledger.trust()
    assert path.read_bytes() == before
    assert "certified: IBP 2, CROWN 1" in text and "WARNING" not in text and "PGD" in page
    assert ("written before records were chained" in text) == (version == 1)
    assert trust.unchained == (len(expected) if version == 1 else 0)


def test_an_old_record_is_brought_up_to_date(old: tuple[int, Path]) -> None:
    version, path = old
    expected = rows(path)
    with Record(path, read_only=True) as reader:
        shown, head = render_text(reader), reader.trust().head
    with Record(path) as ledger:
        assert sorted(held(ledger)) == sorted(expected)
        assert not ledger.trust().altered and ledger.trust().head == head
        assert render_text(ledger) == shown
        for question in ledger.questions():
            (run,) = ledger.runs(question.fingerprint)
            assert run.plan[0] in ("both", "letters") and run.versions["calipers"] == "0.1.0"
            assert "seed" not in question.facts and "radius" not in question.facts["threat"]
            facts = ledger.evidence(question.fingerprint)
            assert {e.run for e in facts} == {run.number} and {e.confidence for e in facts} == {1.0}
    with sqlite3.connect(path) as db:
        assert db.execute("pragma user_version").fetchone() == (SCHEMA_VERSION,)
        tables = {name for (name,) in db.execute("select name from sqlite_master")}
        assert not any(name.startswith("old_") for name in tables)
        (link,) = db.execute("select rows from chain where place = 1").fetchone()
        assert f'"version": {version}'.encode() in link
    db.close()


def test_a_record_of_version_2_is_checked(tmp_path: Path) -> None:
    path = copied(2, tmp_path)
    found = check(path, net())
    assert all(one.sound for one in found)
    assert [one.witnesses > 0 and one.certificates > 0 for one in found] == [True, True, False]
    (words,) = found[2].left
    assert "in words alone" in words
    again = check(path, net(), threat=calipers.Ball("linf", 0.1, mask=MASK))
    assert again[2].sound and again[2].witnesses > 0 and not again[2].left
    (wrong,) = check(path, net(), threat=calipers.Ball("linf", 0.1))[2].left
    assert "differs from the one recorded" in wrong
    (mixed,) = check(path, net(7))
    assert mixed.sound and mixed.witnesses > 0


def test_words_of_version_2_become_the_threat_that_was_measured(tmp_path: Path) -> None:
    with Record(copied(2, tmp_path), read_only=True) as ledger:
        found = [q.data for q in ledger.questions()]
    numeric = calipers.Ball("linf", 0.1, constraints=([[1.0]], [0.95]))
    asked = (
        calipers.Ball("linf", 1.0),
        calipers.Ball("l2", 1.0),
        None,
        Substitutions(one_hot_groups(2, 3), 1, continuous=numeric),
    )
    for data, threat in zip(found, asked, strict=True):
        assert (data is None) == (threat is None)
        if data is not None and threat is not None:
            back = recorded_threat(data["threat"], torch.ones(6))
            assert back.identity() == threat.identity()


def test_a_record_of_version_1_knows_its_model_by_weights_alone(tmp_path: Path) -> None:
    with pytest.raises(calipers.BadInput, match="measured before a model's program belonged"):
        check(copied(1, tmp_path), net())


def test_an_old_record_is_taken_up_and_a_question_in_words_becomes_data(tmp_path: Path) -> None:
    path, model, x = copied(2, tmp_path), net(), points()
    y = model(x).argmax(1)
    before = len(rows(path))
    masked = calipers.Ball("linf", 0.2, mask=MASK)
    with Record(path) as ledger:
        for threat in (calipers.Ball("linf", 0.15), masked):
            result = calipers.measure(model, x, y, threat, plan=PLAN, record=ledger)
            assert [r.seed for r in result.summary.runs] == [0 if threat is not masked else 3, 0]
        assert len(held(ledger)) <= before + 12, "nothing was asked twice but under another seed"
        assert all(one.sound and not one.left for one in check(ledger, model))


def test_what_was_altered_before_stays_told(tmp_path: Path) -> None:
    path = copied(2, tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("update evidence set margin = margin + 1 where kind = 'certificate'")
        db.execute("delete from evidence where kind = 'witness'")
    db.close()
    with Record(path, read_only=True) as ledger:
        told = ledger.trust().altered
    assert any("evidence rows were changed" in said for said in told), told
    assert any("evidence rows were taken out" in said for said in told), told
    with Record(path) as ledger:
        assert ledger.trust().altered == told
    with Record(path) as ledger:
        assert ledger.trust().altered == told and "WARNING" in render_text(ledger)


def test_a_migration_that_believes_what_it_finds_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calipers.record.migrations._altered", lambda db: ())
    with pytest.raises(AssertionError):
        test_what_was_altered_before_stays_told(tmp_path)


def test_the_note_of_earlier_alterations_cannot_be_taken_out(tmp_path: Path) -> None:
    path = copied(2, tmp_path)
    Record(path).close()
    with sqlite3.connect(path) as db:
        db.execute("delete from chain where kind = ?", (chain.EARLIER,))
    db.close()
    with Record(path) as ledger:
        assert any("cut or rewritten" in said for said in ledger.trust().altered)


def test_a_migration_that_is_cut_short_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(2, tmp_path)
    expected = rows(path)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("calipers.record.migrations._move", cut)
        with pytest.raises(KeyboardInterrupt):
            Record(path)
    assert rows(path) == expected
    with Record(path) as ledger:
        assert sorted(held(ledger)) == sorted(expected)
