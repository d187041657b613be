"""Does a network read from an ONNX file compute what the file says: each operation against the reference, whole nets against their twins?"""

from __future__ import annotations

import copy
import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beside import DATA, needs
from torch import nn

import calipers
from calipers.errors import BadInput, BadModel, CaptureError, UnsupportedOp
from calipers.graph.capture import capture, graph_of
from calipers.graph.file_builder import Tape
from calipers.graph.onnx.network import OnnxNet
from calipers.graph.onnx.ops import OPS
from calipers.interchange import load, load_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

NETS = sorted((DATA / "vnncomp").glob("*/*.onnx*"))
Constants = dict[str, Any]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def model(
    nodes: list[Any],
    shape: tuple[Any, ...],
    constants: Constants | None = None,
    opset: int = 17,
    output: str = "y",
) -> Any:
    """Return a model of one input x and one output y."""
    tensors = [
        numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "net",
        [given],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def loaded(folder: Path, proto: Any, **options: Any) -> OnnxNet:
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    return load_onnx(folder / "net.onnx", **options)


def answer(proto: Any, x: np.ndarray) -> np.ndarray:
    """Ask the reference; where it knows no such operation or stumbles over it, the runtime."""
    try:
        found = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    except (RuntimeError, ValueError):
        runtime = pytest.importorskip(
            "onnxruntime", reason="the reference cannot run this, and onnxruntime is not installed"
        )
        found = runtime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    return np.asarray(found).reshape(-1)


def agree(folder: Path, proto: Any, positive: bool = False, tolerance: float = 1e-5) -> OnnxNet:
    """Compare the reading with the reference: one point, and three points of which the reference sees one at a time."""
    net = loaded(folder, proto)
    x = random(3, *net.program.point_shape, seed=1)
    x = np.abs(x) + 0.1 if positive else x
    expected = np.stack([answer(proto, p.reshape(net.program.input_shape)) for p in x])
    for got, wanted in ((net(torch.tensor(x)), expected), (net(torch.tensor(x[:1])), expected[:1])):
        np.testing.assert_allclose(
            got.detach().flatten(1).numpy(), wanted, rtol=tolerance, atol=tolerance
        )
    return net


def one(
    kind: str,
    shape: tuple[Any, ...],
    constants: Constants | None = None,
    opset: int = 17,
    **attributes: Any,
) -> Any:
    return model(
        [helper.make_node(kind, ["x", *(constants or {})], ["y"], **attributes)],
        shape,
        constants,
        opset,
    )


def recurrent(
    kind: str,
    gates: int,
    ways: int = 1,
    output: str = "every",
    start: bool = False,
    **attributes: Any,
) -> Any:
    """Return a recurrent layer with a state of 2 on a sequence of 3 steps of 4 features."""
    names = {
        "w": random(ways, gates * 2, 4),
        "r": random(ways, gates * 2, 2, seed=1),
        "b": random(ways, gates * 4, seed=2),
    }
    first = {"h0": random(ways, 1, 2, seed=3), "c0": random(ways, 1, 2, seed=4)} if start else {}
    given = ["x", *names, *(["", *first] if start else [])]
    node = helper.make_node(kind, given, ["y", "last"], hidden_size=2, **attributes)
    return model(
        [node], (3, 1, 4), {**names, **first}, opset=14, output="last" if output == "last" else "y"
    )


W, IMAGE = random(4, 6), (1, 2, 6, 5)
KERNEL, UP = random(4, 2, 3, 3, seed=2), random(2, 3, 3, 2, seed=3)
CASES: dict[str, Any] = {
    "Gemm": one("Gemm", (1, 6), {"w": W, "b": random(4)}, transB=1, alpha=0.5, beta=2.0),
    "Gemm, plain": one("Gemm", (1, 4), {"w": W}),
    "Gemm, scalar bias": one("Gemm", (1, 4), {"w": W, "b": np.float32(0.3)}),
    "MatMul": one("MatMul", (1, 3, 4), {"w": W}),
    "MatMul, free batch": one("MatMul", ("n", 4), {"w": W}),
    "MatMul, vector": one("MatMul", (4,), {"w": W}),
    "MatMul, constant first": model([helper.make_node("MatMul", ["w", "x"], ["y"])], (6, 1), {"w": W}),
    "MatMul, constant first, matrix": model([helper.make_node("MatMul", ["w", "x"], ["y"])], (6, 3), {"w": W}),
    "Add": one("Add", IMAGE, {"c": random(2, 1, 1)}),
    "Add, wider": one("Add", (1, 1, 3), {"c": random(2, 4, 1)}),
    "Sub": one("Sub", (1, 5), {"c": random(1, 5)}),
    "Sub from": model([helper.make_node("Sub", ["c", "x"], ["y"])], (1, 5), {"c": random(5)}),
    "Mul": one("Mul", IMAGE, {"c": random(5)}),
    "Div": one("Div", (1, 5), {"c": 1 + np.abs(random(5))}),
    "Neg": one("Neg", (1, 5)),
    "two values": model([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Sub", ["x", "r"], ["y"])], (1, 5)),
    "two shapes": model(
        [helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3]), helper.make_node("Sub", ["x", "m"], ["y"])], IMAGE
    ),
    "Sum": model([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Sum", ["x", "r", "c"], ["y"])], (1, 5), {"c": random(5)}),
    "Mean": model([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Mean", ["x", "r"], ["y"])], (1, 5)),
    "Max": model([helper.make_node("Neg", ["x"], ["r"]), helper.make_node("Max", ["x", "r", "c"], ["y"])], (1, 5), {"c": random(5)}),
    "Min": model([helper.make_node("Neg", ["x"], ["r"]), helper.make_node("Min", ["c", "x", "r"], ["y"])], (1, 5), {"c": random(5)}),
    "Conv": one("Conv", IMAGE, {"w": KERNEL, "b": random(4)}, strides=[2, 1], pads=[1, 2, 1, 2], dilations=[1, 2]),
    "Conv, uneven": one("Conv", IMAGE, {"w": KERNEL}, pads=[0, 1, 1, 2]),
    "Conv, same upper": one("Conv", IMAGE, {"w": random(4, 2, 2, 2)}, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv, same lower": one("Conv", IMAGE, {"w": random(4, 2, 2, 2)}, auto_pad="SAME_LOWER"),
    "Conv, valid": one("Conv", IMAGE, {"w": KERNEL}, auto_pad="VALID"),
    "Conv, groups": one("Conv", IMAGE, {"w": random(4, 1, 3, 3)}, group=2),
    "Conv, 1d": one("Conv", (1, 2, 7), {"w": random(3, 2, 3)}, pads=[1, 1]),
    "Conv, 3d": one("Conv", (1, 2, 4, 4, 3), {"w": random(3, 2, 2, 2, 2)}, strides=[2, 1, 1]),
    "ConvTranspose": one("ConvTranspose", IMAGE, {"w": UP, "b": random(3)}, strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 0]),
    "ConvTranspose, dilated": one("ConvTranspose", IMAGE, {"w": UP}, dilations=[2, 1]),
    "ConvTranspose, groups": one("ConvTranspose", IMAGE, {"w": random(2, 3, 2, 2)}, group=2, strides=[2, 2]),
    "ConvTranspose, 1d": one("ConvTranspose", (1, 2, 4), {"w": random(2, 3, 3)}, strides=[2], pads=[3, 3]),
    "BatchNormalization": one("BatchNormalization", IMAGE, {"s": random(2), "b": random(2), "m": random(2), "v": np.abs(random(2)) + 0.1}, epsilon=1e-3),
    "BatchNormalization, vector": one("BatchNormalization", (1, 3), {"s": random(3), "b": random(3), "m": random(3), "v": np.abs(random(3)) + 0.1}),
    "Relu": one("Relu", (1, 5)),
    "LeakyRelu": one("LeakyRelu", (1, 5), alpha=0.2),
    "PRelu, one slope": one("PRelu", IMAGE, {"s": np.array([0.3], np.float32)}),
    "PRelu": one("PRelu", IMAGE, {"s": random(2, 1, 1)}),
    "Elu": one("Elu", (1, 5), alpha=0.7),
    "Sigmoid": one("Sigmoid", (1, 5)),
    "Tanh": one("Tanh", (1, 5)),
    "Softplus": one("Softplus", (1, 5)),
    "Exp": one("Exp", (1, 5)),
    "Log": one("Log", (1, 5)),
    "Sqrt": one("Sqrt", (1, 5)),
    "Reciprocal": one("Reciprocal", (1, 5)),
    "Erf": one("Erf", (1, 5)),
    "Sin": one("Sin", (1, 5)),
    "Cos": one("Cos", (1, 5)),
    "Pow": one("Pow", (1, 5), {"p": np.float32(2)}),
    "Abs": one("Abs", (1, 5)),
    "HardSigmoid": one("HardSigmoid", (1, 5), alpha=0.3),
    "HardSwish": one("HardSwish", (1, 5)),
    "Softmax": one("Softmax", (1, 5)),
    "LogSoftmax": one("LogSoftmax", (1, 5)),
    "LogSoftmax, old": one("LogSoftmax", (1, 5), opset=9),
    "Softmax, old": one("Softmax", (1, 5), opset=9),
    "product of two": model([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Mul", ["x", "r"], ["y"])], (1, 5)),
    "quotient of two": model([helper.make_node("Exp", ["x"], ["r"]), helper.make_node("Div", ["x", "r"], ["y"])], (1, 5)),
    "matrices": model([helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["x", "t"], ["y"])], (1, 3, 4)),
    "Clip, old": one("Clip", (1, 5), opset=10, min=-0.5, max=0.5),
    "Clip": one("Clip", (1, 5), {"lo": np.float32(-0.2), "hi": np.float32(0.9)}),
    "Clip, above alone": model([helper.make_node("Clip", ["x", "", "hi"], ["y"])], (1, 5), {"hi": np.float32(0.1)}),
    "MaxPool": one("MaxPool", IMAGE, kernel_shape=[2, 3], strides=[2, 1], pads=[1, 1, 1, 1]),
    "MaxPool, ceil": one("MaxPool", (1, 2, 5, 5), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "MaxPool, 1d": one("MaxPool", (1, 2, 8), kernel_shape=[2], strides=[2]),
    "AveragePool": one("AveragePool", IMAGE, kernel_shape=[2, 3], strides=[2, 1], pads=[1, 0, 0, 1]),
    "AveragePool, padding counts": one("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "GlobalAveragePool": one("GlobalAveragePool", IMAGE),
    "GlobalMaxPool": one("GlobalMaxPool", IMAGE),
    "Reshape": one("Reshape", IMAGE, {"s": ints(0, -1, 5)}),
    "Reshape, all": one("Reshape", IMAGE, {"s": ints(-1)}),
    "Reshape, empty": one("Reshape", (1, 6), {"s": ints(-1, 3)}, allowzero=1),
    "Flatten": one("Flatten", (1, 2, 3, 4), axis=2),
    "Squeeze": one("Squeeze", (1, 1, 3, 1), {"a": ints(1, 3)}),
    "Squeeze, old": one("Squeeze", (1, 1, 3, 1), opset=11, axes=[1]),
    "Unsqueeze": one("Unsqueeze", (1, 3), {"a": ints(0, -1)}),
    "Transpose": one("Transpose", (1, 2, 3, 4), perm=[0, 3, 1, 2]),
    "Transpose, batch too": one("Transpose", (1, 2, 3), perm=[2, 1, 0]),
    "Transpose, plain": one("Transpose", (3, 4)),
    "Concat": model([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Concat", ["c", "x", "r"], ["y"], axis=1)], (1, 2, 3), {"c": random(1, 4, 3)}),
    "Concat, first axis": model([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Concat", ["x", "r"], ["y"], axis=0)], (3, 2)),
    "Slice": one("Slice", (1, 6, 5), {"s": ints(1, -4), "e": ints(6, 2**40), "a": ints(1, 2), "t": ints(2, 1)}),
    "Slice, backwards": one("Slice", (1, 6), {"s": ints(-1), "e": ints(-(2**40)), "a": ints(1), "t": ints(-2)}),
    "Slice, old": one("Slice", (1, 6, 5), opset=9, starts=[1], ends=[3], axes=[1]),
    "Gather": one("Gather", (1, 6, 2), {"i": np.array([[0, 3], [-1, 3]])}, axis=1),
    "Gather, one": one("Gather", (1, 6), {"i": np.int64(2)}, axis=1),
    "Split": model([helper.make_node("Split", ["x", "s"], ["a", "b"], axis=1), helper.make_node("Sub", ["b", "a"], ["y"])], (1, 6), {"s": ints(3, 3)}),
    "Split, old": model([helper.make_node("Split", ["x"], ["a", "b"], axis=1), helper.make_node("Neg", ["b"], ["y"])], (1, 6), opset=11),
    "Pad": one("Pad", IMAGE, {"p": ints(0, 0, 1, 2, 0, 0, 0, 1), "v": np.float32(0.7)}),
    "Pad, reflect": one("Pad", IMAGE, {"p": ints(0, 0, 1, 2, 0, 0, 2, 1)}, mode="reflect"),
    "Pad, edge": one("Pad", IMAGE, {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}, mode="edge"),
    "MatMul, two variables": model([helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["x", "t"], ["y"])], (1, 3, 4)),
    "MatMul, stacks": model([helper.make_node("Sin", ["x"], ["s"]), helper.make_node("Transpose", ["s"], ["t"], perm=[0, 1, 3, 2]),
                             helper.make_node("MatMul", ["t", "x"], ["y"])], (1, 2, 3, 4)),
    "MatMul, stack and matrix": model([helper.make_node("Gather", ["x", "zero"], ["m"], axis=1), helper.make_node("Squeeze", ["m"], ["q"]),
                                       helper.make_node("MatMul", ["x", "q"], ["y"])], (1, 3, 4, 4), {"zero": ints(1)}),
    "MatMul, vector and matrix": model([helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=0), helper.make_node("MatMul", ["x", "m"], ["y"])],
                                       (3, 4)),
    "MatMul, constant stack": one("MatMul", (1, 2, 3, 4), {"w": random(2, 4, 5)}),
    "MatMul, constant stack first": model([helper.make_node("MatMul", ["w", "x"], ["y"])], (1, 2, 3, 4), {"w": random(1, 2, 5, 3)}),
    "Mul, two variables": model([helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3]), helper.make_node("Mul", ["x", "m"], ["y"])], IMAGE),
    "Mul, by itself": model([helper.make_node("Mul", ["x", "x"], ["y"])], (1, 5)),
    "Mul, by its sigmoid": model([helper.make_node("Mul", ["x", "k"], ["z"]), helper.make_node("Sigmoid", ["z"], ["s"]),
                                  helper.make_node("Mul", ["s", "x"], ["y"])], (1, 5), {"k": np.float32(1.7)}),
    "Mul, as gelu": model([helper.make_node("Div", ["x", "k"], ["z"]), helper.make_node("Erf", ["z"], ["e"]), helper.make_node("Add", ["e", "one"], ["g"]),
                           helper.make_node("Mul", ["x", "half"], ["h"]), helper.make_node("Mul", ["h", "g"], ["y"])],
                          (1, 5), {"k": np.float32(1.3), "one": np.float32(1), "half": np.float32(0.5)}),
    "Div, two variables": model([helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Div", ["x", "e"], ["y"])], (1, 5)),
    "Div, by a root": model([helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Sqrt", ["e"], ["r"]), helper.make_node("Div", ["x", "r"], ["y"])],
                            (1, 5)),
    "Where": model([helper.make_node("Sin", ["x"], ["s"]), helper.make_node("Where", ["c", "x", "s"], ["z"]),
                    helper.make_node("Where", ["d", "z", "v"], ["y"])],
                   (1, 2, 3), {"c": np.array([True, False, True]), "d": np.array([[True], [False]]), "v": random(2, 3)}),
    "LayerNormalization": one("LayerNormalization", (1, 3, 4), {"s": random(4), "b": random(4)}, epsilon=0.1),
    "LayerNormalization, two axes": one("LayerNormalization", (1, 3, 4), {"s": random(3, 4)}, axis=1),
    "InstanceNormalization": one("InstanceNormalization", IMAGE, {"s": random(2), "b": random(2)}, epsilon=0.01),
    "GroupNormalization": one("GroupNormalization", (1, 4, 3), {"s": random(4), "b": random(4)}, opset=21, num_groups=2),
    "GroupNormalization, old": one("GroupNormalization", (1, 4, 3), {"s": random(2), "b": random(2)}, opset=18, num_groups=2),
    "Gelu": one("Gelu", (1, 5), opset=20), "Gelu, tanh": one("Gelu", (1, 5), opset=20, approximate="tanh"),
    "Mish": one("Mish", (1, 5), opset=18), "Atan": one("Atan", (1, 5)), "Selu": one("Selu", (1, 5), alpha=1.2), "Celu": one("Celu", (1, 5), alpha=0.6),
    "RNN": recurrent("RNN", 1), "GRU": recurrent("GRU", 3, linear_before_reset=1), "GRU, reset first": recurrent("GRU", 3),
    "GRU, backwards": recurrent("GRU", 3, output="last", direction="reverse"), "LSTM": recurrent("LSTM", 4),
    "LSTM, both ways": recurrent("LSTM", 4, ways=2, direction="bidirectional"),
    "LSTM, last": recurrent("LSTM", 4, output="last", start=True),
    "Identity": one("Identity", (1, 5)),
    "Dropout": one("Dropout", (1, 5)),
    "Cast": one("Cast", (1, 5), to=TensorProto.FLOAT),
    "ReduceSum": one("ReduceSum", (1, 2, 3, 4), {"a": ints(1, -1)}, keepdims=0),
    "ReduceMean": one("ReduceMean", (1, 2, 3, 4), axes=[2, 3]),
    "ReduceMean, new": one("ReduceMean", (1, 2, 3), {"a": ints(2)}, opset=18),
    "ReduceSum, all": one("ReduceSum", (1, 2, 3), keepdims=0),
    "Expand": one("Expand", (1, 1, 3), {"s": ints(1, 4, 1)}),
    "Tile": one("Tile", (1, 2, 3), {"r": ints(1, 2, 1)}),
    "DepthToSpace": one("DepthToSpace", (1, 8, 2, 3), blocksize=2),
    "DepthToSpace, columns first": one("DepthToSpace", (1, 8, 2, 3), blocksize=2, mode="CRD"),
    "SpaceToDepth": one("SpaceToDepth", (1, 2, 4, 6), blocksize=2),
    "Resize, nearest": one("Resize", IMAGE, {"r": np.array([], np.float32), "s": np.array([1, 1, 2, 1.5], np.float32)}, mode="nearest"),
    "Resize, floor": one(
        "Resize", IMAGE, {"r": np.array([], np.float32), "s": np.array([1, 1, 2, 2], np.float32)},
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    ),
    "Resize, linear": one("Resize", IMAGE, {"r": np.array([], np.float32), "s": np.array([1, 1, 2, 3], np.float32)}, mode="linear"),
    "Upsample": one("Upsample", IMAGE, {"s": np.array([1, 1, 2, 2], np.float32)}, opset=9, mode="nearest"),
    "Size": model([helper.make_node("Size", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["f"], to=1), helper.make_node("Div", ["x", "f"], ["y"])],
                  (1, 2, 3)),
    "constants folded": model(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
            helper.make_node("Unsqueeze", ["n", "axis"], ["n1"]),
            helper.make_node("Constant", [], ["rest"], value=numpy_helper.from_array(ints(-1))),
            helper.make_node("Concat", ["n1", "rest"], ["shape"], axis=0),
            helper.make_node("Reshape", ["x", "shape"], ["f"]),
            helper.make_node("ConstantOfShape", ["six"], ["ones"], value=numpy_helper.from_array(np.array([1.5], np.float32))),
            helper.make_node("Mul", ["f", "ones"], ["y"]),
        ],
        ("batch", 2, 3), {"zero": np.int64(0), "axis": ints(0), "six": ints(6)},
    ),
}  # fmt: skip
POSITIVE = {"Log", "Sqrt", "Reciprocal"}


@pytest.mark.parametrize("name", CASES)
def test_each_operation_agrees_with_the_reference(name: str, tmp_path: Path) -> None:
    agree(tmp_path, CASES[name], positive=name in POSITIVE)


def test_every_reader_is_tried() -> None:
    seen = {node.op_type for proto in CASES.values() for node in proto.graph.node}
    folded = {"Range", "Mod", "Equal", "Less", "Greater", "Not", "Floor", "Ceil", "And", "Or"}
    assert set(OPS) - folded <= seen, set(OPS) - folded - seen


CNN = model(
    [
        helper.make_node("Conv", ["x", "k", "kb"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "wb"], ["y"], transB=1),
    ],
    ("batch", 2, 6, 6),
    {
        "k": random(4, 2, 3, 3), "kb": random(4), "s": random(4), "b": random(4), "m": random(4), "v": np.abs(random(4)) + 0.1,
        "w": random(3, 16), "wb": random(3),
    },
)  # fmt: skip


def test_a_free_batch_gives_what_the_reference_gives_to_the_batch(tmp_path: Path) -> None:
    net, x = loaded(tmp_path, CNN), random(3, 2, 6, 6, seed=5)
    np.testing.assert_allclose(
        net(torch.tensor(x)).numpy(),
        ReferenceEvaluator(CNN).run(None, {"x": x})[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_graph_is_taken_from_the_file_without_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = loaded(tmp_path, CNN)
    monkeypatch.setattr(torch.export, "export", None)
    x = torch.rand(3, 2, 6, 6)
    graph = capture(calipers.Classifier(net), x)
    # batch norm is merged
    assert [type(n.op).__name__ for n in graph.nodes] == [
        "Conv",
        "TwoPieces",
        "MaxPool",
        "Generic",
        "Linear",
    ]
    assert torch.allclose(graph.values(x.double())[-1], net.double()(x.double()), atol=1e-12)


def test_a_network_that_lies_about_its_graph_is_caught(tmp_path: Path) -> None:
    class Liar(OnnxNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1e-6

    honest = loaded(tmp_path, CNN)
    liar = Liar(
        honest.program, {name: honest.get_buffer(buffer) for name, buffer in honest.names.items()}
    )
    with pytest.raises(CaptureError, match="disagree"):
        capture(calipers.Classifier(liar), torch.rand(2, 2, 6, 6))


def test_standardised_inputs_and_single_outputs_are_captured_too(tmp_path: Path) -> None:
    proto = model([helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"]), helper.make_node("Gemm", ["r", "v"], ["y"])],
                  ("n", 4), {"w": W, "v": random(6, 1)})  # fmt: skip
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    classifier = load(str(tmp_path / "net.onnx"), mean=[0.5], std=[2.0])
    x = torch.rand(3, 4)
    assert classifier.check(x).shape == (3, 2)
    assert torch.allclose(
        graph_of(classifier, x).values(x.double())[-1], classifier.logits64(x), atol=1e-12
    )


def test_weights_convert_and_count_for_the_identity(tmp_path: Path) -> None:
    net = loaded(tmp_path, CNN)
    digest, x = calipers.Classifier(net).digest(), torch.rand(2, 2, 6, 6, requires_grad=True)
    assert (
        net(x).dtype == torch.float32
        and copy.deepcopy(net).double()(x.double()).dtype == torch.float64
    )
    assert bool(torch.autograd.grad(net(x).sum(), x)[0].abs().sum() > 0)
    before = net(x).detach()
    with torch.no_grad():
        net.get_buffer(net.names["wb"]).add_(1)
    assert torch.allclose(net(x), before + 1), "a changed weight must change the answer"
    assert calipers.Classifier(net).digest() != digest
    other = copy.deepcopy(CNN)
    other.graph.node[3].op_type = "AveragePool"
    assert calipers.Classifier(loaded(tmp_path, other)).digest() != digest, (
        "the same weights in other operations are another network"
    )


def test_both_jaws_close_on_a_linear_file(tmp_path: Path) -> None:
    net = loaded(
        tmp_path, model([helper.make_node("Gemm", ["x", "w"], ["y"])], ("n", 4), {"w": W[:, :2]})
    )
    x = torch.full((1, 4), 0.5)
    y = net(x).argmax(1)
    slope = torch.tensor(W[:, 0] - W[:, 1])
    exact = float((x @ slope).abs() / slope.abs().sum())
    for radius, broken in ((0.999 * exact, False), (1.001 * exact, True)):
        threat = calipers.Ball("linf", radius)
        assert bool(calipers.attack(net, x, y, threat, calipers.attacks.PGD()).success[0]) is broken
        assert (
            bool(calipers.certify(net, x, y, threat, calipers.certificates.CROWN()).certified[0])
            is not broken
        )


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("unknown", one("Det", (1, 3, 3)), UnsupportedOp, "Det at net.onnx, node 0"),
    (
        "custom domain",
        model([helper.make_node("Relu", ["x"], ["y"], domain="mine")], (1, 3)),
        UnsupportedOp,
        "domain mine",
    ),
    (
        "weights that depend on the point",
        model([helper.make_node("Conv", ["x", "x"], ["y"])], IMAGE),
        UnsupportedOp,
        "kernel depends",
    ),
    (
        "indices that depend on the point",
        model([helper.make_node("Gather", ["c", "x"], ["y"])], (1, 3), {"c": random(5)}),
        BadModel,
        "indices",
    ),
    (
        "mixed batch",
        model([helper.make_node("ReduceSum", ["x", "a"], ["y"])], ("n", 3), {"a": ints(0)}),
        CaptureError,
        "batch",
    ),
    ("softmax over the batch", one("Softmax", ("n", 3), axis=0), UnsupportedOp, "axis 0"),
    (
        "joined batch",
        model([helper.make_node("Concat", ["x", "x"], ["y"], axis=0)], ("n", 3)),
        CaptureError,
        "batch",
    ),
    (
        "training",
        one("BatchNormalization", (1, 2), {n: random(2) for n in "sbmv"}, training_mode=1),
        BadModel,
        "Training",
    ),
    (
        "no input",
        model([helper.make_node("Identity", ["c"], ["y"])], (1, 3), {"c": random(3)}),
        CaptureError,
        "does not depend",
    ),
    ("free image", one("Relu", ("n", 3, "h", "w")), BadInput, "only the first axis"),
    ("missing value", model([helper.make_node("Add", ["x", "z"], ["y"])], (1, 3)), BadModel, "'z'"),
    ("wrong sizes", one("MatMul", (1, 5), {"w": W}), BadModel, "MatMul"),
    ("fixed batch", one("Reshape", (1, 6), {"s": ints(8, 6)}), UnsupportedOp, "fixed batch"),
]


@pytest.mark.parametrize(("name", "proto", "kind", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_cannot_be_read_is_refused_by_name(
    name: str, proto: Any, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        loaded(tmp_path, proto)


@pytest.mark.parametrize(
    "content", [b"", b"not a network", CNN.SerializeToString()[:200]], ids=["empty", "text", "cut"]
)
@pytest.mark.parametrize("name", ["net.onnx", "net.onnx.gz"])
def test_a_damaged_file_is_bad_input(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=r"net\.onnx"):
        load_onnx(tmp_path / name)


def test_truncated_files_are_refused_or_complete(tmp_path: Path) -> None:
    whole = CNN.SerializeToString()
    for size in range(0, len(whole), 97):
        (tmp_path / "net.onnx").write_bytes(whole[:size])
        with pytest.raises((BadInput, UnsupportedOp, CaptureError)):
            load_onnx(tmp_path / "net.onnx")


def test_without_onnx_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(CNN.SerializeToString())
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BadInput, match=r"pip install 'calipers\[onnx\]'"):
        load(str(tmp_path / "net.onnx"))


def test_a_packed_file_is_the_same_network(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(CNN.SerializeToString())
    (tmp_path / "net.onnx.gz").write_bytes(gzip.compress(CNN.SerializeToString()))
    plain, packed = (
        calipers.Classifier(load_onnx(tmp_path / name)).digest()
        for name in ("net.onnx", "net.onnx.gz")
    )
    assert plain == packed


MUTANTS: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    (
        "Conv, uneven",
        lambda patch: patch.setattr(
            "calipers.graph.onnx.windows._windows", lambda *_: ([1, 1], [1, 1], [0, 1], [0, 1])
        ),
    ),
    (
        "Gemm",
        lambda patch: patch.setitem(
            OPS, "Gemm", lambda tape, step, a, b, c: OPS["MatMul"](tape, step, a, b.T)
        ),
    ),
    (
        "Add",
        lambda patch: patch.setattr(
            "calipers.graph.file_builder.fitted",
            lambda c, v: c.expand(v.shape).flip(-3).reshape(1, *v.held),
        ),
    ),
    ("Transpose", lambda patch: patch.setattr(Tape, "view", lambda self, v, shape: v)),
]


@pytest.mark.parametrize(("name", "spoil"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_wrong_reader_is_caught(
    name: str,
    spoil: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch)
    if name == "Transpose":  # read as if nothing moved
        monkeypatch.setitem(OPS, "Transpose", lambda tape, step, v: v)
    with pytest.raises((AssertionError, BadModel, UnsupportedOp)):
        agree(tmp_path, CASES[name])


@needs(DATA / "vnncomp")
@pytest.mark.parametrize(
    "path", NETS, ids=lambda p: p.name.removesuffix(".gz").removesuffix(".onnx")
)
def test_the_competition_s_networks_are_what_onnxruntime_runs(path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net = load_onnx(path)
    session = runtime.InferenceSession(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    )
    name = session.get_inputs()[0].name
    x = random(5, *net.program.point_shape)
    expected = np.stack(
        [session.run(None, {name: p.reshape(net.program.input_shape)})[0].reshape(-1) for p in x]
    )
    np.testing.assert_allclose(
        net(torch.tensor(x)).numpy(),
        expected,
        rtol=1e-4,
        atol=1e-5 * max(1.0, float(np.abs(expected).max())),
    )


def test_a_module_exported_by_torch_comes_back(tmp_path: Path) -> None:
    pytest.importorskip(
        "onnxscript", reason="torch's exporter needs onnxscript, which is not installed"
    )
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    ).eval()
    torch.onnx.export(
        module,
        (torch.rand(2, 1, 6, 6),),
        tmp_path / "net.onnx",
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    x = torch.rand(3, 1, 6, 6)
    assert torch.allclose(load_onnx(tmp_path / "net.onnx")(x), module(x), atol=1e-6)
