"""ONNX operations and files that are read by way of others: values as the reference has them,
sound bounds, and the choice of what is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from written import judged

from calipers.certificates.crown import CROWN
from calipers.errors import BadInput, BadModel, CaptureError, UnsupportedOp
from calipers.graph.onnx import windows
from calipers.graph.products import MaxPool
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
import written_onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from test_onnx import answer, ints, loaded, model, one, random, recurrent  # noqa: E402

pytestmark = pytest.mark.one_in(1)

ROW, GRID, IMAGE = (1, 4), (1, 2, 3), (1, 2, 5, 4)
SAME = {"auto_pad": "SAME_UPPER", "kernel_shape": [2, 2]}
READ: dict[str, Any] = {
    "ReduceMax of all": one("ReduceMax", GRID, keepdims=0),
    "ReduceMin": one("ReduceMin", GRID, axes=[1]),
    "ReduceL1": one("ReduceL1", GRID, axes=[-1], keepdims=0),
    "ReduceL2 over two axes": one("ReduceL2", IMAGE, axes=[2, 1]),
    "ReduceLogSumExp": one("ReduceLogSumExp", IMAGE, axes=[1, 3]),
    "ReduceSumSquare": one("ReduceSumSquare", GRID, {"a": ints(1)}, opset=18),
    "ReduceProd": one("ReduceProd", GRID, axes=[2]),
    "LpNormalization": one("LpNormalization", GRID, axis=1, p=1),
    "RMSNormalization": one("RMSNormalization", GRID, {"s": random(3)}, opset=23, epsilon=0.01),
    "Softsign": one("Softsign", GRID),
    "Shrink": one("Shrink", GRID, lambd=0.3, bias=0.3),
    "ThresholdedRelu": one("ThresholdedRelu", GRID, alpha=0.0),
    "CumSum": one("CumSum", GRID, {"a": np.int64(2)}, exclusive=1, reverse=1),
    "Trilu": one("Trilu", GRID, {"k": np.int64(1)}),
    "GatherElements": one("GatherElements", GRID, {"i": np.array([[[2, 0], [-1, 1]]])}, axis=2),
    "Einsum of a constant": one("Einsum", GRID, {"w": random(3, 4)}, equation="bij,jk->kbi"),
    "Einsum of two": model(
        [helper.make_node("Einsum", ["x", "x"], ["y"], equation="bij,bik->bjk")], GRID
    ),
    "a choice of slopes": model(
        [
            helper.make_node("Mul", ["x", "k"], ["s"]),
            helper.make_node("Greater", ["x", "z"], ["c"]),
            helper.make_node("Where", ["c", "x", "s"], ["y"]),
        ],
        GRID, {"k": np.float32(0.2), "z": np.array([0], np.float32)},
    ),
    "a choice of curves": model(
        [
            helper.make_node("Exp", ["x"], ["e"]),
            helper.make_node("Sub", ["e", "o"], ["s"]),
            helper.make_node("Less", ["z", "x"], ["c"]),
            helper.make_node("Where", ["c", "x", "s"], ["y"]),
        ],
        ("n", 2, 3), {"o": np.float32(1), "z": np.float32(0)},
    ),
    "powers": one("Pow", GRID, {"p": np.array([0, 2, 3], np.float32)}),
    "MaxPool of odd padding": one("MaxPool", IMAGE, strides=[1, 1], **SAME),
    "MaxPool of much padding": one("MaxPool", IMAGE, kernel_shape=[3, 3], pads=[2, 0, 1, 1]),
    "AveragePool up to the end": one(
        "AveragePool", IMAGE, opset=19, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1
    ),
    "AveragePool with its padding": one(
        "AveragePool", IMAGE, opset=19, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1,
        pads=[1, 1, 1, 1], count_include_pad=1,
    ),
    "AveragePool with gaps": one("AveragePool", IMAGE, opset=19, kernel_shape=[2, 2], dilations=[2, 2]),
    "constants of any operation": model(
        [
            helper.make_node("Hardmax", ["k"], ["h"]),
            helper.make_node("Add", ["x", "h"], ["y"]),
        ],
        ROW, {"k": random(1, 4)},
    ),
}  # fmt: skip


OF_THE_RUNTIME = {"LpNormalization", "MaxPool of much padding"}
"""Where the reference has another opinion than the standard."""


@pytest.mark.parametrize("name", READ)
def test_values_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    net = loaded(tmp_path, READ[name], paired=True)
    x = random(6, *net.program.point_shape, seed=2)
    rows = [p.reshape(net.program.input_shape) for p in x]
    if name in OF_THE_RUNTIME:
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(READ[name].SerializeToString())
        expected = np.stack([session.run(None, {"x": p})[0].reshape(-1) for p in rows])
    else:
        expected = np.stack([answer(READ[name], p) for p in rows])
    got = net(torch.tensor(x)).numpy()[:, -net.outputs :]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in READ if "Pool" in name])
def test_windows_read_one_at_a_time_give_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = loaded(tmp_path, READ[name])
    x = torch.tensor(random(3, *net.program.point_shape, seed=3))
    whole, blocks = net(x), list[int]()
    cat = torch.cat
    monkeypatch.setattr(windows, "_BLOCK", 1)
    monkeypatch.setattr(torch, "cat", lambda t, *a: (blocks.append(len(t)), cat(t, *a))[1])
    assert torch.equal(net(x), whole)
    assert not blocks or max(blocks) > 1  # other pools are read from strides


def test_a_window_of_the_wrong_places_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: Any, windows: torch.Tensor, shape: tuple[int, ...]) -> MaxPool:
        return MaxPool(run, windows.roll(1, 0), shape)

    monkeypatch.setattr(windows, "MaxPool", wrong)
    pools = {"pool": lambda d: ((1, 1, 3, 3), [("MaxPool", [], {**SAME, "strides": [1, 1]})], 17)}
    monkeypatch.setattr(written_onnx, "WAYS", pools)
    assert any(
        judged(lambda: written_onnx.written("pool", seed), seed, light=True).wrong  # noqa: B023
        for seed in range(8)
    )


def test_functions_of_a_recurrent_layer_stand_by_their_place(tmp_path: Path) -> None:
    runtime = pytest.importorskip(
        "onnxruntime", reason="the reference does not look at activations"
    )
    for kind, gates, functions in (
        ("LSTM", 4, ["Tanh", "Sigmoid", "Relu"]),
        ("GRU", 3, ["Tanh", "Sigmoid"]),
        ("RNN", 1, ["Relu"]),
    ):
        proto = recurrent(kind, gates, activations=functions)
        net, session = loaded(tmp_path, proto), runtime.InferenceSession(proto.SerializeToString())
        x = random(3, *net.program.input_shape, seed=2)
        expected = np.stack([session.run(None, {"x": p})[0].reshape(-1) for p in x])
        got = net(torch.tensor(x).reshape(3, *net.program.point_shape)).reshape(3, -1)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
        net.confirm(torch.tensor(x), got, got)


def chosen(kind: str, *inputs: str) -> Any:
    """Return a model that makes something of x > 0."""
    nodes = [helper.make_node("Greater", ["x", "z"], ["c"]), helper.make_node(kind, inputs, ["y"])]
    return model(nodes, ROW, {"z": np.float32(0), "o": np.float32(1), "v": random(1, 4)})


JUMPS = {
    "a step": (chosen("Where", "c", "o", "z"), "do not meet there"),
    "a choice of another value": (chosen("Where", "c", "x", "v"), "compared number itself"),
    "a mask turned around": (chosen("Not", "c"), "a comparison of what depends on the point"),
    "Shrink": (one("Shrink", ROW, lambd=0.3, bias=0.1), "jumps"),
    "ThresholdedRelu": (one("ThresholdedRelu", ROW, alpha=0.5), "jumps"),
    "by chance": (one("RandomNormalLike", ROW), "no bounds for ONNX's RandomNormalLike"),
    "axes that are not named": (one("Einsum", ROW, equation="...a->a..."), "letters only"),
    "a sum over one factor alone": (
        model([helper.make_node("Einsum", ["x", "x"], ["y"], equation="bi,bj->bj")], ROW), "alone"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JUMPS)
def test_what_is_not_read_says_why(name: str, tmp_path: Path) -> None:
    proto, why = JUMPS[name]
    with pytest.raises(UnsupportedOp, match=why):
        loaded(tmp_path, proto, paired=True)


def branches(condition: Any, weight: float = 3.0) -> Any:
    """Return x * w or -x, w a constant of the first branch."""
    y = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    then = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["b"])], "then", [], [y],
        [numpy_helper.from_array(np.float32(weight), "w")],
    )  # fmt: skip
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], [y])
    chosen = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    made = {"n": np.int64(2), "m": np.int64(2 if condition else 3)}
    first = (
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0)
        if condition is None
        else helper.make_node("Identity", ["m0"], ["m"])
    )
    second = (
        helper.make_node("Greater", ["m", "z"], ["c"])
        if condition is None
        else helper.make_node("Equal", ["n", "m"], ["c"])
    )
    constants = {"z": np.float32(0)} if condition is None else {"n": made["n"], "m0": made["m"]}
    return model([first, second, chosen], ROW, constants)


def test_a_branch_that_constants_decide_is_taken(tmp_path: Path) -> None:
    x = torch.tensor(random(3, 4))
    torch.testing.assert_close(loaded(tmp_path, branches(True))(x), 3 * x)
    torch.testing.assert_close(loaded(tmp_path, branches(False))(x), -x)
    net = loaded(tmp_path, branches(True))
    net.confirm(x, net(x), net(x))
    with pytest.raises(UnsupportedOp, match="those that constants decide are"):
        loaded(tmp_path, branches(None))


def with_more(inputs: list[str], outputs: list[str], nodes: list[Any]) -> Any:
    """Return a model of several inputs (1, 3) and outputs."""
    return helper.make_model(
        helper.make_graph(
            nodes, "net",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 3)) for n in inputs],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip


def test_only_what_the_output_needs_is_read(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Add", ["y", "u"], ["z"])]
    x = torch.tensor(random(4, 3))
    net = loaded(tmp_path, with_more(["u", "x"], ["y", "z"], nodes), output="y")
    torch.testing.assert_close(net(x), x.relu())
    net.confirm(x, net(x), net(x))
    with pytest.raises(BadInput, match=r"depends on 2 inputs \(u, x\)"):
        loaded(tmp_path, with_more(["u", "x"], ["y", "z"], nodes), output=1)
    with pytest.raises(BadInput, match=r"2 outputs \(y, z\), 2 of them .* output='NAME'"):
        loaded(tmp_path, with_more(["u", "x"], ["y", "z"], nodes))


def test_sparse_tensors_of_either_kind_of_places_are_made_dense(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.array([2.0, -3.0], np.float32), "w")
    dense = np.array([[0, 2.0], [0, 0], [-3.0, 0], [0, 0]], np.float32)
    for places in (ints(1, 4), np.array([[0, 1], [2, 0]])):
        proto = one("MatMul", ROW, {"w": dense})
        del proto.graph.initializer[:]
        proto.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(places, "p"), [4, 2])
        )
        x = random(3, 4)
        np.testing.assert_allclose(loaded(tmp_path, proto)(torch.tensor(x)).numpy(), x @ dense)
    proto.graph.sparse_initializer[0].dims[0] = 2
    with pytest.raises(BadInput, match="sparse"):
        loaded(tmp_path, proto)


def test_elements_may_meet_along_an_axis_that_is_not_the_batch(tmp_path: Path) -> None:
    turned = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("ReduceSum", ["t", "zero"], ["y"], keepdims=0),
    ]
    x = random(4, 1, 3)
    net = loaded(tmp_path, model(turned, ("n", 1, 3), {"zero": ints(0)}))
    np.testing.assert_allclose(net(torch.tensor(x)).reshape(4, 3).numpy(), x.reshape(4, 3))
    with pytest.raises(CaptureError, match="along the batch axis"):
        loaded(tmp_path, one("ReduceSum", ("n", 3), {"a": ints(0)}))


@pytest.mark.parametrize("p", [1, 2])
def test_what_is_zero_is_normalised_to_zero(p: int, tmp_path: Path) -> None:
    """A vector of dead neurons has no direction; both programs that run such files say 0."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("LpNormalization", ["r"], ["n"], axis=-1, p=p),
        helper.make_node("Flatten", ["n"], ["y"]),
    ]
    net = loaded(tmp_path, model(nodes, (1, 2, 3)))
    x = torch.tensor([[-1.0, -2.0, -0.5, 1.0, 2.0, -1.0]]).view(1, *net.program.point_shape)
    size = 3.0 if p == 1 else 5**0.5
    assert net(x).flatten().tolist() == pytest.approx([0, 0, 0, 1 / size, 2 / size, 0])
    problem = Problem.pose(net, x, torch.tensor([4]), Ball("linf", 0.01, box=None))
    [claim] = CROWN()(problem)
    assert not bool(claim.margin.isnan().any())
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(given)[0, 4], given)
    assert bool(gradient.isfinite().all())


def test_a_split_into_other_than_its_outputs_is_damaged(tmp_path: Path) -> None:
    """ONNX's own inference of shapes would end the process."""
    nodes = [helper.make_node("Split", ["x"], ["y", "a", "b", "c"], axis=0, num_outputs=3)]
    with pytest.raises(BadModel, match=r"num_outputs is 3, but 4 outputs are named"):
        loaded(tmp_path, model(nodes, (1, 2, 2, 2), opset=21))
