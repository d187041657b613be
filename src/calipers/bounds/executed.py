"""How far can a network, as its own precision executes it, depart from real arithmetic? An allowance for every operation, in whatever order it adds up.

A certificate about real arithmetic may be wrong about the network as it runs (Jia and Rinard 2021, arXiv:2003.03021; Zombori et al. 2021): the order of a
sum, the batch size or the library decides then. Here each operation may depart from its real value *at the numbers it was given* by

    gamma_n (|W| |x| + |b|),  gamma_n = n u / (1 - n u),

for affine ones, n the terms of its longest sum (Higham, Accuracy and Stability, ch. 3), and by a few units in the last place for elementwise ones; the
input departs from the region by its own rounding. Departures enter as new numbers: boxes are wider by them, and a backward sweep takes off
<|A|, departure>. So a bound holds for any order of summation, any blocking, fused or not, and with batch norm merged into its layer or not.

Where it does not hold: Winograd and FFT convolution, TF32 and bfloat16 products. What is executed otherwise than the graph writes it (softmax, layer norm,
products of two numbers) is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calipers.bounds.interval import Box, terms
from calipers.bounds.rounding import Arithmetic
from calipers.errors import BadInput
from calipers.graph.ir import Affine, Elementwise, Graph, Op, Selection
from calipers.problem.problem import Problem

_OWN = 8  # roundings of one layer besides its sum: the bias, and a scaling behind it with a factor of four roundings
_MERGED = 24  # more where several scalings were merged into a layer, each with constants of its own
_CURVE = 32  # half units in the last place by which a function of one number errs, and the steps that libraries make it of
_SPARE = 1 + 1e-6  # for the allowance's own evaluation in float64
_EXACT_SLOPES = {-1.0, 0.0, 1.0}


def departure(op: Op, inputs: list[Box], arithmetic: Arithmetic) -> Tensor:
    """Return (N, *out): how far the executed result can be from the real one at the same inputs, anywhere in their boxes; infinite where it may overflow.

    Cost: one more product with |W|.
    """
    dtype = _executed(arithmetic)
    if isinstance(op, Affine):
        if not getattr(op, "rounds", True):
            return torch.zeros_like(inputs[0].lower).reshape(len(inputs[0].lower), *op.value(*(b.lower[:1] for b in inputs)).shape[1:])
        count = _count(op, inputs)
        return _guarded(_gamma(count, dtype) * terms(op, inputs), terms(op, inputs), count, dtype)
    if isinstance(op, Selection):
        return torch.zeros_like(op.value(inputs[0].lower))
    assert isinstance(op, Elementwise), "products of two numbers are refused at the door"
    return _of_function(op, inputs[0], dtype)


def input_departure(box: Box, arithmetic: Arithmetic) -> Tensor:
    """Return how far an input moves when it is rounded to the network's precision, (N, *D)."""
    dtype = _executed(arithmetic)
    return _guarded(_gamma(1, dtype) * box.magnitude, box.magnitude, 1, dtype)


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


def _guarded(room: Tensor, size: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Add what underflow can take of each term (all of it, where results below the normal numbers become 0); what may overflow departs without end."""
    finite = torch.finfo(dtype)
    return torch.where(size * 2 < finite.max, room + count * finite.tiny, torch.inf)


def _count(op: Affine, inputs: list[Box]) -> int:
    """Return the terms of the operation's longest sum: of a layer the weights behind one output, of a scaling or a sum its inputs, else all there is."""
    weight, own = getattr(op, "weight", None), _OWN
    if getattr(op, "constant_terms", None) is not None:
        own += _MERGED
    if isinstance(weight, Tensor):
        return weight[0].numel() + own
    if hasattr(op, "slopes"):
        return len(inputs) + own
    return sum(b.lower[0].numel() for b in inputs) + own


def _of_function(op: Elementwise, box: Box, dtype: torch.dtype) -> Tensor:
    """Straight pieces of slope 0 and +-1 are executed exactly. Others err by units in the last place of the argument, the value, or of what they subtract
    on the way: 1, or the value that they tend to on the left (exp(x) - 1)."""
    if {getattr(op, "left", None), getattr(op, "right", None)} <= _EXACT_SLOPES:
        return torch.zeros_like(box.lower)
    value = Box(*op.range(box.lower, box.upper)).magnitude
    limit = op.value(torch.full_like(box.lower.flatten()[:1], -torch.inf)).abs().nan_to_num(nan=0.0, posinf=0.0)
    size = value + box.magnitude + limit + 1
    jump: float = getattr(op, "jump", 0.0)
    return _guarded(_gamma(_CURVE, dtype) * size + jump, size, _CURVE, dtype)


def check_executed(problem: Problem, graph: Graph, arithmetic: Arithmetic) -> None:
    """Raise `BadInput` where nothing can be said about the network as it is executed."""
    dtype = arithmetic.executed
    if dtype is None:
        return
    reason = _another_dtype(problem, dtype) or _computed_constants(problem, graph, dtype) or _unlike_the_graph(graph) or _computed_margins(problem)
    if reason:
        raise BadInput(f"the guarantee {arithmetic.guarantee} cannot be given: {reason}. Ask for float64-checked, which speaks about real arithmetic.")


def _another_dtype(problem: Problem, dtype: torch.dtype) -> str:
    classifier = problem.classifier
    kinds = {t.dtype for t in [*classifier.module.parameters(), *classifier.module.buffers()] if t.is_floating_point()} | {classifier.dtype, problem.x.dtype}
    return "" if kinds == {dtype} else f"the model or the points are in {', '.join(sorted(str(k) for k in kinds))}, not in {dtype} throughout"


def _computed_constants(problem: Problem, graph: Graph, dtype: torch.dtype) -> str:
    """A weight that the model computes is rounded in a way that the graph, in which it is a constant, does not show."""
    for name, module in problem.classifier.module.named_modules():
        if nn.utils.parametrize.is_parametrized(module) or module._forward_pre_hooks:
            return f"weights of {name or 'the model'} are computed anew in every pass (a parametrization or a hook); remove it and keep the weights"
    for node in graph.nodes:
        held = [getattr(node.op, kind, None) for kind in ("weight", "bias")] if getattr(node.op, "constant_terms", None) is None else []
        if any(isinstance(t, Tensor) and not torch.equal(t.to(dtype).to(t.dtype), t) for t in held):
            return f"the weights at {node.where} are computed by the model; keep the result as a parameter"
    return ""


def _unlike_the_graph(graph: Graph) -> str:
    node = next((n for n in graph.nodes if n.op.kind in ("product", "contraction", "pooling")), None)
    if node is None:
        return ""
    return f"numbers are multiplied with each other or weighed at {node.where} (softmax, attention, layer norm), which libraries do in their own ways"


def _computed_margins(problem: Problem) -> str:
    """The sign of a difference of two logits is executed exactly; other combinations are rounded."""
    rows = problem.goal.rows(problem.y[:1], problem.classes)
    plain = bool(((rows.abs() == 1) | (rows == 0)).all()) and int((rows != 0).sum(-1).max()) <= 2
    shifted = bool(problem.goal.offsets(problem.y[:1], problem.classes).any())
    return "" if plain and not shifted else "margins are not plain differences of two logits"
