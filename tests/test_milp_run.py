"""Does a bracket close where it is asked to, in the library and on the command line, also after an
interrupt?
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from clocks import AMPLE
from terminal import calipers as run_calipers
from torch import nn

import calipers
from calipers.api.measure import measure_exactly
from calipers.certificates import milp as milp_module
from calipers.errors import BadInput
from calipers.measurement import exact as exact_module
from calipers.measurement import run as run_module
from calipers.measurement.exact import MET, closed, gaps
from calipers.record.bracket import Bracket

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()

def curved():
    return nn.Sequential(build(), nn.Tanh()).eval()
"""


def net() -> nn.Module:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def points(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points and the network's own answers, the last one made wrong."""
    x = torch.rand(n, 5, generator=torch.Generator().manual_seed(1))
    y = net()(x).argmax(1)
    y[-1] = (y[-1] + 1) % 3
    return x, y


@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
def test_exact_distances_close_the_bracket(norm: str) -> None:
    x, y = points()
    threat = calipers.Ball(norm, 0.1)
    loose = calipers.distance(net(), x, y, threat)
    tight = calipers.distance(net(), x, y, threat, exact=True)
    assert (
        tight.upper[-1] == 0
        and closed(tight, threat).exact == closed(tight, threat).points == 3
        and closed(tight, threat).widest == 0
    )
    assert (
        (tight.lower >= loose.lower).all()
        and (tight.upper <= loose.upper).all()
        and (gaps(tight, threat) <= MET).all()
    )


def test_a_record_is_taken_up_where_it_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = points()
    first = calipers.distance(
        net(), x, y, calipers.Ball("linf", 0.1), exact=True, record=tmp_path / "run"
    )
    monkeypatch.setattr(exact_module, "ask", lambda *a, **k: pytest.fail("nothing is left to ask"))
    again = calipers.distance(
        net(), x, y, calipers.Ball("linf", 0.1), exact=True, record=tmp_path / "run"
    )
    assert np.array_equal(first.lower, again.lower) and np.array_equal(first.upper, again.upper)


def test_an_interrupt_keeps_what_was_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = points()
    real, seen = calipers.Record.finish, []

    def once(*args: object, **named: object) -> object:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args, **named)  # type: ignore[arg-type]

    from calipers.measurement.question import begin
    from calipers.measurement.run import run

    problem = calipers.Problem.pose(net(), x, y, calipers.Ball("linf", 0.1))
    ledger = calipers.Record(tmp_path / "run")
    plan = calipers.Plan("none", ())
    begun = begin(problem, plan, ledger)
    run(problem, plan, ledger, begun=begun)
    monkeypatch.setattr(calipers.Record, "finish", once)
    from calipers.certificates.milp import MILP

    assert not exact_module.close(problem, MILP(seconds=AMPLE), ledger, run=begun.number)
    monkeypatch.undo()
    bracket = Bracket.of(problem.names, ledger.evidence(problem.fingerprint()))
    whole = calipers.distance(net(), x, y, calipers.Ball("linf", 0.1), exact=True)
    assert (
        (bracket.lower > 0).any()
        and (bracket.lower <= whole.upper).all()
        and (bracket.upper >= whole.lower).all()
    )


def test_the_command_line_says_how_closed_it_is(tmp_path: Path) -> None:
    x, y = points()
    (tmp_path / "net.py").write_text(MODEL)
    np.savez(tmp_path / "points.npz", x=x.numpy(), y=y.numpy())
    shown = run_calipers(
        tmp_path, "distance", "-m", "net.py:build", "-d", "points.npz", "-e", "0.1", "--exact", "-q"
    )
    assert shown.returncode == 0 and "exact: 3 of 3 distances" in shown.stdout
    refused = run_calipers(
        tmp_path,
        "distance",
        "-m",
        "net.py:curved",
        "-d",
        "points.npz",
        "-e",
        "0.1",
        "--exact",
        "-q",
        "--record",
        "none",
    )
    assert refused.returncode == 2 and "piecewise linear" in refused.stderr


def test_exact_distances_are_not_about_an_execution() -> None:
    from calipers.api.measure import measure_exactly

    with pytest.raises(BadInput, match="real arithmetic"):
        measure_exactly(
            net(),
            *points(),
            calipers.Ball("linf", 0.1),
            plan=calipers.Plan(guarantee="float32-executed"),
        )


def test_a_record_of_exact_distances_is_proved_again(tmp_path: Path) -> None:
    x, y = points()
    threat = calipers.Ball("linf", 0.1)
    calipers.distance(net(), x, y, threat, exact=True, record=tmp_path / "run")
    (checked,) = calipers.check(tmp_path / "run", net())
    assert checked.sound and checked.certificates == 3


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Search point by point: with several threads a Ctrl-C inside one of them leaves the others at
    work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


AT_WORK = [("encoded", 1), ("encoded", 2), ("encoded", 3), ("settle", 1), ("settle", 2)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("where", "call"), AT_WORK)
def test_a_point_that_was_at_work_when_the_interrupt_came_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    """What it had proved and found by then counts, but neither as the tool's last word nor for
    where the other tools look.
    """
    whole = _exactly(tmp_path / "whole")
    _interrupted(tmp_path / "run", monkeypatch, where, call)
    again = _exactly(tmp_path / "run")
    assert (again.lower == whole.lower).all() and (again.upper == whole.upper).all(), (
        "other brackets"
    )
    assert _tried(tmp_path / "run") == _tried(tmp_path / "whole"), "asked elsewhere"


@pytest.mark.usefixtures("one_thread")
def test_a_last_word_that_an_interrupt_made_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milp_module, "replace", lambda answer, **changes: answer)
    with pytest.raises(AssertionError, match="other brackets"):
        test_a_point_that_was_at_work_when_the_interrupt_came_is_asked_again(
            tmp_path, monkeypatch, "encoded", 2
        )


@pytest.mark.usefixtures("one_thread")
def test_tools_that_look_elsewhere_after_an_interrupt_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        run_module._Session,
        "_later",
        lambda self: {s.name for s in self.plan.stages} - self.through,
    )
    with pytest.raises(AssertionError, match="asked elsewhere"):
        test_a_point_that_was_at_work_when_the_interrupt_came_is_asked_again(
            tmp_path, monkeypatch, "settle", 1
        )


def _exactly(record: Path) -> calipers.Bracket:
    """Measure exactly, after a search and a bound."""
    stages = (
        calipers.Stage(calipers.attacks.FMN(steps=10), "attack", "distance"),
        calipers.Stage(
            calipers.certificates.CertifiedRadius(calipers.certificates.CROWN()),
            "certifier",
            "distance",
        ),
    )
    return measure_exactly(
        net(),
        *points(),
        calipers.Ball("linf", 0.1),
        plan=calipers.Plan("two", stages),
        record=record,
    ).bracket


def _tried(record: Path) -> set[tuple[str, str, float]]:
    """Return what every tool was asked, at which radii."""
    with calipers.Record(record, read_only=True) as ledger:
        (question,) = ledger.questions()
        return {
            (e.point, e.tool, e.radius)
            for e in ledger.evidence(question.fingerprint)
            if e.kind == "attempt"
        }


def _interrupted(record: Path, monkeypatch: pytest.MonkeyPatch, where: str, call: int) -> None:
    """Measure exactly, Ctrl-C coming when a program's model is made, or an example settled, for the
    `call`-th time.
    """
    owner = milp_module if where == "encoded" else milp_module.Examples
    real, calls = getattr(owner, where), list[int]()

    def once(*args: object) -> object:
        calls.append(1)
        if len(calls) == call and where == "encoded":
            raise KeyboardInterrupt
        result = real(*args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, once)
        _exactly(record)
    assert len(calls) == call
