"""Do results show themselves in a line, in a notebook and as a frame?"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import calipers
from calipers.report.wording import at_least, at_most


@pytest.fixture
def asked() -> tuple[nn.Module, torch.Tensor, torch.Tensor, calipers.Ball]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.rand(12, 4)
    return model, x, model(x).argmax(1), calipers.Ball("linf", 0.02)


def test_a_result_shows_its_numbers(
    asked: tuple[nn.Module, torch.Tensor, torch.Tensor, calipers.Ball],
) -> None:
    result = calipers.measure(*asked, plan="quick")
    robust = result.robust_accuracy
    shown = str(robust)
    low, high = at_least(robust.certified), at_most(robust.attacked)
    assert shown.startswith(f"certified {low} % <= robust accuracy <= {high} % attacked, 12 points")
    assert shown in repr(result) and "Tensor" not in repr(result) and len(repr(result)) < 200
    assert str(result.clean_accuracy) == "100.0 % (12 of 12)"
    page = result._repr_html_()
    assert page.startswith("<pre>") and "&lt;" not in str(result) and "robust accuracy" in page


def test_what_one_tool_did_is_one_line(
    asked: tuple[nn.Module, torch.Tensor, torch.Tensor, calipers.Ball],
) -> None:
    model, x, y, threat = asked
    attacked = calipers.attack(model, x, y, calipers.Ball("linf", 0.5), "PGD")
    assert repr(attacked).startswith(f"<AttackResult: {int(attacked.success.sum())} of 12 within")
    certified = calipers.certify(model, x, y, threat, "CROWN")
    count = int(certified.certified.sum())
    assert repr(certified) == f"<CertifyResult: {count} of 12 at the radius, float64-checked>"


def test_a_frame_holds_a_row_a_point(
    asked: tuple[nn.Module, torch.Tensor, torch.Tensor, calipers.Ball],
) -> None:
    pytest.importorskip("pandas")
    result = calipers.measure(*asked, plan="quick")
    frame = result.to_frame()
    assert len(frame) == 12 and list(frame["index"]) == list(range(12))
    assert list(frame["lower"]) == [row.lower for row in result.points]


def test_without_pandas_a_frame_is_refused(
    asked: tuple[nn.Module, torch.Tensor, torch.Tensor, calipers.Ball],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(calipers.BadInput, match="pip install pandas"):
        calipers.measure(*asked, plan="quick").to_frame()
