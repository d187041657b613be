"""Translation of an exported call into nodes of a graph.

A call becomes one operation with facts of its own, or several operations. The same code serves
programs of torch and networks read from files.

To add an operation, state its facts in a class (`graph/kinds.py`) and enter its builder under its
exported name: `COMPOSITIONS["aten.hypot.default"] = lambda w, x, y: w.write(Hypot(),
*w.broadcast(x, y))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calipers.errors import CaptureError
from calipers.graph.activations import ACTIVATIONS
from calipers.graph.affine import AFFINE, SHAPES, Call
from calipers.graph.calls import has_parameters_for, leaves, with_absolute_constants
from calipers.graph.compositions import COMPOSITIONS
from calipers.graph.kinds import Op, Shape
from calipers.graph.node_writer import NodeResult, Writer
from calipers.graph.products import SELECTIONS

WHOLE = frozenset(
    "aten.conv1d.default aten.conv2d.default aten.conv3d.default aten.batch_norm.default "
    "aten._native_batch_norm_legit_no_training.default aten.max_pool1d.default "
    "aten.max_pool2d.default aten.max_pool3d.default aten.group_norm.default "
    "aten.instance_norm.default aten.prelu.default".split()
)
"""Operations that treat the first axis as the batch."""

USES_BATCH_SIZE = (
    "the model computes with the batch size at {}: its answer for one point would depend on "
    "the others. Process points independently."
)


class BatchSize:
    """A placeholder for the batch size among the arguments of a call.

    It is replaced by the actual size at each call.
    """


@dataclass(frozen=True)
class Asked:
    """A call whose result depends on the input point.

    `args` hold a `Result` for each result of the graph, and constants as they are; `shape` is the
    shape of the call's result for one point.

    `keywords` are all keyword-only options that change the result, `chosen` those that the call
    sets, and `unusual` says whether one of these differs from its default.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    shape: Shape
    keywords: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    unusual: bool = False

    @property
    def variable(self) -> list[NodeResult]:
        """Return the results of the graph among the arguments."""
        return [a for a in leaves(self.args) if isinstance(a, NodeResult)]

    @property
    def sized(self) -> bool:
        """Return whether the batch size is among the arguments."""
        return any(isinstance(a, BatchSize) for a in leaves(self.args))


def build(w: Writer, asked: Asked) -> Any:
    """Write a call as nodes and return its result, or None.

    None where the operation is unknown, or not known with these arguments.
    """
    op = _operation(w, asked)
    if op is not None:
        return w.write(op, *asked.variable)
    several = COMPOSITIONS.get(asked.name)
    if several is None or asked.sized or not has_parameters_for(several, asked.args, asked.chosen):
        return None
    return several(w, *asked.args, **asked.chosen)


def _operation(w: Writer, asked: Asked) -> Op | None:
    name, args = asked.name, asked.args
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]((*args, *asked.keywords.values()))
    if name in SELECTIONS:
        return SELECTIONS[name](args, args[0].shape, asked.shape) if not w.lead else None
    if name not in AFFINE or asked.unusual or (w.lead and name in WHOLE):
        return None
    if name not in SHAPES and asked.sized:
        raise CaptureError(USES_BATCH_SIZE.format(w.where))
    return AFFINE[name](_call(w, asked))


def _call(w: Writer, asked: Asked) -> Call:
    name, args = asked.name, asked.args
    run, absolute = (bind(w, asked.target, a) for a in (args, with_absolute_constants(args)))
    places = tuple(i for i, a in enumerate(args) if isinstance(a, NodeResult))
    shapes = tuple(v.shape for v in asked.variable)
    return Call(name, run, args, places, shapes, asked.shape, w.dtype, w.device, absolute)


def bind(w: Writer, target: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """Return an operation as a function of the results in its arguments.

    The function takes one batch per result; constants are converted to the dtype of the batches.
    """

    def run(*tensors: Tensor) -> Any:
        left, dtype = iter(tensors), tensors[0].dtype

        def fill(a: Any) -> Any:
            if isinstance(a, (list, tuple)):
                return [fill(item) for item in a]
            if isinstance(a, Tensor):
                return a.to(dtype) if a.is_floating_point() else a
            if isinstance(a, BatchSize):
                return len(tensors[0])
            return next(left) if isinstance(a, NodeResult) else a

        return target(*[fill(a) for a in args])

    return torch.vmap(run) if w.lead else run
