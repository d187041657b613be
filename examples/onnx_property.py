"""Verify an ONNX network against a VNN-LIB property, and keep the proof.

    python onnx_property.py

The network and the property are written by this script.
"""

import sys

try:
    import onnx
except ImportError as error:
    sys.exit(f"skipped: {error}; pip install 'calipers[onnx]'")
from pathlib import Path

import numpy as np
from onnx import helper, numpy_helper

import calipers
from calipers.record.checker import prove

weights = {"W": [[1.0, -1.0], [1.0, 1.0]], "V": [[1.0], [1.0]]}  # y = relu(x0 + x1) + relu(x1 - x0)
nodes = [
    helper.make_node("MatMul", ["x", "W"], ["h"]),
    helper.make_node("Relu", ["h"], ["r"]),
    helper.make_node("MatMul", ["r", "V"], ["y"]),
]
held = [numpy_helper.from_array(np.array(v, np.float32), name) for name, v in weights.items()]
ends = [helper.make_tensor_value_info(name, 1, [1, n]) for name, n in (("x", 2), ("y", 1))]
graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], held)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), "net.onnx")

box = "".join(
    f"(declare-const X_{i} Real)(assert (>= X_{i} -1))(assert (<= X_{i} 1))" for i in (0, 1)
)
for limit in (1.5, 2.5):
    unsafe = f"{box}(declare-const Y_0 Real)(assert (>= Y_0 {limit}))"
    Path("unsafe.vnnlib").write_text(unsafe)
    verdict = calipers.verify("net.onnx", "unsafe.vnnlib", proofs=True)
    print(f"can y reach {limit}? {verdict.answer}")
    if verdict.witness is not None:
        print(f"  at x = ({', '.join(verdict.witness.inputs)})")
    for proof in verdict.proofs:
        print(f"  proved again by the checker alone: {prove(proof).proved}")
