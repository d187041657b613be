"""Does a record keep the question itself? Every threat and goal comes back from it and is checked
without a word from the user; runs do not overwrite each other; large inputs are known by digest.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from terminal import calipers as run_calipers
from torch import Tensor, nn

import calipers
from calipers.api.check import check
from calipers.errors import RecordError
from calipers.measurement import question
from calipers.measurement.plan import Plan, Stage
from calipers.problem.goals import Goal, Targeted, Untargeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.problem.recorded import data_of, recorded_goal, recorded_threat
from calipers.problem.specification import Specification
from calipers.record import rows
from calipers.record.evidence import Evidence, Point, Question, Run
from calipers.record.packing import pack, pack_data, unpack, unpack_data
from calipers.record.record import Record
from calipers.report.report import summaries
from calipers.report.text import render_text
from calipers.report.wording import advice
from calipers.threats.substitutions import Substitutions, one_hot_groups
from calipers.threats.threat import Threat

N, D = 8, 6
PLAN = Plan(
    "both",
    (
        Stage(calipers.attacks.PGD(steps=5), "attack"),
        Stage(calipers.certificates.IBP(), "certifier"),
    ),
)
F64 = torch.float64


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def sample() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = net(), torch.rand(N, D, generator=torch.Generator().manual_seed(2))
    x[:, :3] = torch.eye(3)[torch.arange(N) % 3]
    return model, x, model(x).argmax(1)


LOW, HIGH = torch.linspace(-0.3, 0.0, D), torch.linspace(1.0, 1.3, D, dtype=F64)
MASK = torch.tensor([True, False, True, True, True, True])
WEIGHTS = torch.linspace(0.5, 2.0, D, dtype=F64)
ROWS = (torch.ones(1, D, dtype=F64), torch.tensor([5.5], dtype=F64))
WORDS = one_hot_groups(1, 3)
THREATS: dict[str, Threat] = {
    "plain": calipers.Ball("linf", 0.1),
    "no box": calipers.Ball("l2", 0.2, box=None),
    "a box of tensors": calipers.Ball("linf", 0.1, box=(LOW, HIGH)),
    "an end of each kind": calipers.Ball("l1", 0.3, box=(-1, HIGH)),
    "half precision": calipers.Ball("linf", 0.1, box=(LOW.bfloat16(), HIGH.half())),
    "a mask": calipers.Ball("linf", 0.1, mask=MASK),
    "weights": calipers.Ball("l2", 0.2, weights=WEIGHTS),
    "everything": calipers.Ball("linf", 0.05, (LOW, 2.0), MASK, WEIGHTS, ROWS),
    "radii": calipers.Ball("linf", torch.linspace(0.05, 0.2, N, dtype=F64)),
    "counts": calipers.Ball("l0", 1),
    "letters": Substitutions(WORDS, 1),
    "letters by point": Substitutions(WORDS, torch.arange(N) % 2),
    "letters allowed": Substitutions(WORDS, 1, allowed=[[0, 2]]),
    "letters and numbers": Substitutions(
        WORDS,
        1,
        continuous=calipers.Ball("linf", 0.1, (torch.zeros(3), 1.0), MASK[:3], WEIGHTS[:3]),
    ),
}


def three_rows(y: Tensor) -> Specification:
    matrix = torch.tensor([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
    return Specification(matrix, torch.tensor([4.0, 4.0]), torch.tensor([0, 1]))


GOALS: dict[str, Any] = {
    "untargeted": lambda y: Untargeted(),
    "one class": lambda y: Targeted(2),
    "a class for each": lambda y: Targeted((y + 1) % 3),
    "a specification": three_rows,
}


def same(a: object, b: object) -> bool:
    """Are two values of one kind, and equal, bit for bit?"""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        fields = [f.name for f in dataclasses.fields(a) if f.init]
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in fields)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and all(map(same, a, b)) and len(a) == len(b)
    return type(a) is type(b) and a == b


NO_POINTS: dict[str, Threat] = {
    "a grid": calipers.Ball("linf", 0.1, grid=1 / 255),
    "channels": calipers.Ball("linf", 0.1, box=(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]))),
}


@pytest.mark.parametrize("name", [*THREATS, *NO_POINTS])
def test_a_threat_comes_back_as_it_was(name: str) -> None:
    threat = {**THREATS, **NO_POINTS}[name]
    data = data_of(threat)
    assert data is not None
    radii = threat.radii(N)
    back = recorded_threat(unpack_data(pack_data(data)), radii)
    if name == "half precision":
        assert back.identity() == threat.identity()
    else:
        assert same(back, threat.at(radii))
    assert torch.equal(back.radii(N), radii)


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", list(THREATS))
def test_a_record_is_checked_without_naming_its_threat(name: str, tmp_path: Path) -> None:
    model, x, y = sample()
    plan = None if name.startswith("letters") else "quick"
    calipers.measure(model, x, y, THREATS[name], plan=plan, record=tmp_path / "r").ledger.close()
    (found,) = calipers.check(tmp_path / "r", model)
    assert found.sound and not found.left and found.witnesses + found.certificates > 0


@pytest.mark.parametrize("name", list(GOALS))
def test_a_goal_comes_back_and_is_checked(name: str, tmp_path: Path) -> None:
    model, x, y = sample()
    goal: Goal = GOALS[name](y)
    keep = y != 0 if name == "one class" else torch.ones(N, dtype=torch.bool)
    if name == "one class":
        goal = Targeted(0)
    elif name == "a class for each":
        goal = Targeted(((y + 1) % 3)[keep])
    ball = calipers.Ball("linf", 0.15)
    with Record(tmp_path / "r") as ledger:
        calipers.measure(model, x[keep], y[keep], ball, goal=goal, plan=PLAN, record=ledger)
        (asked,) = ledger.questions()
        assert asked.data is not None
        targets = [p.target for p in ledger.points(asked.fingerprint)]
        assert same(recorded_goal(asked.data["goal"], targets), goal)
    (found,) = calipers.check(tmp_path / "r", model)
    assert found.sound and not found.left and found.witnesses + found.certificates > 0


def test_points_of_later_runs_keep_the_target_of_each(tmp_path: Path) -> None:
    """Positions of two runs are the same; names, labels and targets belong together all the same."""
    model, x, y = sample()
    ball, goal = calipers.Ball("linf", 0.15), (y + 1) % 3
    with Record(tmp_path / "r") as ledger:
        for part in (slice(0, 3), slice(3, N)):
            calipers.measure(
                model, x[part], y[part], ball, goal=Targeted(goal[part]), plan=PLAN, record=ledger
            )
        (found,) = check(ledger, model)
    assert found.sound and not found.left and found.witnesses + found.certificates >= N // 2


@pytest.mark.parametrize("mutant", ["a mask is lost", "radii are lost"])
def test_a_question_that_is_kept_in_part_is_found_out(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = question.data_of

    def without(value: Any) -> Any:
        data = held(value)
        return {**data, "mask": None} if data and "mask" in data else data

    if mutant == "a mask is lost":
        monkeypatch.setattr(question, "data_of", without)
        with pytest.raises(AssertionError):
            test_a_record_is_checked_without_naming_its_threat("a mask", tmp_path)
    else:
        with pytest.raises(AssertionError):
            assert same(
                recorded_threat(held(THREATS["radii"]) or {}, torch.ones(N)), THREATS["radii"]
            )


# ---- tools that are not known here
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mine:
    """A certifier of the user's own: intervals, for some points only."""

    share: float = 1.0

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Yield what intervals prove."""
        for claim in calipers.certificates.IBP()(problem, seed=seed):
            mine = problem.x[claim.index, 0] == 1
            yield dataclasses.replace(claim, radius=torch.where(mine, claim.radius, 0.0))


def test_a_tool_of_ones_own_leaves_the_others_checked(tmp_path: Path) -> None:
    model, x, y = sample()
    plan = Plan(
        "own",
        (
            Stage(calipers.attacks.PGD(steps=5), "attack"),
            Stage(Mine(), "certifier"),
            Stage(calipers.certificates.CROWN(), "certifier"),
        ),
    )
    result = calipers.measure(
        model, x, y, calipers.Ball("linf", 0.08), plan=plan, record=tmp_path / "r"
    )
    own = [r for r in result.points if r.lower_tool.startswith("Mine")]
    others = [r for r in result.points if r.lower > 0 and r not in own]
    assert own and others
    (found,) = check(tmp_path / "r", model)
    assert found.sound and found.certificates == len(others) and len(found.left) == len(own)
    assert "no tool called Mine(share=1.0) here" in found.left[0]
    (found,) = check(tmp_path / "r", model, tools=[Mine()])
    assert found.sound and not found.left and found.certificates == len(own) + len(others)


# ---- large inputs
# --------------------------------------------------------------------------------------------------


def test_a_large_input_is_known_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, question):
        monkeypatch.setattr(module, "BY_VALUE", 4 * D - 1)
    model, x, y = sample()
    x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])  # one point twice
    y[3] = (y[3] + 1) % 3  # a misclassified one
    result = calipers.measure(
        model, x, y, calipers.Ball("linf", 0.1), plan=PLAN, record=tmp_path / "r"
    )
    broken = {r.name for r in result.points if r.verdict == "broken"}
    proved = {r.name for r in result.points if r.verdict == "robust"}
    assert broken and proved
    with Record(tmp_path / "r", read_only=True) as ledger:
        held = ledger.points(result.summary.question.fingerprint)
        assert {p.name for p in held if p.array is not None} == broken
        assert all(p.digest for p in held) and not ledger.trust().altered
    (found,) = check(tmp_path / "r", model)
    assert found.sound and found.witnesses > 0 and found.certificates == 0
    (told,) = found.left
    assert f"about {len(proved)} points not checked" in told and "check(record, model, x)" in told
    (found,) = check(tmp_path / "r", model, x.flip(0))
    assert found.sound and not found.left and found.certificates == len(proved)
    (found,) = check(tmp_path / "r", model, x + 0.01)
    assert found.left == (told,)


def test_an_input_below_the_size_is_kept_by_value() -> None:
    small, large = (
        np.zeros(rows.BY_VALUE // 4, np.float32),
        np.zeros(rows.BY_VALUE // 4 + 1, np.float32),
    )
    with Record() as ledger:
        ledger.ask(Question("q", "q"), [Point("a", 0, 0, 0.1, small), Point("b", 1, 0, 0.1, large)])
        a, b = ledger.points("q")
        assert a.array is not None and b.array is None and b.digest
        ledger.keep_inputs("q", {"b": large})
        assert ledger.points("q")[1].array is not None and not ledger.trust().altered


def test_the_command_line_takes_the_data_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, question):
        monkeypatch.setattr(module, "BY_VALUE", 4 * D - 1)
    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef build():\n    torch.manual_seed(1)\n    nn = torch.nn\n    return "
        f"nn.Sequential(nn.Linear({D}, 12), nn.ReLU(), nn.Linear(12, 3)).eval()\n"
    )
    _, x, y = sample()
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    words = ("-m", "net.py:build", "-d", "d.npz", "-e", "0.08", "--plan", "quick", "-q")
    measured = run_calipers(tmp_path, "measure", *words, "--report", "none")
    assert measured.returncode == 0, measured.stderr
    shown = run_calipers(tmp_path, "check", "-m", "net.py:build")
    assert shown.returncode == 4 and "not checked" in shown.stdout
    shown = run_calipers(tmp_path, "check", "-m", "net.py:build", "-d", "d.npz")
    assert shown.returncode == 0 and "0 failed" in shown.stdout and "not" not in shown.stdout


# ---- runs
# --------------------------------------------------------------------------------------------------


def test_a_second_run_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    model, x, y = sample()
    with Record(tmp_path / "r", argv=("measure", "-e", "0.05")) as ledger:
        first = calipers.measure(
            calipers.Classifier(model, name="net"),
            x,
            y,
            calipers.Ball("linf", 0.05),
            plan=PLAN,
            record=ledger,
        )
        second = calipers.measure(
            calipers.Classifier(model, name="net"),
            x,
            y,
            calipers.Ball("linf", 0.2),
            plan=calipers.Plan("quick", seed=7),
            record=ledger,
        )
        runs = ledger.runs(first.summary.question.fingerprint)
        evidence = ledger.evidence(first.summary.question.fingerprint)
    assert [(r.number, r.seed, r.plan[0], r.radius, r.title) for r in runs] == [
        (1, 0, "both", (0.05,), "net"),
        (2, 7, "quick", (0.2,), "net"),
    ]
    assert all(r.time and r.versions["torch"] and r.argv == ("measure", "-e", "0.05") for r in runs)
    assert runs[0].notes == first.summary.runs[0].notes and "gradients" in runs[0].notes
    assert {e.run for e in evidence} == {1, 2}
    assert all((e.run == 2) == (e.asked_radius == 0.2) for e in evidence if e.asked_radius > 0)
    assert second.summary.facts["seed"] == 7 and "plan both" in str(
        second.summary.facts["earlier runs"]
    )
    assert "earlier runs" in second.report(tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            "measure -m net.py:build -e 0.15 -n 20 --plan quick --record a.calipers",
            "calipers measure -m net.py:build -e 0.15 -n 20 --record a.calipers --plan standard",
        ),
        (
            "attack -m 'my net.pt2' --tool=PGD(steps=3) -t CROWN",
            "calipers measure -m 'my net.pt2' --plan standard",
        ),
        ("distance --exact -pquick --norm l2", "calipers measure --norm l2 --plan standard"),
        ("", "calipers.measure(model, x, y, threat, plan=\"standard\", record='r')"),
    ],
)
def test_advice_is_the_command_that_was_given(argv: str, said: str, tmp_path: Path) -> None:
    with Record(tmp_path / "r", argv=shlex.split(argv)) as ledger:
        ledger.ask(Question("q", "q"), [Point("p", 0, 0, 0.1, np.zeros(2))])
        ledger.begin(
            Run("q", 0, ("quick",), (0.1,), notes={"next_step": "measure --plan standard"})
        )
        (summary,) = summaries(ledger)
        assert advice(summary) == said
        assert ("calipers measure" in render_text(ledger)) == bool(argv)


def test_a_curve_and_exact_distances_are_one_run_each(tmp_path: Path) -> None:
    model, x, y = sample()
    with Record(tmp_path / "r") as ledger:
        swept = calipers.curve(
            model, x, y, calipers.Ball("linf", 0.1), [0.02, 0.05, 0.1], plan=PLAN, record=ledger
        )
        (run,) = swept.summary.runs
        assert run.radii == (0.02, 0.05, 0.1) and run.radius == (0.05,)
        calipers.distance(
            model, x[:2], y[:2], calipers.Ball("linf", 0.1), exact=True, record=ledger
        )
        runs = ledger.runs(swept.summary.question.fingerprint)
        assert len(runs) == 2 and runs[1].notes["exact"]["points"] == 2
        assert "MILP" in runs[1].plan[-1] and "exact" not in runs[0].notes


def test_a_note_needs_no_run_of_a_plan() -> None:
    with Record() as ledger:
        ledger.ask(Question("q", "q"), [])
        number = ledger.begin(Run("q", 3, ("plan",), (0.1,))).number
        ledger.note(number, "exact", {"points": 2})
        ledger.note(number, "exact", {"points": 3})
        assert ledger.run(number).notes == {"exact": {"points": 3}}
        assert not ledger.trust().altered and ledger.runs("another") == []


def test_confidence_comes_back() -> None:
    with Record() as ledger:
        ledger.ask(Question("q", "q"), [])
        ledger.append("q", [Evidence("p", "certificate", "Smoothing()", 0.1, confidence=0.999)])
        ledger.append("q", [Evidence("p", "certificate", "CROWN()", 0.1)])
        assert [e.confidence for e in ledger.evidence("q")] == [0.999, 1.0]


def test_a_margin_of_minus_zero_is_no_alteration() -> None:
    """SQLite keeps no sign of a zero, so the digest must not see one."""
    with Record() as ledger:
        ledger.ask(Question("q", "q"), [Point("p", 0, 1, -0.0, np.zeros(2))])
        ledger.append("q", [Evidence("p", "witness", "PGD()", 0.1, margin=-0.0, asked_radius=-0.0)])
        assert not ledger.trust().altered


# ---- bytes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_arrays_are_packed_as_numpy_packs_them(shape: tuple[int, ...], dtype: type) -> None:
    import io

    array = np.ones(shape, dtype)
    buffer = io.BytesIO()
    np.save(buffer, array)
    assert pack(array) == buffer.getvalue()
    back = unpack(pack(array))
    assert back.dtype == array.dtype and np.array_equal(back, array) and back.flags.writeable


def test_bytes_that_are_no_array_are_an_error() -> None:
    whole = pack(np.arange(5))
    buffer_of_objects = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    )
    for blob in (b"", b"\0", whole[:-1], whole + b"x", whole[:20], buffer_of_objects):
        with pytest.raises(RecordError, match="an array that cannot be read"):
            unpack(blob)
    for blob in (b"", b"PK", pack_data({"a": np.arange(3)})[:99]):
        with pytest.raises(RecordError, match="a question that cannot be read"):
            unpack_data(blob)
