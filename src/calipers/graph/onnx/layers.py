"""Readers of ONNX layers that consist of several operations.

Softmax, norms and recurrent layers, by the rewrites that captured modules use too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from calipers.graph.file_builder import FileResult, Tape, Value
from calipers.graph.onnx.shape_ops import not_along_the_batch, picked
from calipers.graph.onnx.steps import Step
from calipers.graph.rewrites import group_norm, layer_norm
from calipers.graph.smooth_table import GELU, TANH_GELU


def constant(value: Value | None, step: Step, what: str) -> Tensor:
    """Return the tensor, or raise `UnsupportedOp` with its name."""
    if not isinstance(value, Tensor):
        raise step.refuse(f"{what} depends on the point: only constant ones are read")
    return value


def _softmax(tape: Tape, step: Step, v: Value) -> Value:
    """Write softmax or its logarithm along an axis.

    Before operator set 13 it is taken along all axes from that one on.
    """
    last = step.opset >= 13
    axis = step.axis(step.get("axis", -1 if last else 1), len(v.shape))
    if not isinstance(v, FileResult):
        function = torch.log_softmax if step.kind == "LogSoftmax" else torch.softmax
        return function(v, axis) if last else function(v.flatten(axis), -1).reshape(v.shape)
    held = v.shape[1:] if v.shape[0] == 1 and len(v.shape) > 1 else v.shape
    if axis < len(v.shape) - len(held):
        raise step.refuse(f"{step.kind} along axis {axis} of shape {v.shape} is not read")
    if not last:
        held, axis = (math.prod(v.shape[:axis]), math.prod(v.shape[axis:])), len(v.shape) - 1
    made = tape.call(
        "aten.log_softmax.int" if step.kind == "LogSoftmax" else "aten.softmax.int",
        tape.view(v, held),
        axis - len(v.shape),
    )
    return FileResult(made.number, made.held, v.shape)


def _layer_norm(tape: Tape, step: Step, v: Value, scale: Value, bias: Value | None = None) -> Value:
    """Write layer normalisation over the axes from one on."""
    axis = step.axis(step.get("axis", -1), len(v.shape))
    if step.outputs > 1 or not isinstance(v, FileResult):
        raise step.refuse(
            "layer normalisation of a constant, or one that also returns mean or deviation, is "
            "not read"
        )
    if axis == 0:
        not_along_the_batch(step, v)
    shape = v.shape[axis:]
    weight, shift = (t if t is None else constant(t, step, "a factor") for t in (scale, bias))
    x = tape.view(v, v.shape[1:] if axis and v.shape[0] == 1 else v.shape)
    made = tape.alike(layer_norm, x, shape, weight, shift, step.get("epsilon", 1e-5))
    return FileResult(made.number, made.held, v.shape)


def _group_norm(tape: Tape, step: Step, v: Value, scale: Value, bias: Value) -> Value:
    """Write normalisation over the places of each channel or channel group.

    Factors are given for each channel, or for each group before operator set 21.
    """
    if not isinstance(v, FileResult) or len(v.shape) < 3 or v.shape[0] != 1:
        raise step.refuse(f"expects one image of shape (1, channels, ...), got {tuple(v.shape)}")
    groups = step.get("num_groups", v.shape[1])
    each = [constant(t, step, "a factor") for t in (scale, bias)]
    each = [
        t.repeat_interleave(v.shape[1] // groups) if t.numel() != v.shape[1] else t for t in each
    ]
    made = tape.alike(
        group_norm, tape.view(v, v.shape[1:]), groups, *each, step.get("epsilon", 1e-5)
    )
    return FileResult(made.number, made.held, v.shape)


def _gelu(tape: Tape, step: Step, v: Value) -> Value:
    approximate = step.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise step.refuse(f"the approximation {approximate!r} is not read")
    curve = TANH_GELU if approximate == "tanh" else GELU
    return (
        curve.value(v) if isinstance(v, Tensor) else tape.alike(lambda w, x: w.write(curve, x), v)
    )


class _Cell(NamedTuple):
    """A recurrent layer in one direction.

    It has weights (gates * n, features) and (gates * n, n), and a bias (gates * n,) for each.
    `merged`: a GRU's reset gate is applied after the recurrent weights. `functions`: those applied
    to the gates, in the operator set's order.
    """

    tape: Tape
    weight: Tensor
    recurrent: Tensor
    biases: tuple[Tensor, ...]
    merged: bool
    functions: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return the number of elements of the state."""
        return self.recurrent.shape[1]

    def gate(self, x: Value, h: Value, k: int) -> tuple[Value, Value]:
        """Return the input's and the state's contribution to gate k, each (n,)."""
        rows = slice(k * self.size, (k + 1) * self.size)
        return self._linear(x, self.weight[rows], self.biases[0][rows]), self._linear(
            h, self.recurrent[rows], self.biases[1][rows]
        )

    def _linear(self, v: Value, weight: Tensor, bias: Tensor) -> Value:
        if isinstance(v, Tensor):
            return functional.linear(v, weight, bias)
        return self.tape.call(
            "aten.linear.default", self.tape.view(v, weight.shape[1:]), weight, bias
        )

    def sum(self, x: Value, h: Value, k: int, function: int) -> Value:
        """Return function number `function` of gate k."""
        return self.applied(function, self.add(*self.gate(x, h, k)))

    def applied(self, function: int, v: Value) -> Value:
        """Return function number `function` of v."""
        return self.tape.elementwise(f"aten.{self.functions[function]}.default", v)

    def add(self, a: Value, b: Value, sign: str = "add") -> Value:
        """Return a + b, or a - b."""
        return self.tape.pair(f"aten.{sign}.Tensor", a, b)

    def times(self, a: Value, b: Value) -> Value:
        """Return a * b."""
        return self.tape.pair("aten.mul.Tensor", a, b)


State = tuple[Value, ...]
_LONGEST = 4096  # time steps, each of which becomes some twenty operations


def _plain(cell: _Cell, x: Value, state: State) -> State:
    """Return the new state f(W x + b + U h + c) of a plain recurrent layer."""
    return (cell.sum(x, state[0], 0, 0),)


def _gru(cell: _Cell, x: Value, state: State) -> State:
    """Return the new state (h - n) z + n of a GRU (Cho et al. 2014).

    Update gate z, reset gate r, candidate n.
    """
    h = state[0]
    z, r = cell.sum(x, h, 0, 0), cell.sum(x, h, 1, 0)
    seen, kept = cell.gate(x, h if cell.merged else cell.times(r, h), 2)
    n = cell.applied(1, cell.add(seen, cell.times(r, kept) if cell.merged else kept))
    return (cell.add(cell.times(cell.add(h, n, "sub"), z), n),)


def _lstm(cell: _Cell, x: Value, state: State) -> State:
    """Return the new state of an LSTM (Hochreiter and Schmidhuber 1997).

    c' = f c + i g, h' = o tanh(c'): input, output and forget gate, candidate.
    """
    h, c = state
    i, o, f = (cell.sum(x, h, k, 0) for k in (0, 1, 2))
    c = cell.add(cell.times(f, c), cell.times(i, cell.sum(x, h, 3, 1)))
    return cell.times(o, cell.applied(2, c)), c


_STEPS: dict[str, tuple[int, Callable[[_Cell, Value, State], State], list[str]]] = {
    "RNN": (1, _plain, ["Tanh"]),
    "GRU": (1, _gru, ["Sigmoid", "Tanh"]),
    "LSTM": (2, _lstm, ["Sigmoid", "Tanh", "Tanh"]),
}
"""Number of state tensors, the step, and the functions it uses."""

_FUNCTIONS = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu"}


def _recurrent(
    tape: Tape, step: Step, v: Value, weight: Value, recurrent: Value, *given: Value | None
) -> tuple[Value, ...]:
    """Write a recurrent layer, unrolled over the time steps.

    The results are all states (T, directions, 1, n), and the last ones.
    """
    count, one, functions = _STEPS[step.kind]
    bias, lengths, *initial = (*given, *[None] * 5)[: 2 + count]
    ways = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}[
        step.get("direction", "forward")
    ]
    # the operator sets list more Tanh than a plain recurrent layer uses
    asked = step.get("activations") if "activations" in step.attributes else functions * len(ways)
    odd = [name for name in ("clip", "layout", "input_forget") if step.get(name)]
    known = len(asked) == len(functions) * len(ways) and all(f in _FUNCTIONS for f in asked)
    odd += [] if known else [f"activations {', '.join(asked)}"]
    if odd or len(given) > 2 + count or not isinstance(v, FileResult) or v.shape[1] != 1:
        raise step.refuse(
            f"{step.kind} with {odd[0] if odd else 'peepholes or several sequences'} is not read"
        )
    if lengths is not None and bool((constant(lengths, step, "a length") != v.shape[0]).any()):
        raise step.refuse("sequences shorter than the input are not read")
    w, r = constant(weight, step, "a weight"), constant(recurrent, step, "a weight")
    b = w.new_zeros(len(w), 2 * w.shape[1]) if bias is None else constant(bias, step, "a bias")
    if len(w) != len(ways) or step.get("hidden_size", r.shape[-1]) != r.shape[-1]:
        raise step.damaged(
            f"weights of shape {tuple(w.shape)} and {tuple(r.shape)} do not fit {len(ways)} "
            f"directions of {step.get('hidden_size')} numbers"
        )
    if v.shape[0] * len(ways) > _LONGEST:
        raise step.refuse(
            f"a sequence of {v.shape[0]} steps is not written out: at most {_LONGEST // len(ways)}"
        )
    times, states, last = v.shape[0], {}, []
    for d, way in enumerate(ways):
        own = tuple(_FUNCTIONS[f] for f in asked[d * len(functions) : (d + 1) * len(functions)])
        merged = bool(step.get("linear_before_reset", 0))
        cell = _Cell(tape, w[d], r[d], b[d].chunk(2), merged, own)
        state: State = tuple(
            w.new_zeros(cell.size)
            if t is None
            else constant(t, step, "a first state")[d].reshape(-1)
            for t in initial
        )
        for t in range(times)[::way]:
            state = one(cell, picked(tape, step, v, 0, [t]), state)
            states[t, d] = state[0]
        last.append(state)
    every = _stacked(
        tape, [states[t, d] for t in range(times) for d in range(len(ways))], (times, len(ways), 1)
    )
    return every, *(
        _stacked(tape, [state[k] for state in last], (len(ways), 1)) for k in range(count)
    )


def _stacked(tape: Tape, values: list[Value], lead: tuple[int, ...]) -> FileResult:
    held = tuple(v for v in values if isinstance(v, FileResult))
    made = tape.moved("stack", held, lambda *inputs: torch.stack(inputs, 1))
    return FileResult(made.number, made.held, (*lead, held[0].held[0]))


LAYERS: dict[str, Callable[..., Any]] = {
    "Softmax": _softmax, "LogSoftmax": _softmax,
    "LayerNormalization": _layer_norm, "InstanceNormalization": _group_norm,
    "GroupNormalization": _group_norm, "Gelu": _gelu,
    "RNN": _recurrent, "GRU": _recurrent, "LSTM": _recurrent,
}  # fmt: skip
"""Readers by ONNX's names."""
