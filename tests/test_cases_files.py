"""Do the files that once made a traceback, filled the memory, ran code or proved another claim do
so no more?
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import beside
import numpy as np
import pytest
import torch
from terminal import calipers
from torch import nn

from calipers.errors import BadInput
from calipers.interchange import load_data
from calipers.record import checker
from calipers.record.proofs import contents, sealed

pytestmark = pytest.mark.one_in(1)


def cases(name: str) -> Path:
    """Return a folder of cases, or skip the test where it is absent."""
    return beside.given(beside.CASES / name)


def test_archives_that_made_tracebacks_or_filled_the_memory_are_refused() -> None:
    found = sorted(cases("fuzz").glob("data-*.npz"))
    assert len(found) > 4
    for path in found:
        with pytest.raises(BadInput, match=path.name):
            load_data(str(path))


def test_lists_that_made_tracebacks_are_answered_line_by_line_or_refused(tmp_path: Path) -> None:
    found = sorted(cases("fuzz").glob("csv-*.csv"))
    assert len(found) > 4
    for path in found:
        shown = calipers(tmp_path, "verify", "--csv", str(path))
        assert shown.returncode == 2
        assert "calipers: " in shown.stderr


def test_programs_that_ran_code_run_none(tmp_path: Path) -> None:
    script = cases("pt2") / "evil.py"
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    program = torch.export.export(
        module, (torch.rand(2, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(program, tmp_path / "good.pt2")
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, capture_output=True)
    np.savez(
        tmp_path / "d.npz", x=np.random.default_rng(0).random((6, 8), dtype=np.float32), y=[0] * 6
    )
    statuses = {}
    for name in ("good.pt2", "evil_inputs.pt2", "evil_weight.pt2"):
        shown = calipers(
            tmp_path, "attack", "-t", "FGSM", "-m", name, "-d", "d.npz", "-e", "0.01", "-q"
        )
        statuses[name] = shown.returncode
    assert statuses == {"good.pt2": 0, "evil_inputs.pt2": 0, "evil_weight.pt2": 2}
    assert "unpickling a file runs its author's code" in shown.stderr
    assert not list(tmp_path.glob("MARK*"))


def test_one_bad_network_of_a_list_is_an_error_in_its_line(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    for path in cases("verify_list").iterdir():
        shutil.copy(path, tmp_path / path.name)
    shown = calipers(tmp_path, "verify", "--csv", "list.csv")
    answers = [line.split(",")[2] for line in shown.stdout.splitlines()]
    assert len(answers) == 3
    assert answers[0] == answers[2]
    assert {answers[0]} <= {"sat", "unsat"}
    assert shown.returncode in (0, 2)


# ---- a proof, the network and the property it is about
# -----------------------------------------------------------------------------------------------


def network(path: Path, scale: float = 1.0) -> None:
    """Write a small network of four inputs and two outputs."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    draw, make = np.random.default_rng(0), onnx.helper.make_node
    weights = [
        draw.standard_normal((4, 5)),
        draw.standard_normal(5) * scale,
        draw.standard_normal((5, 2)),
    ]
    held = [
        onnx.numpy_helper.from_array(w.astype(np.float32), name)
        for w, name in zip(weights, "abc", strict=True)
    ]
    nodes = [
        make("Gemm", ["x", "a", "b"], ["h"]),
        make("Relu", ["h"], ["r"]),
        make("MatMul", ["r", "c"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, n])
        for name, n in (("x", 4), ("y", 2))
    ]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    onnx.save(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
        ),
        path,
    )


def specification(path: Path, size: float, least: float = 50.0) -> None:
    """Ask whether the first output gets as large."""
    lines = [f"(declare-const X_{i} Real)" for i in range(4)] + [
        "(declare-const Y_0 Real)(declare-const Y_1 Real)"
    ]
    lines += [f"(assert (>= X_{i} -{size}))(assert (<= X_{i} {size}))" for i in range(4)]
    path.write_text("\n".join([*lines, f"(assert (>= Y_0 {least}))"]))


@pytest.fixture
def proved(tmp_path: Path) -> Path:
    network(tmp_path / "net.onnx")
    network(tmp_path / "other.onnx", scale=1.01)
    for name, size, least in (("spec", 0.01, 50.0), ("wider", 0.02, 50.0), ("lower", 0.01, 49.0)):
        specification(tmp_path / f"{name}.vnnlib", size, least)
    shown = calipers(tmp_path, "verify", "net.onnx", "spec.vnnlib", "--proofs", "p.npz")
    assert shown.stdout.strip() == "unsat", shown.stderr
    claim = contents((tmp_path / "p.npz").read_bytes())[0]["claim"]
    assert f"p.npz proves the claim {claim}" in shown.stderr
    return tmp_path


def test_a_proof_is_compared_with_the_network_and_the_property_at_hand(proved: Path) -> None:
    for words, code, said in (
        ((), 0, "compared with no network"),
        (("--model", "net.onnx"), 0, "about this network"),
        (("--model", "other.onnx"), 3, "but not about this network"),
        (("--model", "net.onnx", "--property", "spec.vnnlib"), 0, "about this question"),
        (
            ("--model", "other.onnx", "--property", "spec.vnnlib"),
            3,
            "but not about this question: its net.1.bias",
        ),
        (("--model", "net.onnx", "--property", "wider.vnnlib"), 3, "but not about this question"),
        (
            ("--model", "net.onnx", "--property", "lower.vnnlib"),
            3,
            "but not about this question: its offsets",
        ),
        (("--property", "spec.vnnlib"), 2, "name the network"),
    ):
        shown = calipers(proved, "check", "p.npz", *words)
        assert shown.returncode == code, (words, shown)
        assert said in shown.stdout + shown.stderr
        assert (
            code == 2
            or "it says of itself: box 0, network net.onnx, property spec.vnnlib" in shown.stdout
        )


@pytest.mark.parametrize("part", ["point", "radius", "network", "names"])
def test_a_changed_proof_is_not_about_the_question_though_its_hashes_fit(
    part: str, proved: Path
) -> None:
    header, arrays = contents((proved / "p.npz").read_bytes())
    claim = header["claim"]
    if part == "point":
        arrays["x"] = arrays["x"] + np.float32(1e-4)
    elif part == "radius":
        header["threat"]["radius"] *= 0.9
    elif part == "network":
        arrays["net.1.bias"] = arrays["net.1.bias"] * np.float32(0.999)
    else:
        header["about"]["property"] = "wider.vnnlib"
    header |= {
        "model": checker.digest(header["network"], arrays),
        "claim": checker.claimed(header, arrays),
    }
    (proved / "p.npz").write_bytes(sealed(header, arrays))
    shown = calipers(proved, "check", "p.npz", "--model", "net.onnx", "--property", "spec.vnnlib")
    if part == "names":
        assert shown.returncode == 0  # what it says of itself counts for nothing
        assert (
            calipers(
                proved, "check", "p.npz", "--model", "net.onnx", "--property", "wider.vnnlib"
            ).returncode
            == 3
        )
    else:
        assert shown.returncode == 3
        assert not checker.prove((proved / "p.npz").read_bytes(), claim).proved


def test_a_record_is_no_proof_and_a_proof_no_record(tmp_path: Path) -> None:
    (tmp_path / "p.npz").write_bytes(b"PK\x03\x04" + json.dumps({}).encode())
    shown = calipers(tmp_path, "check", "p.npz")
    assert shown.returncode == 3
    assert "NOT proved: the file is not the one that was sealed" in shown.stdout
    shown = calipers(
        tmp_path, "check", "run.calipers", "-m", "mnist-plain", "--property", "spec.vnnlib"
    )
    assert shown.returncode == 2
