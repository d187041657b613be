"""Recurrent layers of torch, unrolled over the time steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calipers.graph.affine import Linear, Sum
from calipers.graph.kinds import Op
from calipers.graph.node_writer import NodeResult, Writer
from calipers.graph.parameters import require
from calipers.graph.rewrites import RELU
from calipers.graph.smooth_table import TANH

_LONGEST = 4096  # steps, each of which becomes four operations


class _Call(NamedTuple):
    """The arguments of torch's recurrent layers after the input, in order."""

    first: Any
    weights: list[Tensor]
    biased: bool
    layers: int
    dropout: float
    training: bool
    both_ways: bool
    batch_first: bool


def plain_recurrent(function: Op) -> Callable[..., list[NodeResult] | None]:
    """Return the rewrite of an Elman network exported for one point.

    h' = f(W x + b + U h + c). Results: all states of the last layer, and the last one of every
    layer.
    """

    def rewrite(w: Writer, x: NodeResult, *arguments: Any) -> list[NodeResult] | None:
        call = _Call(*arguments)
        layers, ways, first = call.layers, 2 if call.both_ways else 1, call.first
        if w.lead != 1 or len(x.shape) != 3 or not isinstance(first, Tensor) or call.training:
            return None
        axis = 1 if call.batch_first else 0
        times, last = x.shape[axis], []
        require(
            times * ways * layers <= _LONGEST,
            "a recurrent layer",
            f"a sequence of at most {_LONGEST} steps",
            steps=times * ways * layers,
        )
        each = 4 if call.biased else 2
        row = [w.reshape(part, part.shape[-1:]) for part in _split(w, x, axis)]
        for layer in range(layers):
            states: list[dict[int, NodeResult]] = []
            for way in range(ways):
                k = layer * ways + way
                weights = call.weights[each * k : each * (k + 1)]
                made = _one_way(w, function, row, first[k].reshape(-1), weights, backwards=way == 1)
                states.append(made)
                last.append(made[0 if way else times - 1])
            row = [
                states[0][t] if ways == 1 else w.move("cat", _joined, *(made[t] for made in states))
                for t in range(times)
            ]
        shape = (1, times, *row[0].shape) if call.batch_first else (times, 1, *row[0].shape)
        return [
            w.reshape(w.move("stack", _stacked, *row), shape),
            w.reshape(w.move("stack", _stacked, *last), (len(last), 1, *last[0].shape)),
        ]

    return rewrite


def _one_way(
    w: Writer,
    f: Op,
    row: list[NodeResult],
    first: Tensor,
    weights: list[Tensor],
    *,
    backwards: bool,
) -> dict[int, NodeResult]:
    """Return the state at each time."""
    own, recurrent, *biases = weights
    bias = sum(biases[1:], biases[0]) if biases else None
    sizes = sum((b.abs() for b in biases[1:]), biases[0].abs()) if biases else None
    state: NodeResult | None = None
    states = {}
    for t in range(len(row))[:: -1 if backwards else 1]:
        if state is None:
            shift, terms = recurrent @ first, recurrent.abs() @ first.abs()
            if bias is not None and sizes is not None:
                shift, terms = shift + bias, terms + sizes
            made = w.write(Linear(own, shift, terms), row[t])
        else:
            made = w.write(
                Sum((1.0, 1.0)),
                w.write(Linear(own, bias, sizes), row[t]),
                w.write(Linear(recurrent, None), state),
            )
        state = states[t] = w.write(f, made)
    return states


def _split(w: Writer, x: NodeResult, axis: int) -> list[NodeResult]:
    def at(t: int) -> Callable[[Tensor], Tensor]:
        return lambda v: v.narrow(axis + 1, t, 1)

    return [w.move("narrow", at(t), x) for t in range(x.shape[axis])]


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def _stacked(*parts: Tensor) -> Tensor:
    return torch.stack(parts, 1)


RECURRENT: dict[str, Callable[..., list[NodeResult] | None]] = {
    "aten.rnn_tanh.input": plain_recurrent(TANH),
    "aten.rnn_relu.input": plain_recurrent(RELU),
}
"""Rewrites by exported name, as `rewrites.REWRITES`; each gives a list."""
