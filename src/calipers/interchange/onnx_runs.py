"""What does somebody else's program answer to an ONNX file? onnxruntime where it is installed and
knows the operations, else ONNX's reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calipers.errors import BadModel, first_line

Run = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(eq=False)
class Execution:
    """Runs the network of a file by a program that shares nothing with the reading of it: `data`
    in, points one at a time.

    The program is started by the first call. Copies of a network share it.
    """

    data: bytes = field(repr=False)
    source: str
    input: str
    output: str
    dtype: np.dtype[Any]
    again: Callable[[], nn.Module] = field(repr=False)
    _run: Run | None = field(default=None, repr=False)

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Return the outputs (M, K) of inputs (M, *shape), the shape that the file says, with 1 for
        its batch; raises `BadModel` where nobody can run it.
        """
        points = x.astype(self.dtype)
        if self._run is None:
            self._run = self._started(points[0])
        return np.stack([self._run(point).reshape(-1) for point in points]).astype(np.float64)

    def edited(self, net: nn.Module) -> bool:
        """Have weights of the network been changed since it was read? Then it is no longer that of
        the file.
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
        reasons = []
        for make in (self._by_onnxruntime, self._by_the_reference):
            try:
                run = make()
                with np.errstate(all="ignore"):
                    run(point)
            except Exception as error:  # whatever a foreign program raises: the next one is asked
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
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # each operation as it stands there
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            self.data, options, providers=["CPUExecutionProvider"]
        )
        return lambda point: np.asarray(session.run([self.output], {self.input: point})[0])

    def _by_the_reference(self) -> Run:
        import onnx
        from onnx.reference import ReferenceEvaluator

        evaluator: Any = ReferenceEvaluator(onnx.load_model_from_string(self.data))

        def run(point: NDArray[Any]) -> NDArray[Any]:
            with np.errstate(all="ignore"):
                return np.asarray(evaluator.run([self.output], {self.input: point})[0])

        return run
