"""Is everything that an ONNX file says read or refused, and everything that is read compared, before anything is claimed?"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import calipers
from calipers.api.verify import proved_again
from calipers.errors import BadInput, BadModel, CalipersError, UnsupportedOp
from calipers.graph.onnx import layers, steps
from calipers.graph.onnx.agreement import Outputs
from calipers.graph.onnx.network import OnnxNet
from calipers.graph.onnx.ops import OPS
from calipers.graph.onnx.steps import Step
from calipers.graph.onnx.variables import VARIABLES
from calipers.interchange import load_onnx
from calipers.interchange.onnx_nodes import OPERATOR_SETS
from calipers.interchange.onnx_runs import Execution
from calipers.problem import agreement
from calipers.problem import problem as problem_module
from calipers.threats.substitutions import one_hot_groups

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import helper, numpy_helper  # noqa: E402
from spoiled_onnx import case, judged  # noqa: E402
from test_onnx import IMAGE, answer, ints, loaded, model, one, random, recurrent  # noqa: E402

NONE = np.array([], np.float32)
SCALES = np.array([1, 1, 2, 2], np.float32)
UNREAD: list[tuple[str, str, Any]] = [
    (
        "exclude_outside",
        "linear",
        one("Resize", IMAGE, {"r": NONE, "s": SCALES}, mode="linear", exclude_outside=1),
    ),
    (
        "stash_type",
        "LayerNormalization",
        one("LayerNormalization", (1, 3, 4), {"s": random(4)}, stash_type=10),
    ),
    ("storage_order", "MaxPool", one("MaxPool", IMAGE, kernel_shape=[2, 2], storage_order=1)),
    (
        "spatial",
        "BatchNormalization",
        one(
            "BatchNormalization",
            (1, 2),
            {n: np.abs(random(2)) + 1 for n in "sbmv"},
            opset=8,
            spatial=0,
        ),
    ),
    ("activation_alpha", "LSTM", recurrent("LSTM", 4, activation_alpha=[0.5, 0.5, 0.5])),
]
"""Attributes that no reader looks at: name, a word of the operation, file."""


@pytest.mark.one_in(1)
@pytest.mark.parametrize(("name", "word", "proto"), UNREAD, ids=[r[0] for r in UNREAD])
def test_an_attribute_that_nobody_reads_is_refused_by_name(
    name: str, word: str, proto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnsupportedOp,
        match=rf"net\.onnx, node 0 \(.*the attribute {name} = .* is not read .* Export the network without it",
    ):
        loaded(tmp_path, proto, paired=True)
    monkeypatch.setattr(Step, "finish", lambda self: None)
    loaded(tmp_path, proto, paired=True)  # without the rule it passes


READ: dict[str, Any] = {
    "fmod": model([helper.make_node("Mod", ["a", "b"], ["c"], fmod=1), helper.make_node("Add", ["x", "c"], ["y"])], (1, 2),
                  {"a": np.array([-5.3, 5.3], np.float32), "b": np.array([2, -2], np.float32)}),
    "activations written out": recurrent("LSTM", 4, activations=["Sigmoid", "Tanh", "Tanh"]),
    "defaults written out": one("Conv", IMAGE, {"w": random(4, 2, 3, 3)}, auto_pad="NOTSET", group=1, kernel_shape=[3, 3], dilations=[1, 1]),
    "momentum": one("BatchNormalization", (1, 2), {n: np.abs(random(2)) + 1 for n in "sbmv"}, momentum=0.5),
    "dropout": one("Dropout", (1, 5), {"r": np.float32(0.4), "t": np.bool_(False)}, seed=3),
    "upper triangle": model([helper.make_node("Trilu", ["k"], ["t"], upper=0), helper.make_node("MatMul", ["x", "t"], ["y"])], (1, 3), {"k": random(3, 3)}),
    "to half precision and back": model([helper.make_node("Cast", ["k"], ["h"], to=10), helper.make_node("Cast", ["h"], ["f"], to=1),
                                         helper.make_node("Mul", ["x", "f"], ["y"])], (1, 3), {"k": random(3)}),
}  # fmt: skip


K, INDEX = random(2, 3), np.array([[2, 0, 1], [1, 1, 0]])
FOLDS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "OneHot": ([INDEX[0], np.int64(3), random(2)], {}), "Trilu": ([K], {"upper": 0}), "EyeLike": ([K], {"k": 1}), "CastLike": ([INDEX, K], {}),
    **dict.fromkeys(["ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"], ([K], {"axes": [1]})),
    **dict.fromkeys(["ArgMax", "ArgMin"], ([K], {"axis": 1})), "CumSum": ([K, np.int64(1)], {"reverse": 1}),
    "GatherElements": ([K, INDEX], {"axis": 1}), "GatherND": ([K, ints(1)], {}), "ScatterND": ([K, np.array([[0, 1]]), random(1)], {}),
    **dict.fromkeys(["Sign", "Round"], ([3 * K], {})), **dict.fromkeys(["GreaterOrEqual", "LessOrEqual"], ([K, random(2, 3, seed=4)], {})),
    "Xor": ([K > 0, INDEX > 0], {}), "DequantizeLinear": ([INDEX.astype(np.int8), np.float32(0.3)], {}), "Einsum": ([K, random(3, 2)], {"equation": "ij,jk"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDS)
def test_constants_are_folded_as_the_reference_works_them_out(kind: str, tmp_path: Path) -> None:
    values, attributes = FOLDS[kind]
    # the reference knows no earlier one
    constants, opset = (
        {f"c{k}": v for k, v in enumerate(values)},
        21 if kind == "DequantizeLinear" else 17,
    )
    proto = model([helper.make_node(kind, list(constants), ["k"], **attributes), helper.make_node("Cast", ["k"], ["f"], to=1),
                   helper.make_node("ReduceSum", ["f"], ["s"], keepdims=0), helper.make_node("Mul", ["x", "s"], ["y"])], (1, 3), constants, opset)  # fmt: skip
    net, x = loaded(tmp_path, proto, paired=True), random(2, 3, seed=2)
    expected = np.stack([answer(proto, p[None]) for p in x])
    for precision in (net, net.double()):
        got = precision(torch.tensor(x).to(precision.get_buffer("anchor"))).float().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    if kind in VARIABLES:
        return
    with pytest.raises(UnsupportedOp, match=f"no bounds for ONNX's {kind}"):
        loaded(
            tmp_path,
            model(
                [helper.make_node(kind, ["x", *list(constants)[1:]], ["y"], **attributes)],
                (2, 3),
                constants,
                opset,
            ),
            paired=True,
        )


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", READ)
def test_what_is_written_out_is_read(name: str, tmp_path: Path) -> None:
    net = loaded(tmp_path, READ[name], paired=True)
    x = random(4, *net.program.point_shape, seed=2)
    expected = np.stack([answer(READ[name], p.reshape(net.program.input_shape)) for p in x])
    np.testing.assert_allclose(
        net(torch.tensor(x)).numpy()[:, -net.outputs :], expected, rtol=1e-5, atol=1e-6
    )


def test_no_reader_swallows_inputs_unseen() -> None:
    """Python hands over what it does not name to `*_`."""
    found = [
        kind
        for kind, reader in OPS.items()
        if any(p.startswith("_") for p in inspect.signature(reader).parameters)
    ]
    assert not found


NORM = {n: np.abs(random(2)) + 1 for n in "sbmv"}
CONTRADICTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("activations that are not read", recurrent("LSTM", 4, activations=["Sigmoid", "Softsign", "Tanh"]), UnsupportedOp, "activations Sigmoid, Softsign, Tanh"),
    ("too few activations", recurrent("LSTM", 4, activations=["Sigmoid", "Tanh"]), UnsupportedOp, "activations Sigmoid, Tanh"),
    ("dropout in training", one("Dropout", (1, 5), {"r": np.float32(0.4), "t": np.bool_(True)}), UnsupportedOp, "drops at random"),
    ("no such axis", one("Flatten", (1, 5), axis=7), BadModel, "axis"),
    ("no such axis of a slice", one("Slice", (1, 5), {"s": ints(0), "e": ints(1), "a": ints(-5)}), BadModel, "axis"),
    ("unknown attribute", one("Relu", (1, 5), mode="odd"), UnsupportedOp, "has no attribute mode in this operator set"),
    ("attribute of another type", one("Flatten", (1, 5), axis=1.0), BadModel, "not of the type INT"),
    ("attribute of a later set", one("ReduceSum", (1, 5), opset=11, noop_with_empty_axes=1), UnsupportedOp, "no attribute noop_with_empty_axes"),
    ("further input", model([helper.make_node("Relu", ["x", "x"], ["y"])], (1, 5)), BadModel, "2 inputs, where the operation has 1 to 1"),
    ("input left out", model([helper.make_node("Add", ["x", ""], ["y"])], (1, 5)), BadModel, r"input \[1\] left out"),
    ("two makers", model([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])], (1, 5)), BadInput, "makes the value y twice"),
    ("branches", model([helper.make_node("If", ["c"], ["y"], then_branch=one("Relu", (1, 5)).graph, else_branch=one("Neg", (1, 5)).graph)], (1, 5),
                       {"c": np.bool_(True)}), BadInput, "then_branch does not fit it"),
    ("whole numbers in", onnx.helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net",
                         [helper.make_tensor_value_info("x", 7, (1, 3))], [helper.make_tensor_value_info("y", 7, None)]),
                         opset_imports=[helper.make_opsetid("", 17)]), BadInput, "does not hold floating-point numbers"),
]  # fmt: skip


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    ("name", "proto", "kind", "message"), CONTRADICTIONS, ids=[r[0] for r in CONTRADICTIONS]
)
def test_what_a_file_may_not_say_is_refused(
    name: str, proto: Any, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        loaded(tmp_path, proto, paired=True)


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    "version",
    [1, OPERATOR_SETS[0] - 1, OPERATOR_SETS[0], 13, OPERATOR_SETS[-1], OPERATOR_SETS[-1] + 1, 99],
)
def test_operator_sets_that_nobody_has_tested_are_refused(version: int, tmp_path: Path) -> None:
    if version in OPERATOR_SETS:
        assert loaded(tmp_path, one("Relu", (1, 5), opset=version)).outputs == 5
        return
    with pytest.raises(
        UnsupportedOp,
        match=f"operator set {version}; {OPERATOR_SETS[0]} to {OPERATOR_SETS[-1]} are read. Convert it",
    ):
        loaded(tmp_path, one("Relu", (1, 5), opset=version))


HUGE = 2**40
TOO_LARGE: dict[str, Any] = {
    "input": one("Relu", (1, HUGE)),
    "Expand": one("Expand", (1, 3), {"s": ints(HUGE, 3)}),
    "Tile": one("Tile", (1, 3), {"r": ints(1, HUGE)}),
    "Pad": one("Pad", (1, 3), {"p": ints(0, 0, 0, HUGE)}),
    "Pad, old": one("Pad", (1, 3), opset=9, pads=[0, HUGE, 0, 0]),
    "Resize": one("Resize", IMAGE, {"r": NONE, "s": np.array([1, 1, 1e5, 1e5], np.float32)}),
    "Conv": one("Conv", IMAGE, {"w": random(1, 2, 1, 1)}, pads=[10**5, 10**5, 0, 0]),
    "ConvTranspose": one("ConvTranspose", IMAGE, {"w": random(2, 1, 1, 1)}, strides=[10**5, 10**5]),
    "ConvTranspose, cut off again": one("ConvTranspose", IMAGE, {"w": random(2, 1, 1, 1)}, strides=[10**5, 10**5], pads=[250000, 200000, 250000, 199000]),
    "ConstantOfShape": model([helper.make_node("ConstantOfShape", ["s"], ["k"]), helper.make_node("Add", ["x", "k"], ["y"])], (1, 3), {"s": ints(HUGE, 3)}),
    "Range": model([helper.make_node("Range", ["a", "b", "c"], ["k"]), helper.make_node("Cast", ["k"], ["f"], to=1),
                    helper.make_node("Add", ["x", "f"], ["y"])], (1, 1), {"a": np.int64(0), "b": np.int64(HUGE), "c": np.int64(1)}),
    "sum of a row and a column": model([helper.make_node("Expand", ["x", "r"], ["a"]), helper.make_node("Expand", ["x", "c"], ["b"]),
                                        helper.make_node("Add", ["a", "b"], ["y"])], (1, 1), {"r": ints(1, 10**6), "c": ints(10**6, 1)}),
    "one behind the other, again and again": model([helper.make_node("Concat", ["x" if k == 0 else f"v{k}"] * 2, [f"v{k + 1}" if k < 29 else "y"], axis=1)
                                                    for k in range(30)], (1, 1)),
    "a long sequence": one("LSTM", (10**5, 1, 2), {"w": random(1, 8, 2), "r": random(1, 8, 2)}, hidden_size=2),
}  # fmt: skip


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_are_read_before_anything_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        (BadInput, UnsupportedOp),
        match=r"elements; up to 33,554,432 are read|up to 33,554,432 numbers|steps is not written out",
    ):
        loaded(tmp_path, TOO_LARGE[name], paired=True)


def test_the_largest_size_is_what_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = one("Expand", (1, 1, 3), {"s": ints(1, 4, 1)})
    loaded(tmp_path, proto, paired=True)
    monkeypatch.setattr(steps, "LARGEST", 11)
    with pytest.raises(UnsupportedOp, match="has 12 elements; up to 11 are read"):
        loaded(tmp_path, proto, paired=True)


def test_a_shape_that_the_operator_set_does_not_give_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPS, "Neg", lambda tape, step, v: OPS["Flatten"](tape, step, v))
    with pytest.raises(
        BadModel,
        match=r"a result of shape \(1, 6\) was read, where the operator set says \(1, 2, 3\)",
    ):
        loaded(tmp_path, one("Neg", (1, 2, 3)), paired=True)


# ---- compared before anything is claimed -------------------------------------------------------------------------------------------------------------

NET = model([helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"]), helper.make_node("Gemm", ["r", "v"], ["y"])], ("n", 4),
            {"w": random(4, 6), "v": random(6, 3, seed=1)})  # fmt: skip
X, Y = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
BALL = calipers.Ball("linf", 0.1)


def as_if_bent(tape: Any, step: Any, v: Any) -> Any:
    """Read a relu as a leaky one."""
    return tape.elementwise("aten.leaky_relu.default", v, 0.01)


ASKED: dict[str, Callable[[nn.Module], object]] = {
    "measure": lambda net: calipers.measure(net, X, Y, BALL, plan="quick"),
    "attack": lambda net: calipers.attack(net, X, Y, BALL, "PGD(steps=1)"),
    "certify": lambda net: calipers.certify(net, X, Y, BALL, "IBP"),
    "standardised": lambda net: calipers.certify(
        calipers.Classifier(net, 0.5, 2.0), X, Y, BALL, "IBP"
    ),
    "inside another": lambda net: calipers.certify(
        nn.Sequential(net, nn.Linear(3, 3)), X, Y, BALL, "IBP"
    ),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("runtime", ["onnxruntime", "the reference"])
@pytest.mark.parametrize("asked", ASKED)
def test_a_wrong_reader_is_caught_before_anything_is_claimed(
    asked: str, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ASKED[asked](loaded(tmp_path, NET))
    monkeypatch.setitem(OPS, "Relu", as_if_bent)
    net = loaded(tmp_path, NET)
    with pytest.raises(
        BadModel,
        match=r"net\.onnx is read as another network than the one that .* differs by [0-9.e-]+ on points of this question",
    ):
        ASKED[asked](net)


def normalised(folder: Path) -> OnnxNet:
    """Return a network in double precision whose normalisation is to compute in single precision."""
    held = np.random.default_rng(0)
    arrays = {"s": held.normal(size=4), "b": held.normal(size=4), "w": held.normal(size=(48, 3))}
    nodes = [
        helper.make_node("GroupNormalization", ["x", "s", "b"], ["h"], num_groups=2),
        helper.make_node("Flatten", ["h"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, shape)
        for name, shape in (("x", [1, 4, 3, 4]), ("y", [1, 3]))
    ]
    graph = helper.make_graph(
        nodes, "net", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    )
    opset = [helper.make_opsetid("", 21)]
    return loaded(folder, helper.make_model(graph, opset_imports=opset, ir_version=10))


def asked_about(net: OnnxNet) -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 4, 3, 4)))
    ball = calipers.Ball("linf", 1e-3, box=None)
    calipers.certify(net, x, torch.tensor([0]), ball, "IBP")


@pytest.mark.one_in(1)
def test_single_precision_that_a_file_asks_for_inside_is_no_misreading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_about(normalised(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Execution, "in_double", lambda _: None)
        with pytest.raises(BadModel, match="differs by"):
            asked_about(normalised(tmp_path))
    # a misreading as small as that rounding is still noticed
    right = layers.group_norm
    patched = lambda w, x, groups, scale, bias, eps: right(w, x, groups, scale, bias, eps * 1.01)  # noqa: E731
    monkeypatch.setattr(layers, "group_norm", patched)
    with pytest.raises(BadModel, match="differs by"):
        asked_about(normalised(tmp_path))


PROPERTY = """(declare-const X_0 Real)
(declare-const Y_0 Real)
(assert (>= X_0 -2.0))
(assert (<= X_0 -1.0))
(assert (>= Y_0 -0.005))
"""


def test_a_false_unsat_is_what_the_comparison_prevents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """relu(x) is 0 below 0, which is unsafe here; read as a leaky one it would be -0.01 and less, and safe."""
    (tmp_path / "p.vnnlib").write_text(PROPERTY)
    (tmp_path / "net.onnx").write_bytes(one("Relu", (1, 1)).SerializeToString())
    ask = lambda: calipers.verify(tmp_path / "net.onnx", tmp_path / "p.vnnlib")  # noqa: E731
    assert ask().answer == "sat"
    monkeypatch.setitem(OPS, "Relu", as_if_bent)
    with pytest.raises(BadModel, match="differs by"):
        ask()
    with monkeypatch.context() as patch:
        patch.setattr(problem_module, "confirm", lambda *_: None)
        found = calipers.verify(tmp_path / "net.onnx", tmp_path / "p.vnnlib", proofs=True)
    assert found.answer == "unsat" and found.proofs[0] is not None
    (tmp_path / "proof.npz").write_bytes(found.proofs[0])
    for specification in (tmp_path / "p.vnnlib", None):  # nor is its proof one about this network
        with pytest.raises(BadModel, match="differs by"):
            proved_again(tmp_path / "proof.npz", str(tmp_path / "net.onnx"), specification)


def test_a_file_that_nobody_runs_is_not_claimed_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = loaded(tmp_path, NET)

    def broken(self: Execution) -> Any:
        raise RuntimeError("no such kernel")

    for name in ("_by_onnxruntime", "_by_the_reference"):
        monkeypatch.setattr(Execution, name, broken)
    with pytest.raises(
        BadModel,
        match=r"no independent program runs this file.*no such kernel.*Installing onnxruntime may help",
    ):
        calipers.certify(net, X, Y, BALL, "IBP")


def test_a_network_whose_weights_were_changed_is_its_own(tmp_path: Path) -> None:
    net = loaded(tmp_path, NET)
    with torch.no_grad():
        net.get_buffer(net.names["v"]).add_(0.5)
    calipers.certify(net, X, Y, BALL, "IBP")


def test_the_network_as_it_runs_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading that is wrong in float64 alone would spoil certificates, not answers."""

    def by_precision(tape: Any, step: Any, v: Any) -> Any:
        return tape.elementwise(
            "aten.leaky_relu.default", v, 0.01 if tape.dtype == torch.float64 else 0.0
        )

    monkeypatch.setitem(OPS, "Relu", by_precision)
    with pytest.raises(BadModel, match=r"rounding moves the outputs|differs by"):
        calipers.certify(loaded(tmp_path, NET), X, Y, BALL, "IBP")


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    "limits",
    [("calipers.models.classifier._BYTES", 32), ("calipers.problem.agreement._NUMBERS", 4)],
)
def test_large_inputs_are_compared_a_few_at_a_time(
    limits: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 32 bytes at once two float32 points go together, and of float64 ones each alone."""
    monkeypatch.setattr(*limits)
    each = calipers.Ball("linf", torch.tensor([0.1, 0.2, 0.3]))
    calipers.certify(loaded(tmp_path, NET), X, Y, each, "IBP")
    monkeypatch.setitem(OPS, "Relu", as_if_bent)
    with pytest.raises(BadModel, match="differs by"):
        calipers.certify(loaded(tmp_path, NET), X, Y, each, "IBP")


def test_points_that_are_no_numbers_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = X.clone()
    x[0, 0] = torch.nan
    assert [
        row.verdict
        for row in calipers.measure(loaded(tmp_path, NET), x, Y, BALL, plan="quick").points
    ].count("invalid") == 1
    monkeypatch.setitem(OPS, "Relu", as_if_bent)
    with pytest.raises(BadModel, match="differs by"):
        calipers.attack(loaded(tmp_path, NET), x, Y, BALL, "PGD(steps=1)")


def test_letters_are_compared_as_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, threat = (
        torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]]),
        calipers.Substitutions(one_hot_groups(2, 2), 1),
    )
    calipers.attack(loaded(tmp_path, NET), x, Y[:2], threat, "SubstitutionSearch")
    monkeypatch.setitem(OPS, "Relu", as_if_bent)
    with pytest.raises(BadModel, match="differs by"):
        calipers.attack(loaded(tmp_path, NET), x, Y[:2], threat, "SubstitutionSearch")


def outputs(run: Any, exact: Any, other: Any) -> Outputs:
    return Outputs(
        torch.tensor(run, dtype=torch.float32),
        *(torch.tensor(z, dtype=torch.float64) for z in (exact, other)),
    )


def test_the_tolerance_follows_sizes_and_rounding() -> None:
    single, nan, inf = torch.float32, float("nan"), float("inf")
    good = [[1000.0, 1e-3], [900.0, 2e-3]]
    assert outputs(good, good, good).worst(single) is None
    assert outputs(good, good, [[1000.0, 1e-3], [900.0, 2.01e-3]]).worst(single) is not None, (
        "a small output is as good as a large one"
    )
    assert outputs(good, good, [[1000.05, 1e-3], [900.0, 2e-3]]).worst(single) is None
    assert (
        outputs([[1000.0, 1e-3]], [[1000.0, 1.002e-3]], [[1000.0, 1.01e-3]]).worst(single) is None
    ), "rounding as large as ours is no difference"
    assert outputs([[inf, nan]], [[1e39, 1.0]], [[inf, nan]]).worst(single) is None, (
        "an overflow is one for both"
    )
    assert outputs([[1.0, 1.0]], [[1.0, 1.0]], [[1.0, nan]]).worst(single) is not None
    assert outputs([[inf, 1.0]], [[inf, 1.0]], [[-inf, 1.0]]).worst(single) is not None
    assert outputs([[1e-3]], [[2e-3]], [[1e-3]]).blind and not outputs(good, good, good).blind


# ---- files as strangers write them -------------------------------------------------------------------------------------------------------------------

FAULTS = {"wrong", "traceback", "untold"}


def became(numbers: range, folder: Path, seed: int = 0) -> Counter[str]:
    """Return how many files became what; a fault names its file."""
    found = {number: judged(case(seed, number), folder / "net.onnx") for number in numbers}
    faults = {number: one for number, one in found.items() if one.kind in FAULTS}
    assert not faults, faults
    return Counter(one.kind for one in found.values())


def test_strange_files_are_read_rightly_or_refused(tmp_path: Path) -> None:
    """150 of them; scripts/fuzz_onnx.py goes on."""
    found = became(range(150), tmp_path)
    assert found["equal"] >= 40 and found["refused"] >= 40, "the files are to try both"


@pytest.mark.slow
def test_two_thousand_strange_files_are_read_rightly_or_refused(tmp_path: Path) -> None:
    found = became(range(150, 2150), tmp_path)
    assert found["equal"] >= 600


def test_strange_files_show_a_reader_that_overlooks_an_attribute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for the negative slope of a leaky relu."""
    monkeypatch.setattr(Step, "finish", lambda self: None)
    monkeypatch.setitem(OPS, "Elu", lambda tape, step, v: tape.elementwise("aten.elu.default", v))
    monkeypatch.setattr("spoiled_onnx.confirm", lambda *_: None)
    kinds = [
        judged(one("Elu", (1, 5), alpha=0.3).SerializeToString(), tmp_path / "net.onnx").kind,
        judged(ELU, tmp_path / "net.onnx").kind,
    ]
    assert kinds == ["wrong", "equal"]


ELU = one("Elu", (1, 5), alpha=1.0).SerializeToString()


def test_the_readers_raise_nothing_but_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumbles(*_: Any) -> Any:
        raise AssertionError("a bug")

    monkeypatch.setitem(OPS, "Relu", stumbles)
    with pytest.raises(
        BadModel, match=r"node 0 .Relu.: Relu cannot be read .AssertionError: a bug"
    ):
        loaded(tmp_path, one("Relu", (1, 5)))
    monkeypatch.setattr(OnnxNet, "_read", stumbles)
    with pytest.raises(
        BadInput, match=r"net\.onnx cannot be read as an ONNX file \(AssertionError: a bug\)"
    ):
        load_onnx(tmp_path / "net.onnx")
    assert issubclass(BadModel, CalipersError)


@pytest.mark.one_in(1)
@pytest.mark.parametrize("where", ["initializer", "constant"])
def test_weights_beside_the_file_are_read_and_compared(where: str, tmp_path: Path) -> None:
    proto = one("MatMul", (1, 4), {"w": random(4, 3)})
    if where == "constant":
        proto.graph.node.insert(
            0, helper.make_node("Constant", [], ["w"], value=proto.graph.initializer[0])
        )
        del proto.graph.initializer[:]
    (tmp_path / "in").mkdir()
    onnx.save_model(
        proto,
        tmp_path / "in" / "net.onnx",
        save_as_external_data=True,
        size_threshold=0,
        convert_attribute=True,
        location="weights.bin",
    )
    assert (tmp_path / "in" / "weights.bin").stat().st_size
    calipers.certify(load_onnx(tmp_path / "in" / "net.onnx"), X, Y, BALL, "IBP")
    data = (tmp_path / "in" / "net.onnx").read_bytes()
    (tmp_path / "in" / "net.onnx").write_bytes(data.replace(b"weights.bin", b"../outs.bin"))
    (tmp_path / "in" / "weights.bin").rename(tmp_path / "outs.bin")
    with pytest.raises(BadInput, match="cannot be read as an ONNX file"):
        load_onnx(tmp_path / "in" / "net.onnx")


def test_weights_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    for dims in ([2**40], [-1, 4], [4, 7]):
        proto = one("MatMul", (1, 4), {"w": random(4, 6)})
        del proto.graph.initializer[0].dims[:]
        proto.graph.initializer[0].dims.extend(dims)
        with pytest.raises(BadInput, match="the tensor 'w' cannot be read"):
            loaded(tmp_path, proto)
    text = numpy_helper.from_array(np.array(["a", "b"], dtype=object), "w")
    proto = one("MatMul", (1, 4), {"w": random(4, 6)})
    proto.graph.initializer[0].CopyFrom(text)
    with pytest.raises(BadInput, match="the tensor 'w' cannot be read"):
        loaded(tmp_path, proto)


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("can't allocate memory")])
def test_too_little_memory_for_the_comparison_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("calipers.problem.agreement._confirm", fails)
    with pytest.raises(BadModel, match="too little memory to compare"):
        agreement.confirm(*(None,) * 3)  # type: ignore[arg-type]
