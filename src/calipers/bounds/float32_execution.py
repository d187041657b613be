"""Allowances for how float32 execution departs from real arithmetic.

A certificate about real arithmetic may be wrong about the network as it runs (Jia and Rinard 2021,
arXiv:2003.03021; Zombori et al. 2021): the order of a sum, the batch size or the library decides
then. Here each operation may depart from its real value *at the numbers it was given* by

    gamma_n (|W| |x| + |b|),  gamma_n = n u / (1 - n u),

for affine ones, n the terms of its longest sum (Higham, Accuracy and Stability, ch. 3), and by a
few units in the last place for elementwise ones; the input departs from the region by its own
rounding. Departures enter as new numbers: boxes are wider by them, and backward bound propagation
subtracts <|A|, departure>. So a bound holds for any order of summation, any blocking, fused or not.
The layers are taken as they run, none merged: what overflows or underflows between two of them
counts. Numbers below the normal ones may be kept or flushed to 0.

It does not hold for Winograd and FFT convolution, TF32 and bfloat16 products. What is executed
otherwise than the graph writes it (softmax, layer norm, products of two numbers) is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calipers.bounds.interval import Box, terms
from calipers.bounds.rounding import Arithmetic
from calipers.errors import BadInput
from calipers.graph.ir import Graph
from calipers.graph.kinds import Affine, Elementwise, Op, is_affine, is_elementwise
from calipers.problem.problem import Problem

# roundings of one layer besides its sum: the bias, and a scaling after it whose factor has four
# roundings
_OWN = 8
_MERGED = 24  # more, where several scalings were merged into a layer, each with its own constants
# error of a function of one number, in half units in the last place, with the steps of which
# libraries compose it
_CURVE = 32
_LOST = 1 + 1e-6  # in smallest normal numbers: what a result, or an operand read, may lose
_SPARE = 1 + 1e-6  # for the allowance's own evaluation in float64
_LARGEST_WEIGHT = 2.0**125  # the reciprocal of a larger one is no normal number
# largest intermediate value of a function, in sums of argument and value (x * 6 / 6 has one of 6)
_STEPS = 16
_INTERPOLATED = 8  # roundings of an interpolated position, for each of its axes


def departure(op: Op, inputs: list[Box], arithmetic: Arithmetic) -> Tensor:
    """Return how far an executed result can be from the real one, (N, *out).

    At the same inputs, anywhere in their boxes; infinite where the execution may overflow.

    Results below the normal numbers may lose everything, and so may inputs and weights that are
    read: some processors and settings flush them to 0. Cost: one more product with |W|.
    """
    dtype = _executed(arithmetic)
    if is_affine(op):
        return _of_affine(op, inputs, dtype)
    if op.executed_exactly:
        return torch.full_like(
            op.value(*(b.lower for b in inputs)), _LOST * torch.finfo(dtype).tiny
        )
    assert is_elementwise(op), "what is not executed as written is refused at the door"
    return _of_function(op, inputs[0], dtype)


def input_departure(box: Box, arithmetic: Arithmetic) -> Tensor:
    """Return how far an input moves by rounding to float32, (N, *D)."""
    dtype = _executed(arithmetic)
    return _guarded(
        _gamma(1, dtype) * box.magnitude + _LOST * torch.finfo(dtype).tiny, box.magnitude, dtype
    )


def widened(box: Box, room: Tensor) -> Box:
    """Return the box of executed values, from that of real ones."""
    lower, upper = box.lower - room, box.upper + room
    everything = torch.full_like(lower, torch.inf)
    return Box(torch.nextafter(lower, -everything), torch.nextafter(upper, everything))


def _executed(arithmetic: Arithmetic) -> torch.dtype:
    assert arithmetic.executed is not None
    return arithmetic.executed


def _gamma(count: int, dtype: torch.dtype) -> float:
    n = count * torch.finfo(dtype).eps / 2
    return _SPARE * n / (1 - n) if n < 0.5 else torch.inf


def _guarded(room: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the allowance, infinite where execution may overflow.

    `largest` bounds every intermediate value.
    """
    return torch.where(largest * 2 < torch.finfo(dtype).max, room, torch.inf)


def _of_affine(op: Affine, inputs: list[Box], dtype: torch.dtype) -> Tensor:
    tiny = _LOST * torch.finfo(dtype).tiny
    if not op.rounds:
        return torch.zeros_like(inputs[0].lower).reshape(
            len(inputs[0].lower), *op.value(*(b.lower[:1] for b in inputs)).shape[1:]
        )
    size = terms(op, inputs)
    own = _OWN + (_MERGED if op.constant_terms is not None else 0)
    count = own + op.longest_sum([tuple(b.lower.shape[1:]) for b in inputs])
    # the sum of each output's absolute weights
    weights = op.absolute(*(torch.ones_like(b.lower[:1]) for b in inputs))
    total = (
        torch.stack([b.magnitude.flatten(1).sum(1) for b in inputs])
        .sum(0)
        .view(-1, *[1] * (size.dim() - 1))
    )
    # Underflow: of each term as it is formed, of each input (times its weight), and of each weight
    # (times its input).
    room = _gamma(count, dtype) * size + tiny * (count + weights + total)
    largest = torch.where(weights < _LARGEST_WEIGHT, size, torch.inf)
    if op.sums_first:
        room = room + _INTERPOLATED * _gamma(count, dtype) * total * op.weighs_places
        largest = torch.maximum(largest, total.expand_as(size))
    if (detour := op.detour) is not None:
        before = inputs[0].magnitude + detour[1] + 1
        room = room + tiny * count * detour[0] * before
        largest = torch.maximum(largest, detour[0] * before)
    return _guarded(room, largest, dtype)


def _of_function(op: Elementwise, box: Box, dtype: torch.dtype) -> Tensor:
    """Return the departure of a function of one number.

    It errs by units in the last place of the argument, the value, or of what it subtracts on the
    way: 1, or the value that it tends to on the left (exp(x) - 1).
    """
    tiny = _LOST * torch.finfo(dtype).tiny
    value = Box(*op.range(box.lower, box.upper)).magnitude
    limit = (
        op.value(torch.full_like(box.lower.flatten()[:1], -torch.inf))
        .abs()
        .nan_to_num(nan=0.0, posinf=0.0)
    )
    size = value + box.magnitude + limit + 1
    largest = (
        _STEPS * size + op.gate * box.magnitude if _held(op) else torch.full_like(size, torch.inf)
    )
    return _guarded(
        _gamma(_CURVE, dtype) * size + op.jump + _CURVE * tiny + _near_zero(op, box, tiny),
        largest,
        dtype,
    )


def _near_zero(op: Elementwise, box: Box, tiny: float) -> Tensor:
    """Return the change when an argument below the normal ones becomes 0.

    Large for a root, infinite for a logarithm.
    """
    at = op.value(
        torch.tensor([0.0, 2 * tiny, -2 * tiny], dtype=box.lower.dtype, device=box.lower.device)
    )
    change = (
        (at[1:] - at[0]).abs().nan_to_num(nan=0.0).amax()
        if bool(at[0].isfinite())
        else at.new_tensor(torch.inf)
    )
    return torch.where((box.lower < tiny) & (box.upper > -tiny), change, 0.0)


def _held(op: Elementwise) -> bool:
    """Return whether the function's parameters are safe in float32.

    Each is 0, or far from overflow and underflow.
    """
    return all(n == 0 or 1 / _LARGEST_WEIGHT < abs(n) < _LARGEST_WEIGHT for n in op.parameters)


def check_executed(problem: Problem, graph: Graph, arithmetic: Arithmetic) -> None:
    """Raise `BadInput` if nothing can be proved about the execution."""
    dtype = arithmetic.executed
    if dtype is None:
        return
    reason = (
        _another_dtype(problem, dtype)
        or _computed_constants(problem, graph, dtype)
        or _unlike_the_graph(graph)
        or _computed_margins(problem)
    )
    if reason:
        raise BadInput(
            f"the guarantee {arithmetic.guarantee} cannot be given: {reason}. Ask for "
            "float64-checked, which speaks about real arithmetic."
        )


def _another_dtype(problem: Problem, dtype: torch.dtype) -> str:
    """Return a complaint if a parameter, buffer or point has another dtype."""
    classifier = problem.classifier
    kinds = {
        t.dtype
        for t in [*classifier.module.parameters(), *classifier.module.buffers()]
        if t.is_floating_point()
    } | {classifier.dtype, problem.x.dtype}
    return (
        ""
        if kinds == {dtype}
        else f"the model or the points are in {', '.join(sorted(str(k) for k in kinds))}, not in "
        f"{dtype} throughout"
    )


def _computed_constants(problem: Problem, graph: Graph, dtype: torch.dtype) -> str:
    """Return a complaint about weights that the model computes, if any.

    A weight that the model computes is rounded in a way that the graph, in which it is a constant,
    does not show.
    """
    for name, module in problem.classifier.module.named_modules():
        if nn.utils.parametrize.is_parametrized(module) or module._forward_pre_hooks:
            return (
                f"weights of {name or 'the model'} are computed anew in every pass (a "
                "parametrization or a hook); remove it and keep the weights"
            )
    if graph.computed:
        return (
            f"a constant is computed by the model at {graph.computed}; keep the result as a buffer"
        )
    for node in graph.nodes:
        held = node.op.held if is_affine(node.op) else ()
        if any(not torch.equal(t.to(dtype).to(t.dtype), t) for t in held):
            return (
                f"the weights at {node.where} are computed by the model; keep the result as a "
                "parameter"
            )
    return ""


def _unlike_the_graph(graph: Graph) -> str:
    """Return a complaint about operations not executed as written, if any."""
    odd = [n for n in graph.nodes if not n.op.executed_as_written]
    node = next((n for n in odd if not n.op.affine), odd[0] if odd else None)
    if node is None:
        return ""
    if node.op.affine:
        return (
            f"a variance or a resized image at {node.where} is executed in another way than it is "
            "written"
        )
    return (
        f"numbers are multiplied with each other or weighed at {node.where} (softmax, "
        "attention, layer norm), which libraries do in their own ways"
    )


def _computed_margins(problem: Problem) -> str:
    """Return a complaint about margins that are rounded, if any.

    The sign of a difference of two logits is executed exactly; other combinations are rounded.
    """
    rows = problem.goal.rows(problem.y[:1], problem.classes)
    plain = bool(((rows.abs() == 1) | (rows == 0)).all()) and int((rows != 0).sum(-1).max()) <= 2
    shifted = bool(problem.goal.offsets(problem.y[:1], problem.classes).any())
    return "" if plain and not shifted else "margins are not plain differences of two logits"
