"""Are examples of tables and sequences told in the words of their data, also from the record alone?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import calipers
from calipers import Ball, Plan, Record, Stage, Substitutions, one_hot_groups
from calipers.attacks import PGD, SubstitutionSearch
from calipers.record.evidence import Question
from calipers.report.naming import Names
from calipers.report.render import page
from calipers.report.report import summaries
from calipers.report.text import render_text

pytestmark = pytest.mark.one_in(1)

DNA = Plan("dna", (Stage(SubstitutionSearch(), "attack"),))


class Sequences(nn.Module):
    """Tells whether position 2 holds the symbol 1."""

    classes_ = ("quiet", "loud")

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(20, 2)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias[:] = torch.tensor([0.0, -0.5])
            self.out.weight[1, 2 * 4 + 1] = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.flatten(1))


def sequences(*texts: str) -> torch.Tensor:
    return torch.stack([torch.eye(4)[["ACGT".index(c) for c in text]] for text in texts])


def measured(path: Path | None, symbols: str | None = "ACGT") -> calipers.Result:
    threat = Substitutions(one_hot_groups(5, 4), 1, symbols=symbols)
    x = sequences("ACGTA", "ACCTA")
    with Record(path) as record:
        return calipers.measure(
            Sequences().eval(), x, ["quiet", "loud"], threat, plan=DNA, record=record
        )


def test_changed_symbols_are_marked(tmp_path: Path) -> None:
    measured(tmp_path / "a.calipers")
    with Record(tmp_path / "a.calipers", read_only=True) as record:
        said, shown = render_text(record), page(summaries(record))
    assert "point 0, quiet -> loud, 1 substitution: AC[G->C]TA" in said
    assert "<del>G</del><ins>C</ins>" in shown
    assert "quiet" in shown


def test_symbols_without_names_are_told_by_number(tmp_path: Path) -> None:
    assert "position 2: 2 -> 1" in str(measured(tmp_path / "a.calipers", symbols=None))


def test_symbols_are_no_part_of_the_question(tmp_path: Path) -> None:
    groups = one_hot_groups(5, 4)
    assert (
        Substitutions(groups, 1).identity() == Substitutions(groups, 1, symbols="ACGT").identity()
    )
    (checked,) = (measured(tmp_path / "a.calipers"),)
    with Record(tmp_path / "a.calipers", read_only=True) as record:
        assert all(one.sound for one in calipers.check(record, Sequences().eval()))
    assert checked.finished


@pytest.mark.parametrize("symbols", ["ACG", "ACGA", ["A", "C", "G", ""]])
def test_symbols_that_do_not_fit_are_refused(symbols: str) -> None:
    with pytest.raises(calipers.BadInput, match="symbols names each of the 4 columns"):
        Substitutions(one_hot_groups(5, 4), 1, symbols=symbols)


def test_a_frame_and_an_estimator_name_columns_and_classes(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    linear = pytest.importorskip("sklearn.linear_model")
    age = np.linspace(20, 60, 12)
    work = np.array(["none", "part", "full"] * 4)
    frame = pandas.get_dummies(pandas.DataFrame({"age": age, "work": work}), dtype=float)
    paid = np.where(work == "full", "paid", "refused")
    model = linear.LogisticRegression().fit(frame, paid)
    columns = list(frame.columns)
    groups = [[columns.index(f"work_{name}") for name in ("full", "none", "part")]]
    threat = Substitutions(groups, 1, continuous=Ball("linf", 1.0, box=(18, 70)))
    plan = Plan("table", (Stage(SubstitutionSearch(), "attack"),))
    with Record(tmp_path / "b.calipers") as record:
        result = calipers.measure(model, frame, paid, threat, plan=plan, record=record)
        told = result.to_frame()
    assert set(told["label"]) == {"paid", "refused"}
    broken = told[told["verdict"] == "broken"]
    assert len(broken) > 0
    assert broken["changes"].str.contains(r"work: \w+ -> \w+").all()
    assert set(broken["taken_for"]) <= {"paid", "refused"}
    with Record(tmp_path / "b.calipers", read_only=True) as record:
        said, shown = render_text(record), page(summaries(record))
    assert "work: full -> " in said or " -> full" in said
    assert '<th scope="row">work</th>' in shown


def test_a_ball_on_a_frame_tells_columns(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    model = nn.Linear(2, 2).double().eval()
    with torch.no_grad():
        model.weight[:] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        model.bias[:] = torch.tensor([0.003, 0.0])
    frame = pandas.DataFrame({"height": [0.1, 0.9], "weight": [0.5, 0.5]})
    plan = Plan("one", (Stage(PGD(steps=5, restarts=1), "attack"),))
    threat = Ball("linf", 0.2, box=None)
    result = calipers.measure(model, frame, [0, 0], threat, plan=plan)
    assert "example  point 0, 0 -> 1" in str(result)
    assert "height: 0.1 -> -" in str(result)
    assert result.to_frame()["changes"].tolist()[1] == ""


def test_pictures_stay_pictures() -> None:
    x, y = calipers.load_data(None, points=4)
    plan = Plan("one", (Stage(PGD(steps=10, restarts=1), "attack"),))
    result = calipers.measure(calipers.load("mnist-plain"), x, y, Ball("linf", 0.1), plan=plan)
    assert "example  " not in str(result)
    assert "changes" not in result.to_frame()
    assert "<img" in page([result.summary])


def test_names_of_a_group_are_those_of_its_columns() -> None:
    names = Names(
        features=("age", "marital_not_married", "marital_married", "a", "b"),
        groups=((1, 2), (3, 4)),
    )
    before, after = np.array([1.0, 1, 0, 1, 0]), np.array([2.5, 0, 1, 0, 1])
    assert [str(c) for c in names.changes(before, after)] == [
        "marital: not_married -> married",
        "category 1: a -> b",
        "age: 1 -> 2.5",
    ]


def test_long_sequences_are_cut_around_what_changed() -> None:
    names = Names(symbols=("A", "C"), groups=tuple((2 * i, 2 * i + 1) for i in range(100)))
    before, after = np.tile([1.0, 0.0], 100), np.tile([1.0, 0.0], 100)
    after[100:102] = [0.0, 1.0]
    assert "".join(map(str, names.pieces(before, after))) == f"…{'A' * 12}[A->C]{'A' * 12}…"


@pytest.mark.parametrize(
    ("facts", "data"),
    [
        ({"data": "text"}, None),
        ({"data": {"features": [1, 2], "classes": {"a": 1}}}, {"threat": {"groups": [["x"]]}}),
        ({"data": {"features": ["a"]}}, {"threat": {"groups": [[0, 9]], "symbols": 3}}),
        ({}, {"threat": "forged"}),
    ],
)
def test_a_forged_record_names_nothing(facts: dict[str, object], data: dict[str, object]) -> None:
    names = Names.of(Question("f", "t", facts, data))
    assert names.changes(np.zeros(3), np.ones(3)) == ()
    assert names.pieces(np.zeros(3), np.ones(3)) == ()
    assert names.of_class(7) == "7"
