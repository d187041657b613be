"""Networks with operations that cannot be read: does everything go on that needs no bounds, and is
it said?
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from terminal import calipers as terminal

import calipers
from calipers.errors import UnsupportedOp
from calipers.interchange import load, load_onnx
from calipers.interchange.onnx_runs import Execution
from calipers.models.wrappers import BlackBox

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import helper  # noqa: E402
from test_onnx import answer, model, one, random  # noqa: E402

pytestmark = pytest.mark.one_in(1)


def jumping(outputs: int = 2) -> Any:
    """Return a network with a step inside: z = t(x w) v, t(h) = h above 0.2 and 0 below."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("ThresholdedRelu", ["h"], ["t"], alpha=0.2, name="jump"),
        helper.make_node("Gemm", ["t", "v"], ["y"]),
    ]
    return model(nodes, ("n", 4), {"w": random(4, 6), "v": random(6, outputs, seed=1)})


def written(folder: Path, unsafe: str, proto: Any, outputs: int) -> tuple[Path, Path]:
    """Write the network, and a property of the inputs between 0 and 1."""
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    lines = [f"(declare-const X_{i} Real)" for i in range(4)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    lines += [f"(assert (>= X_{i} 0)) (assert (<= X_{i} 1))" for i in range(4)]
    (folder / "spec.vnnlib").write_text("\n".join([*lines, f"(assert {unsafe})"]))
    return folder / "net.onnx", folder / "spec.vnnlib"


@pytest.mark.parametrize("outputs", [1, 2])
def test_an_unsafe_input_is_found_by_asking_alone(outputs: int, tmp_path: Path) -> None:
    proto = jumping(outputs)
    x = np.random.default_rng(0).random((500, 4)).astype(np.float32)
    least = float(np.quantile([answer(proto, p[None])[0] for p in x], 0.01))
    found = calipers.verify(*written(tmp_path, f"(<= Y_0 {least:.4f})", proto, outputs))
    assert found.answer == "sat" and found.witness is not None
    point = np.array([float(t) for t in found.witness.inputs], np.float32)
    assert answer(proto, point[None])[0] <= least and 0 <= point.min() <= point.max() <= 1
    assert "node jump (ThresholdedRelu)" in found.notes[0] and "asking" in found.notes[0]


def test_what_is_true_stays_unknown_and_says_why(tmp_path: Path) -> None:
    paths = written(tmp_path, "(<= Y_0 -1000)", jumping(), 2)
    tools = [calipers.Stage(calipers.attacks.Square(queries=20), "attack")]
    found = calipers.verify(*paths, tools=tools)
    assert found.answer == "unknown" and "nothing can be proved" in found.notes[0]
    shown = terminal(tmp_path, "verify", "net.onnx", "spec.vnnlib", "--seconds", "1")
    assert shown.returncode == 4 and shown.stdout.strip() in ("unknown", "timeout")


def test_attacks_that_ask_go_on_and_certificates_say_what_was_not_read(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "(<= Y_0 0)", jumping(), 2)
    classifier = load(path)
    x = torch.tensor(np.random.default_rng(1).random((20, 4)).astype(np.float32))
    y = torch.tensor(np.stack([answer(jumping(), p[None].numpy()) for p in x])).argmax(1)
    assert torch.equal(classifier.logits(x).argmax(1), y)
    result = calipers.measure(classifier, x, y, calipers.Ball("linf", 0.2), plan="quick")
    assert result.robust_accuracy.certified.count == 0
    ball = calipers.Ball("linf", 0.2)
    found = calipers.attack(classifier, x, y, ball, calipers.attacks.Square(queries=300))
    assert bool(found.success.any())
    with pytest.raises(UnsupportedOp, match=r"net\.onnx, node jump \(ThresholdedRelu\)"):
        calipers.certify(classifier, x, y, ball, calipers.certificates.CROWN())


def test_the_same_file_is_the_same_model_and_another_one_is_not(tmp_path: Path) -> None:
    digests = []
    for seed in (0, 0, 1):
        path, _ = written(tmp_path, "(<= Y_0 0)", jumping(2 + seed), 2)
        module = load(path).module
        assert isinstance(module, BlackBox)
        digests.append(module.extra_repr())
    assert digests[0] == digests[1] != digests[2]


def test_what_nobody_runs_or_what_depends_on_chance_is_refused_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_chance = one("Dropout", (1, 4), {"r": np.float32(0.5), "t": np.bool_(True)})
    pytest.importorskip("onnxruntime", reason="the reference drops nothing by chance")
    with pytest.raises(UnsupportedOp, match="drops at random"):
        calipers.verify(*written(tmp_path, "(<= Y_0 0)", by_chance, 4))
    paths = written(tmp_path, "(<= Y_0 0)", jumping(), 2)
    monkeypatch.setattr(Execution, "_by_onnxruntime", lambda self: None)
    monkeypatch.setattr(Execution, "_by_the_reference", lambda self: None)
    with pytest.raises(UnsupportedOp, match="jumps"):
        calipers.verify(*paths)


def test_a_function_of_the_file_is_written_out(tmp_path: Path) -> None:
    proto = model([helper.make_node("Double", ["x"], ["y"], domain="own")], ("n", 4))
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    sets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("own", "Double", ["a"], ["b"], body, sets))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    path, _ = written(tmp_path, "(<= Y_0 0)", proto, 4)
    net = load_onnx(path)
    x = torch.rand(3, 4)
    torch.testing.assert_close(net(x), 2 * x)
    net.confirm(x, net(x), net(x))
