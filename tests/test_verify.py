"""Are verdicts about files right, witnesses what they are written as, and wrong calls answered with
what to do?
"""

from __future__ import annotations

import contextlib
import csv
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import beside
import numpy as np
import pytest
import terminal
import torch

import calipers
from calipers.api.verify import verify
from calipers.errors import BadInput, Contradiction
from calipers.interchange import load_instances, load_onnx, load_vnnlib
from calipers.measurement import verify as verification
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.verify import time_limit, witness
from calipers.presets import VERIFY
from calipers.problem.interrupts import Limit, OutOfTime, give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.record.checker import prove

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

DATA = beside.DATA / "vnncomp"
needs_data = beside.needs(DATA)
PLAIN = [stage for stage in VERIFY if repr(stage.tool).startswith(("PGD", "IBP", "CROWN"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """y = |x0| + x1 as a net of one output; properties that are true, false, and true by a hair."""
    w, v = (
        np.array([[1, -1, 0, 0], [0, 0, 1, -1]], np.float32),
        np.array([[1], [1], [1], [-1]], np.float32),
    )
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size])
        for n, size in (("x", 2), ("y", 1))
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")],
    )
    (tmp_path / "net.onnx").write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
    )
    for name, unsafe in (
        ("true", "(<= Y_0 -0.11)"),
        ("false", "(>= Y_0 0.45)"),
        ("tie", "(>= Y_0 0.5)"),
        ("beyond", "(>= Y_0 0.6)"),
    ):
        (tmp_path / f"{name}.vnnlib").write_text(prop(unsafe))
    return tmp_path


def prop(unsafe: str, low: str = "-0.1", high: str = "0.3") -> str:
    bounds = (
        f"(assert (>= X_0 {low})) (assert (<= X_0 {high})) (assert (>= X_1 -0.1)) (assert "
        "(<= X_1 0.2))"
    )
    return (
        "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)"
        + bounds
        + f"(assert {unsafe})"
    )


def run(folder: Path, *words: str) -> terminal.Shown:
    return terminal.calipers(folder, "verify", *words)


def process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "calipers.cli", "verify", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_verdicts_on_a_small_net(folder: Path) -> None:
    answers = {
        name: verify(folder / "net.onnx", folder / f"{name}.vnnlib").answer
        for name in ("true", "false", "beyond")
    }
    assert answers == {"true": "unsat", "false": "sat", "beyond": "unsat"}


def test_the_written_witness_reads_back_into_box_and_property(folder: Path) -> None:
    done = run(folder, "net.onnx", "false.vnnlib")
    assert done.returncode == 0 and done.stdout.startswith("sat\n((X_0 "), done.stderr
    numbers = dict(re.findall(r"\((\w_\d+) ([^\s()]+)\)", done.stdout))
    assert list(numbers) == ["X_0", "X_1", "Y_0"]
    assert Fraction("-0.1") <= Fraction(numbers["X_0"]) <= Fraction("0.3") and Fraction(
        "-0.1"
    ) <= Fraction(numbers["X_1"]) <= Fraction("0.2")
    x = torch.tensor([[float(numbers["X_0"]), float(numbers["X_1"])]])
    y = load_onnx(folder / "net.onnx")(x)
    assert str(y.numpy()[0, 0]) == numbers["Y_0"] and Fraction(float(y)) >= Fraction("0.45")


def test_a_fixed_input_that_no_float_is_still_has_a_witness(folder: Path) -> None:
    (folder / "fixed.vnnlib").write_text(prop("(>= Y_0 0.25)", "0.1", "0.1"))
    found = verify(folder / "net.onnx", folder / "fixed.vnnlib")
    assert found.answer == "sat" and found.witness is not None and found.witness.inputs[0] == "0.1"
    (folder / "fixed.vnnlib").write_text(prop("(>= Y_0 0.31)", "0.1", "0.1"))
    assert verify(folder / "net.onnx", folder / "fixed.vnnlib").answer == "unsat"


def test_boxes_are_searched_one_by_one(folder: Path) -> None:
    both = "(or (and (<= X_0 0) (>= Y_0 {})) (and (>= X_0 0.1) (>= Y_0 {})))"
    for name, (left, right), answer in (
        ("a", ("0.31", "0.51"), "unsat"),
        ("b", ("0.29", "0.51"), "sat"),
        ("c", ("0.31", "0.49"), "sat"),
    ):
        (folder / f"{name}.vnnlib").write_text(prop(both.format(left, right)))
        assert len(load_vnnlib(folder / f"{name}.vnnlib").queries) == 2
        assert verify(folder / "net.onnx", folder / f"{name}.vnnlib").answer == answer


def test_a_contradictory_box_is_unsat_with_a_note(folder: Path) -> None:
    (folder / "none.vnnlib").write_text(prop("(and (>= X_0 0.4) (>= Y_0 0))"))
    found = verify(folder / "net.onnx", folder / "none.vnnlib")
    assert found.answer == "unsat" and "leaves no input" in found.notes[0]


class LyingAttack:
    """Proposes the middle of the box, and what lies outside of it."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        for candidate in (problem.x, problem.x + 5):
            zero = torch.zeros(1, dtype=torch.long)
            yield Attempt(zero, candidate, zero, zero)


class LyingCertifier:
    """Claims everything."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        one = torch.ones(1, dtype=torch.float64)
        yield Claim(
            torch.zeros(1, dtype=torch.long),
            problem.threat.radii(1),
            one,
            "float64-checked",
            one,
            one,
        )


class SmallCertifier(LyingCertifier):
    """Claims half of the box."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        yield from super().__call__(problem.at(problem.threat.radii(1) / 2))


def test_tools_that_lie_change_no_verdict(folder: Path) -> None:
    assert (
        verify(
            folder / "net.onnx", folder / "true.vnnlib", tools=[Stage(LyingAttack(), "attack")]
        ).answer
        == "unknown"
    )
    assert (
        verify(
            folder / "net.onnx",
            folder / "true.vnnlib",
            tools=[Stage(SmallCertifier(), "certifier")],
        ).answer
        == "unknown"
    )
    (folder / "all.vnnlib").write_text(prop("(>= Y_0 -5)"))
    with pytest.raises(Contradiction):
        verify(
            folder / "net.onnx", folder / "all.vnnlib", tools=[Stage(LyingCertifier(), "certifier")]
        )


def test_a_witness_outside_the_exact_box_is_none(folder: Path) -> None:
    """The float next to the box's end, unsafe as its neighbour is, is not written down."""
    net, (query,) = (
        load_onnx(folder / "net.onnx", paired=True),
        load_vnnlib(folder / "false.vnnlib").queries,
    )
    end = torch.tensor([0.3, 0.2]).double().float()
    assert witness(calipers.Classifier(net), query, end) is not None
    for i in range(2):
        outside = end.clone()
        outside[i] = torch.nextafter(end[i], torch.tensor(2.0))
        assert witness(calipers.Classifier(net), query, outside) is None


class Sleeper:
    """Never ends."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        while True:
            time.sleep(0.01)
        yield


def test_time_runs_out_during_a_tool(folder: Path) -> None:
    found = verify(
        folder / "net.onnx", folder / "true.vnnlib", timeout=0.3, tools=[Stage(Sleeper(), "attack")]
    )
    assert found.answer == "timeout", "a tool that sleeps for ever ended"


def test_the_command_line_keeps_a_proof_of_what_is_unsat(folder: Path) -> None:
    done = run(folder, "net.onnx", "true.vnnlib", "--proofs", "kept.npz")
    assert done.returncode == 0 and "unsat" in done.stdout
    assert prove((folder / "kept.npz").read_bytes()).proved
    (folder / "instances.csv").write_text("net,true\n")
    assert run(folder, "--csv", "instances.csv", "--proofs", "kept.npz").returncode == 2


def test_exit_codes_and_messages(folder: Path) -> None:
    (folder / "three.vnnlib").write_text(
        prop("(<= Y_0 0)").replace(
            "(declare-const Y_0 Real)", "(declare-const Y_0 Real)(declare-const Y_1 Real)"
        )
    )
    for words, code, said in (
        (("net.onnx", "true.vnnlib"), 0, "unsat"),
        (("net.onnx", "beyond.vnnlib", "--seconds", "0"), 4, "timeout"),
        (("net.onnx", "three.vnnlib"), 2, "2 inputs and 2 outputs, but net.onnx has 2 and 1"),
        (("net.onnx", "none.vnnlib"), 2, "there is no file none.vnnlib"),
        (("net.onnx",), 2, "give a network and a property"),
    ):
        done = run(folder, *words)
        assert done.returncode == code and said in done.stdout + done.stderr, (
            words,
            done.stdout,
            done.stderr,
        )


def test_a_list_runs_in_one_process_and_goes_on_after_an_error(folder: Path) -> None:
    (folder / "instances.csv").write_text(
        "net.onnx,true.vnnlib,60\nnet.onnx,gone.vnnlib,60\nnet,false\n"
    )
    done = run(folder, "--csv", "instances.csv")
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["net.onnx", "true.vnnlib", "unsat"],
        ["net.onnx", "gone.vnnlib", "error"],
        ["net", "false", "sat"],
    ]
    assert (
        done.returncode == 2
        and "gone.vnnlib" in done.stderr
        and all(re.fullmatch(r"\d+\.\d+", row[3]) for row in rows)
    )


def test_lists_with_and_without_column_names(folder: Path) -> None:
    (folder / "a.csv").write_text("network,property,verdict\nnet,true,unsat\n")
    (folder / "b.csv").write_text("net.onnx, true.vnnlib, 7.5\n\n")
    (named,), (plain,) = load_instances(folder / "a.csv"), load_instances(folder / "b.csv")
    assert (named.network, named.specification, named.timeout) == (
        folder / "net.onnx",
        folder / "true.vnnlib",
        None,
    )
    assert (plain.network, plain.specification, plain.timeout) == (
        folder / "net.onnx",
        folder / "true.vnnlib",
        7.5,
    )
    for text in ("", "net.onnx\n", "net.onnx,true.vnnlib,soon\n"):
        (folder / "c.csv").write_text(text)
        with pytest.raises(BadInput, match=r"c\.csv"):
            load_instances(folder / "c.csv")


def test_a_small_net_takes_less_than_twice_as_long_as_importing_torch(folder: Path) -> None:
    """The least of two of each, in turns, in processor seconds: machines differ, and so do their
    days.
    """

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    bare, seconds = [], []
    for _ in range(2):
        begun = spent()
        subprocess.run([sys.executable, "-c", "import onnx, scipy.sparse, torch"], check=True)
        bare.append(spent() - begun)
        begun = spent()
        assert process(folder, "net.onnx", "true.vnnlib").stdout == "unsat\n"
        seconds.append(spent() - begun)
    assert min(seconds) < 2 * min(bare), (seconds, bare)


# ---- the competition's instances
# --------------------------------------------------------------------------------------------------


def instances() -> list[tuple[str, dict[str, str]]]:
    return [
        (path.parent.name, row)
        for path in sorted(DATA.glob("*/instances.csv"))
        for row in csv.DictReader(path.read_text().splitlines())
    ]


ANSWERED = {
    "acasxu": 1,
    "mnist_fc": 6,
    "reach_prob_density": 0,
    "rl_benchmarks": 11,
    "test": 5,
    "tllverifybench": 2,
    "verivital": 6,
}
"""How many of each benchmark attacks, intervals and CROWN alone decide at least."""


@needs_data
@pytest.mark.parametrize(
    "benchmark",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("mnist_fc", "verivital") else [])
        for name in ANSWERED
    ],
)
def test_no_verdict_on_the_competition_is_wrong(benchmark: str) -> None:
    decided = 0
    listed = {one.names: one for one in load_instances(DATA / benchmark / "instances.csv")}
    for _, row in (pair for pair in instances() if pair[0] == benchmark):
        one = listed[row["network"], row["property"]]
        found = verify(one.network, one.specification, tools=PLAIN)
        assert found.answer in (row["verdict"], "unknown"), (row, found)
        decided += found.decided
        if found.witness is not None:
            check_with_onnxruntime(one.network, one.specification, found.witness)
    assert decided >= ANSWERED[benchmark], f"{decided} decided"


def check_with_onnxruntime(network: Path, specification: Path, found: Any) -> None:
    """Read the decimals again with another program: each inside its bounds, the outputs unsafe."""
    import gzip

    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(
        gzip.decompress(network.read_bytes()) if network.suffix == ".gz" else network.read_bytes()
    )
    given = session.get_inputs()[0]
    x = np.array([np.float32(float(t)) for t in found.inputs]).reshape(
        [n if isinstance(n, int) else 1 for n in given.shape]
    )
    y = torch.tensor(np.asarray(session.run(None, {given.name: x})[0]).reshape(-1))
    exact = [Fraction(t) for t in found.inputs]
    inside = [
        q
        for q in load_vnnlib(specification).queries
        if all(a <= v <= b for a, v, b in zip(q.low, exact, q.high, strict=True))
    ]
    assert any(q.unsafe(y) for q in inside) or any(
        float(q.goal().worst(q.goal().margins(y.double()[None], y[:1].long()))) < 1e-5
        for q in inside
    )


@needs_data
def test_published_witnesses_are_witnesses() -> None:
    count = 0
    for benchmark, row in instances():
        kept = DATA / benchmark / "witness.npz"
        name = f"{row['network']}__{row['property']}"
        if row["verdict"] != "sat" or not kept.exists() or name not in np.load(kept).files:
            continue
        one = next(
            o
            for o in load_instances(DATA / benchmark / "instances.csv")
            if o.names == (row["network"], row["property"])
        )
        net = load_onnx(one.network, paired=True)
        model = calipers.Classifier(net)
        found = []
        for query in load_vnnlib(one.specification).queries:
            problem = query.posed(model, net.program.point_shape)
            point = problem.region.snap(
                torch.tensor(np.load(kept)[name], dtype=torch.float32).reshape(problem.x.shape)
            )
            found.append(witness(model, query, point[0]))
        assert any(f is not None for f in found), name
        count += 1
    assert count >= 15


def test_no_clock_is_set_where_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # one that rings in a callback of the garbage collector would be lost
    monkeypatch.setattr(signal, "setitimer", lambda *_: pytest.fail("a clock was set"))
    for seconds in (0.0, -1.0):
        with pytest.raises(OutOfTime), time_limit(seconds):
            pytest.fail("something ran without any time")


class LostAlarm:
    """A clock that moves on by a second whenever it is looked at. Its alarm rings once, in a
    callback that cannot raise.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.rings, self.lost = 0.0, float("inf"), 0
        monkeypatch.setattr(verification, "time", self)
        monkeypatch.setattr(signal, "setitimer", self.set)

    def set(self, _: int, seconds: float) -> None:
        self.rings = self.now + seconds if seconds else float("inf")

    def monotonic(self) -> float:
        self.now += 1
        if self.now >= self.rings:
            self.rings = float("inf")
            handler = signal.getsignal(signal.SIGALRM)
            assert callable(handler)
            with pytest.raises(KeyboardInterrupt):  # as the garbage collector drops it
                handler(signal.SIGALRM, None)
            self.lost += 1
        return self.now


class Endless:
    """An attack that asks for the time at every step, and never ends by itself."""

    capabilities = calipers.attacks.PGD().capabilities

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        for _ in range(1000):
            give_way()
        pytest.fail("it went on after its time")
        yield


def test_a_lost_alarm_does_not_lose_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = LostAlarm(monkeypatch)
    net = load_onnx(folder / "net.onnx", paired=True)
    queries = load_vnnlib(folder / "true.vnnlib").queries
    model, plan = calipers.Classifier(net), Plan("", (Stage(Endless(), "attack"),), seconds=50.0)
    found = verification.verify(model, queries, net.program.point_shape, plan)
    assert (found.answer, clock.lost) == ("timeout", 1) and clock.now < 60


def test_an_alarm_alone_is_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "limited", lambda _: contextlib.nullcontext())
    with pytest.raises(pytest.fail.Exception, match="went on after its time"):
        test_a_lost_alarm_does_not_lose_the_limit(folder, monkeypatch)


def test_the_time_is_also_limited_in_other_threads(folder: Path) -> None:
    found: list[str] = []

    def inside() -> None:
        try:
            with time_limit(1e-9):
                give_way()
        except OutOfTime as up:
            found.append(type(up.limit).__name__)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [Limit.__name__]
