"""Is a model that was edited ever given the numbers of its earlier version? The command line and Python, with models as people write and change them."""

from __future__ import annotations

import dataclasses
import runpy
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from beside import CASES, needs
from torch import Tensor, nn
from typer.testing import CliRunner

import calipers
from calipers.api.check import check
from calipers.cli.commands import app
from calipers.errors import BadInput, RecordError
from calipers.measurement import probe
from calipers.measurement.plan import Plan, Stage
from calipers.record.record import Record

PLAN = Plan("one", (Stage(calipers.attacks.PGD(steps=3), "attack"),))
BALL = calipers.Ball("linf", 0.05)

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__(); torch.manual_seed(0); self.a, self.b, self.gain = nn.Linear(6, 16), nn.Linear(16, 3), 1.0
        self.listed = [nn.Linear(3, 3)]
        def shift(module, given, out, by=0.5):
            return out + by
        self.a.register_forward_hook(shift)
    def forward(self, x):
        return self.gain * self.listed[0](self.b(torch.relu(self.a(x))))
def build():
    return Net().eval()
"""
EDITS = {
    "forward": ("torch.relu(self.a(x))", "torch.sin(40 * self.a(x))", "code of Net.forward differs"),
    "an attribute": ("nn.Linear(16, 3), 1.0", "nn.Linear(16, 3), -1.0", "gain was 1.0, is -1.0"),
    "a hook": ("return out + by", "return out - by", "code of forward hook 1 of a differs"),
    "a constant that a hook holds": ("by=0.5", "by=-2.5", "default 1 of forward hook 1 of a was 0.5, is -2.5"),
    "a listed submodule": ("[nn.Linear(3, 3)]", "[nn.Linear(3, 3, bias=False)]", "weights of listed[0].bias is gone"),
}  # fmt: skip


def command(*words: str) -> tuple[int, str]:
    """Run a command as the terminal does, and return its exit code and all that it said."""
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.output


def measuring(*more: str) -> tuple[int, str]:
    return command(
        *"measure -m net.py:build -d data.npz -e 0.02 -p quick -o none -q".split(), *more
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(folder: Path, n: int = 6) -> None:
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(1))
    np.savez(folder / "data.npz", x=x.numpy(), y=np.zeros(n, dtype=np.int64))


@pytest.mark.one_in(1)
@pytest.mark.parametrize("edit", list(EDITS))
def test_on_the_command_line_an_edit_is_refused_and_told(folder: Path, edit: str) -> None:
    data(folder)
    old, new, said = EDITS[edit]
    (folder / "net.py").write_text(NET)
    first = command(
        *"attack -t FGSM -m net.py:build -d data.npz -e 0.02 -q --record run.calipers".split()
    )
    assert first[0] == 0, first[1]
    (folder / "net.py").write_text(NET.replace(old, new))
    before = (folder / "run.calipers").read_bytes()
    code, text = measuring()
    assert (
        code == 2
        and said in text
        and "run.calipers holds evidence about net.py:build" in text
        and "certified" not in text
    )
    code, text = command("check", "run.calipers", "-m", "net.py:build")
    assert code == 2 and said in text
    assert (folder / "run.calipers").read_bytes() == before
    (folder / "net.py").write_text(f"# unchanged but for this line\n{NET}")
    assert (
        command(
            *"attack -t FGSM -m net.py:build -d data.npz -e 0.02 -q --record run.calipers".split()
        )[0]
        == 0
    )


def test_in_python_an_edit_is_refused_and_another_name_is_another_model(tmp_path: Path) -> None:
    path, x, y = (
        tmp_path / "run.calipers",
        torch.rand(4, 6, generator=torch.Generator().manual_seed(1)),
        torch.zeros(4, dtype=torch.long),
    )
    net = built(NET)
    calipers.measure(net, x, y, BALL, plan=PLAN, record=path)
    calipers.measure(built(NET), x, y, BALL, plan=PLAN, record=path)
    for old, new, said in EDITS.values():
        edited = built(NET.replace(old, new))
        with pytest.raises(
            RecordError,
            match=r"run\.calipers holds evidence about Net .*give the model a name of its own",
        ) as caught:
            calipers.measure(edited, x, y, BALL, plan=PLAN, record=path)
        assert said in str(caught.value)
        with pytest.raises(BadInput, match="no question about this model"):
            check(path, edited)
    calipers.measure(calipers.Classifier(edited, name="edited"), x, y, BALL, plan=PLAN, record=path)
    with Record(path, read_only=True) as ledger:
        assert [q.title for q in ledger.questions()] == ["Net", "edited"]


def built(source: str) -> nn.Module:
    held: dict[str, object] = {"__name__": "net"}
    exec(compile(source, "net.py", "exec", dont_inherit=True), held)
    return held["build"]()  # type: ignore[operator, no-any-return]


class Hidden(nn.Module):
    """Keeps a number where nobody can look: only its answers tell."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.inner, self.hidden = nn.Linear(6, 3), threading.local()
        self.hidden.gain = gain
        with torch.no_grad():
            self.inner.weight.copy_(torch.linspace(-1, 1, 18).view(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) -> (N, 3)."""
        return self.inner(x) * self.hidden.gain  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: object) -> Hidden:
        copy = Hidden(self.hidden.gain)
        copy.load_state_dict(self.state_dict())
        return copy


def probed(tmp_path: Path) -> Path:
    path, x = (
        tmp_path / "run.calipers",
        torch.rand(4, 6, generator=torch.Generator().manual_seed(1)),
    )
    torch.manual_seed(0)
    calipers.measure(Hidden(1.0), x, torch.zeros(4, dtype=torch.long), BALL, plan=PLAN, record=path)
    torch.manual_seed(0)
    assert calipers.Classifier(Hidden(1.0)).digest() == _same(Hidden(2.0)).digest()
    return path


def _same(module: Hidden) -> calipers.Classifier:
    torch.manual_seed(0)
    with torch.no_grad():
        module.inner.bias.copy_(nn.Linear(6, 3).bias)
    return calipers.Classifier(module)


def again(path: Path, gain: float) -> calipers.Classifier:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    model = _same(Hidden(gain))
    calipers.measure(model, x, torch.zeros(4, dtype=torch.long), BALL, plan=PLAN, record=path)
    return model


@pytest.mark.parametrize("mutant", [False, True])
def test_what_no_part_shows_the_answers_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    path = probed(tmp_path)
    if mutant:
        monkeypatch.setattr(probe, "answers_differ", lambda model, held: "")
        again(path, 2.0)
        return
    again(path, 1.0)
    for gain in (2.0, 1 + 1e-6):
        with pytest.raises(
            RecordError,
            match="same code and weights now answer otherwise: a logit at recorded point",
        ):
            again(path, gain)
    (found,) = check(path, _same(Hidden(2.0)), certificates=False)
    assert any("answer otherwise" in line for line in found.failures)


def test_elsewhere_rounding_may_differ_and_no_more(tmp_path: Path) -> None:
    with Record(probed(tmp_path)) as ledger:
        (held,) = ledger.models()
    model = _same(Hidden(1.0))
    model.check(torch.rand(4, 6))
    far = dataclasses.replace(held, circumstances={**held.circumstances, "threads": 99})
    moved = {by: held.logits + by * np.abs(held.logits).max() for by in (1e-7, 1e-3)}
    assert not probe.answers_differ(model, held) and not probe.answers_differ(model, far)
    assert probe.answers_differ(model, dataclasses.replace(held, logits=moved[1e-7]))
    assert not probe.answers_differ(model, dataclasses.replace(far, logits=moved[1e-7]))
    assert probe.answers_differ(model, dataclasses.replace(far, logits=moved[1e-3]))
    assert probe.answers_differ(
        model, dataclasses.replace(far, logits=np.where(held.logits > 0, np.nan, held.logits))
    )


# ---- the cases that showed it first ----------------------------------------------------------------------------------------------------------------------

here = needs(CASES)


@here
def test_the_first_case_of_an_edited_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command after the edit printed 93.3 % certified; the truth is 0 % certified."""
    for name in ("net_before.py", "net_after.py"):
        shutil.copy(CASES / "identity" / name, folder / name)
    monkeypatch.syspath_prepend(str(folder))
    runpy.run_path(str(CASES / "identity" / "data.py"))
    for name in ("net_before", "net_after"):
        sys.modules.pop(name, None)
    shutil.copy(folder / "net_before.py", folder / "net.py")
    code, text = measuring()
    assert code == 0 and "at least  93.3 %" in text
    shutil.copy(folder / "net_after.py", folder / "net.py")
    code, text = measuring()
    assert code == 2 and "code of Net.forward differs" in text and "93.3" not in text
    code, text = measuring("--record", "none")
    assert code == 0 and "at least   0.0 %" in text
    code, text = command("check", "run.calipers", "-m", "net.py:build")
    assert code == 2 and "code of Net.forward differs" in text


@here
def test_the_case_of_constants_held_as_plain_tensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(CASES / "situations"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(calipers, "measure", _quickly(calipers.measure))
    runpy.run_path(str(CASES / "situations" / "02_stale_record.py"))
    sys.modules.pop("_h", None)
    said = capsys.readouterr().out
    assert said.count("False") == 3 and "True" not in said
    assert (
        "model B, same run.calipers: RAISES calipers.errors.RecordError" in said
        and "mu differs; sd differs" in said
    )


def _quickly(measure: object) -> object:
    return lambda *given, **named: measure(*given, **{"plan": PLAN, **named})  # type: ignore[operator]
