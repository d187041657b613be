"""Independent execution of an ONNX file.

By onnxruntime where it is installed and knows the operations, else by ONNX's reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calipers.errors import BadModel, first_line

Run = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(eq=False)
class Execution:
    """Runs the network of a file by a program independent of this package.

    That program shares nothing with the code here that reads the file. It gets the bytes `data`,
    and points one at a time. It is started by the first call; copies of a network share it.
    """

    data: bytes = field(repr=False)
    source: str
    input: str
    output: str
    dtype: np.dtype[Any]
    again: Callable[[], nn.Module] = field(repr=False)
    _run: Run | None = field(default=None, repr=False)

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Return the outputs (M, K) of inputs (M, *shape).

        The shape is that of the file, with 1 for its batch. Raises `BadModel` where no program can
        run it.
        """
        points = x.astype(self.dtype)
        if self._run is None:
            self._run = self._started(points[0])
        return np.stack([self._run(point).reshape(-1) for point in points]).astype(np.float64)

    def in_double(self) -> Execution | None:
        """Return the same file with double precision inside its layers.

        By the standard some layers, such as `GroupNormalization` from operator set 21 on, compute
        in their `stash_type`, single precision unless told otherwise, in files of double precision
        too. None where the file has no such layer, or is not in double precision.
        """
        import onnx

        if self.dtype != np.float64:
            return None
        model = onnx.load_model_from_string(self.data)
        versions = {entry.domain: entry.version for entry in model.opset_import}
        inside = [
            node
            for node in model.graph.node
            if onnx.defs.has(node.op_type, node.domain)
            and "stash_type"
            in onnx.defs.get_schema(
                node.op_type, versions.get(node.domain, 1), node.domain
            ).attributes
        ]
        for node in inside:
            kept = [a for a in node.attribute if a.name != "stash_type"]
            del node.attribute[:]
            double = onnx.helper.make_attribute("stash_type", onnx.TensorProto.DOUBLE)
            node.attribute.extend([*kept, double])
        data = model.SerializeToString()
        return replace(self, data=data, _run=None) if inside else None

    def edited(self, net: nn.Module) -> bool:
        """Return whether the network's weights were changed since it was read.

        Then it is no longer the network of the file.
        """
        now, then = net.state_dict(), self.again().state_dict()
        return now.keys() != then.keys() or any(
            not torch.equal(now[name].cpu(), then[name].to(now[name].dtype)) for name in then
        )

    def __deepcopy__(self, memo: object) -> Execution:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def _started(self, point: NDArray[Any]) -> Run:
        """Return the first program that runs a point, or raise `BadModel`."""
        reasons = []
        for make in (self._by_onnxruntime, self._by_the_reference):
            try:
                run = make()
                with np.errstate(all="ignore"):
                    run(point)
            except Exception as error:  # it may raise anything: the next one is tried
                reasons.append(
                    f"{make.__name__.removeprefix('_by_').replace('_', ' ')}: {first_line(error)}"
                )
            else:
                return run
        raise BadModel(
            f"{self.source}: no independent program runs this file, so the reading of it cannot be "
            f"compared with anything, and nothing is claimed ({'; '.join(reasons)}). Installing "
            "onnxruntime may help."
        )

    def _by_onnxruntime(self) -> Run:
        """Return a run by onnxruntime: one thread, no graph optimisations."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # every operation runs as the file has it
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            self.data, options, providers=["CPUExecutionProvider"]
        )
        return lambda point: np.asarray(session.run([self.output], {self.input: point})[0])

    def _by_the_reference(self) -> Run:
        """Return a run by ONNX's reference evaluator."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        evaluator: Any = ReferenceEvaluator(onnx.load_model_from_string(self.data))

        def run(point: NDArray[Any]) -> NDArray[Any]:
            with np.errstate(all="ignore"):
                return np.asarray(evaluator.run([self.output], {self.input: point})[0])

        return run
