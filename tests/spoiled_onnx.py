"""ONNX files that were spoiled, and what becomes of a file: is it read as the reference runs it, or refused in one sentence?"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from odd_onnx import Rng, generated, ints, numbers, pick, proto
from onnx import AttributeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from calipers.errors import CalipersError
from calipers.interchange import load_onnx
from calipers.models.classifier import Classifier
from calipers.problem.agreement import confirm
from calipers.threats.ball import Ball


def small_net(rng: Rng) -> onnx.ModelProto:
    """Return a perceptron or a small convolutional network."""
    if rng.random() < 0.5:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", "v"], ["z"]),
                 helper.make_node("Reshape", ["z", "s"], ["y"])]  # fmt: skip
        return proto(
            nodes,
            (1, 4),
            {
                "w": numbers(rng, 4, 5),
                "b": numbers(rng, 5),
                "v": numbers(rng, 5, 2),
                "s": ints(1, 2),
            },
            13,
            "y",
        )
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]), helper.make_node("Relu", ["c"], ["r"]),
             helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]), helper.make_node("Flatten", ["p"], ["f"]),
             helper.make_node("Gemm", ["f", "v"], ["y"], transB=1)]  # fmt: skip
    return proto(
        nodes, ("n", 2, 6, 6), {"w": numbers(rng, 3, 2, 3, 3), "v": numbers(rng, 3, 12)}, 17, "y"
    )


def spoiled(rng: Rng) -> bytes:
    """Return a file in which something was changed: bytes, or what the file says."""
    model = small_net(rng) if rng.random() < 0.5 else generated(rng)
    if rng.random() < 0.35:
        return _bytes(rng, model.SerializeToString())
    for _ in range(int(rng.integers(1, 3))):
        with suppress(ValueError, TypeError, KeyError):  # of a tensor that is spoiled already
            pick(
                rng,
                [
                    _attribute,
                    _attribute,
                    _inputs,
                    _dtype,
                    _sizes,
                    _sizes,
                    _order,
                    _opset,
                    _outputs,
                    _texts,
                ],
            )(rng, model)
    return model.SerializeToString()


def _bytes(rng: Rng, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(len(found)))
        way = pick(rng, ["flip", "flip", "cut", "drop", "twice", "big"])
        if way == "flip":
            found[place] ^= 1 << int(rng.integers(8))
        elif way == "cut":
            found = found[: place + 1]
        elif way == "drop":
            del found[place : place + int(rng.integers(1, 9))]
        elif way == "twice":
            found[place:place] = found[place : place + int(rng.integers(1, 40))]
        else:
            found[place] = pick(rng, [0, 255, 127, 128])
        if not found:
            found = bytearray(b"\0")
    return bytes(found)


def _attribute(rng: Rng, model: onnx.ModelProto) -> None:
    node = pick(rng, model.graph.node)
    if node.attribute and rng.random() < 0.6:
        a = pick(rng, node.attribute)
        a.i, a.f = pick(rng, [0, 1, -1, 3, 2**31, 2**62]), pick(rng, [0.0, -1.0, float("inf")])
        if a.type == AttributeProto.INTS:
            values = [
                pick(rng, [0, 1, -1, 2, 7, 100000, 2**40]) if rng.random() < 0.5 else v
                for v in a.ints
            ]
            del a.ints[:]
            a.ints.extend(values if rng.random() < 0.8 else values[1:])
        a.s = pick(rng, [b"", b"\xff", b"SAME_UPPER", b"edge"])
        return
    name = pick(
        rng,
        [
            "axis",
            "mode",
            "alpha",
            "axes",
            "keepdims",
            "pads",
            "auto_pad",
            "ceil_mode",
            "dilations",
            "training_mode",
            "to",
            "group",
        ],
    )
    node.attribute.append(
        helper.make_attribute(
            name, pick(rng, [0, 1, 2, 0.5, [1, 1], [2, 2], "SAME_LOWER", b"\xff\xfe"])
        )
    )


def _inputs(rng: Rng, model: onnx.ModelProto) -> None:
    node = pick(rng, model.graph.node)
    names = (
        [t.name for t in model.graph.initializer]
        + ["x", "", "nowhere"]
        + [n for other in model.graph.node for n in other.output]
    )
    if node.input and rng.random() < 0.5:
        place = int(rng.integers(len(node.input)))
        if rng.random() < 0.5:
            del node.input[place]
        else:
            node.input[place] = pick(rng, names)
    else:
        node.input.append(pick(rng, names))


def _dtype(rng: Rng, model: onnx.ModelProto) -> None:
    if not model.graph.initializer or rng.random() < 0.2:
        model.graph.input[0].type.tensor_type.elem_type = pick(rng, [1, 7, 10, 11, 0, 8, 99])
        return
    t = pick(rng, model.graph.initializer)
    if rng.random() < 0.5:
        t.data_type = pick(rng, [1, 2, 6, 7, 8, 9, 10, 11, 16, 17, 23, 99, 0])
    else:
        changed = numpy_helper.to_array(t).astype(
            pick(
                rng, [np.float64, np.float16, np.int32, np.int64, np.bool_, np.complex64, np.uint8]
            )
        )
        t.CopyFrom(numpy_helper.from_array(changed, t.name))


def _sizes(rng: Rng, model: onnx.ModelProto) -> None:
    huge = pick(rng, [0, -1, 3, 70000, 10**6, 10**10, 2**62])
    if rng.random() < 0.4 or not model.graph.initializer:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        if dims:
            pick(rng, dims).dim_value = huge
        return
    t = pick(rng, model.graph.initializer)
    if rng.random() < 0.5 and t.dims:
        t.dims[int(rng.integers(len(t.dims)))] = huge
        return
    values = numpy_helper.to_array(t)
    if values.dtype == np.int64 and values.size:
        flat = values.reshape(-1).copy()
        flat[int(rng.integers(flat.size))] = huge
        t.CopyFrom(numpy_helper.from_array(flat.reshape(values.shape), t.name))
    else:
        extra = [
            helper.make_node("Expand", [model.graph.node[0].input[0] or "x", "wide"], ["wider"])
        ]
        model.graph.initializer.append(
            numpy_helper.from_array(ints(pick(rng, [2, 70000]), huge, 1), "wide")
        )
        model.graph.node[0].input[0] = "wider"
        nodes = [*extra, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _order(rng: Rng, model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    changed = (
        [nodes[int(k)] for k in rng.permutation(len(nodes))]
        if rng.random() < 0.5
        else [*nodes, pick(rng, nodes)]
    )
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in changed]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _opset(rng: Rng, model: onnx.ModelProto) -> None:
    if rng.random() < 0.8:
        model.opset_import[0].version = pick(
            rng, [0, 1, 5, 7, 9, 11, 12, 13, 18, 21, 23, 28, 99, 2**40]
        )
    else:
        pick(rng, model.graph.node).domain = "elsewhere"


def _outputs(rng: Rng, model: onnx.ModelProto) -> None:
    way = rng.random()
    if way < 0.4:
        model.graph.output[0].name = pick(
            rng, ["x", "nowhere", *(n for node in model.graph.node for n in node.output)]
        )
    elif way < 0.7:
        pick(rng, model.graph.node).output.append(pick(rng, ["more", "x", ""]))
    else:
        model.graph.output.append(model.graph.output[0])


def _texts(rng: Rng, model: onnx.ModelProto) -> None:
    kinds = [
        "Relu",
        "If",
        "Loop",
        "",
        "Sum",
        "Mod",
        "Dropout",
        "SpaceToDepth",
        "RandomNormalLike",
        "Bernoulli",
        "Scan",
    ]
    pick(rng, model.graph.node).op_type = pick(rng, kinds)


# ---- judging what is read ----------------------------------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What became of a file: "equal", "refused", "caught" (read wrongly, and refused by the comparison), "needless" (read rightly, and refused by the
    comparison), "disputed" (read as onnxruntime runs it, not as the reference does), "untold" (neither runs it), or the faults "wrong" and "traceback"."""

    kind: str
    line: str


def case(seed: int, number: int) -> bytes:
    """Return the file of a number: made whole, or made and spoiled."""
    rng = np.random.default_rng([seed, number])
    return spoiled(rng) if number % 2 else generated(rng).SerializeToString()


def judged(data: bytes, path: Path, seed: int = 0) -> Judged:
    """Write the file, read it, and compare what is read with the reference on points of a box."""
    path.write_bytes(data)
    try:
        net = load_onnx(path, paired=True)
        shape = (
            3 if max(net.largest, math.prod(net.program.point_shape)) < 2**18 else 1,
            *net.program.point_shape,
        )
        x = torch.as_tensor(
            np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)
        ).to(net.get_buffer("anchor").dtype)
        own = net(x).detach()[:, -net.outputs :].double().numpy()
    except CalipersError as error:
        return Judged("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Judged("traceback", f"{type(error).__name__}: {error}")
    refused = ""
    try:
        confirm(Classifier(net), x, Ball("linf", 0.5))
    except CalipersError as error:
        refused = str(error)
    except Exception as error:
        return Judged("traceback", f"{type(error).__name__}: {error}")
    if "too little memory" in refused:  # the judges would need as much
        return Judged("refused", refused)
    points = x.numpy().reshape(-1, *net.program.input_shape)
    said, again = by_reference(data, points), by_onnxruntime(data, points)
    if isinstance(said, str) and isinstance(again, str):
        return Judged("refused" if refused else "untold", refused or said)
    right, disputed = (
        not isinstance(found, str) and near(own, found, halves(data)) for found in (said, again)
    )
    if right or (disputed and isinstance(said, str)):
        return Judged("needless" if refused else "equal", refused)
    if disputed and not refused:
        return Judged("disputed", f"{own.reshape(-1)[:4]} against {said.reshape(-1)[:4]}")  # type: ignore[union-attr]
    return Judged(
        "caught" if refused else "wrong",
        refused or f"{own.reshape(-1)[:4]} against {said} and {again}",
    )


def by_reference(data: bytes, x: np.ndarray) -> np.ndarray | str:
    """Return the outputs that ONNX's reference gives to points one at a time, or why it gives none."""
    try:
        model = onnx.load_model_from_string(data)
        x = x.astype(
            helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
        )
        reference, name = ReferenceEvaluator(model), model.graph.input[0].name
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.stack(
                [
                    np.asarray(reference.run(None, {name: p})[0], dtype=np.float64).reshape(-1)
                    for p in x
                ]
            )
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def by_onnxruntime(data: bytes, x: np.ndarray) -> np.ndarray | str:
    """Return the outputs that onnxruntime gives, or why it gives none."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        session = onnxruntime.InferenceSession(data, options)
        x = x.astype(
            {"tensor(double)": np.float64, "tensor(float16)": np.float16}.get(
                session.get_inputs()[0].type, np.float32
            )
        )
        return np.stack(
            [
                np.asarray(
                    session.run(None, {session.get_inputs()[0].name: p})[0], dtype=np.float64
                ).reshape(-1)
                for p in x
            ]
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def halves(data: bytes) -> bool:
    """Does the file hold numbers of half precision? They are read as float32."""
    graph = onnx.load_model_from_string(data).graph
    kinds = {graph.input[0].type.tensor_type.elem_type, *(t.data_type for t in graph.initializer)}
    return bool(kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


def near(own: np.ndarray, said: np.ndarray, half: bool = False) -> bool:
    """Are outputs the same but for rounding in float32, or in half precision?"""
    if own.shape != said.shape:
        return False
    finite, relative = said[np.isfinite(said)], 0.03 if half else 1e-3
    size = max(1e-3, float(np.abs(finite).max(initial=0.0)))
    return bool(np.allclose(own, said, rtol=relative, atol=relative / 10 * size, equal_nan=True))
