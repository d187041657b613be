"""Is a false fact of any operation caught? Each operation that has facts gets small networks, mistakes in its facts, and a judge that must object.

The judge is that of `test_soundness`: bounds made with the false facts, against values made with the true operation at attacked points. Where it is the
adjoint that is false, the identity <y, W x> = <W^T y, x> must object too. A mistake that changes nothing (an average with its elements in another order)
is none, and of every fact some mistake must be one.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import Case, Recipe, attacked
from test_compositions import READ, model_of
from test_soundness import relaxed, violations
from torch import Tensor

from calipers.bounds import backward, coefficients
from calipers.bounds.interval import propagate
from calipers.bounds.rounding import CHECKED
from calipers.errors import CaptureError
from calipers.graph import capture as capturing
from calipers.graph.activations import ACTIVATIONS
from calipers.graph.affine import AFFINE, Call, Linear, Scale, Sum
from calipers.graph.call_builder import bind
from calipers.graph.calls import leaves, with_absolute_constants
from calipers.graph.capture import capture
from calipers.graph.compositions import COMPOSITIONS
from calipers.graph.file_builder import target_of
from calipers.graph.generic import Generic
from calipers.graph.ir import Graph
from calipers.graph.kinds import Affine, Elementwise, Op
from calipers.graph.logsumexp import LogSumExp
from calipers.graph.matmul import Facets, MatMul
from calipers.graph.node_writer import NodeResult, Writer
from calipers.graph.onnx.variables import VARIABLES
from calipers.graph.products import SELECTIONS, MaxPool, Product
from calipers.graph.recurrent import RECURRENT
from calipers.graph.reductions import REDUCTIONS
from calipers.graph.relaxations import Lines, Planes, Saddle
from calipers.graph.rewrites import REWRITES, maximum, minimum, scaled
from calipers.graph.smooth_relaxation import Smooth
from calipers.models.classifier import Classifier
from calipers.problem.goals import Untargeted
from calipers.threats.ball import Ball

Change = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a fact of an operation, a method, to a false one."""


# ---- mistakes ----------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mistaken(Graph):
    """A graph with a false fact in it; its values are those of the true one."""

    honest: Graph | None = None

    def values(self, x: Tensor) -> list[Tensor]:
        """As without the mistake."""
        assert self.honest is not None
        return self.honest.values(x)

    def to(self, dtype: torch.dtype) -> Graph:
        """Float64 as it is: a conversion would mend the operation."""
        assert dtype == torch.float64
        return self


def spoiled(op: Op, fact: str, change: Change) -> Op:
    """Return the operation with one method changed."""
    other = copy.copy(op)
    object.__setattr__(other, fact, change(getattr(op, fact)))
    return other


def mistaken(graph: Graph, numbers: Iterable[int], fact: str, change: Change) -> Mistaken:
    """Return the graph with the same mistake in these of its operations."""
    nodes = list(graph.nodes)
    for number in numbers:
        nodes[number - 1] = replace(
            nodes[number - 1], op=spoiled(nodes[number - 1].op, fact, change)
        )
    return Mistaken(graph.input_shape, tuple(nodes), honest=graph)


def each(change: Callable[[Tensor], Tensor]) -> Change:
    """Return the mistake that changes every tensor of a tuple alike."""
    return lambda fact: lambda *args: tuple(change(t) for t in fact(*args))


def result(change: Callable[[Any], Any]) -> Change:
    """Return the mistake that changes what the method returns."""
    return lambda fact: lambda *args, **options: change(fact(*args, **options))


def without_constant(fact: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """W x in place of W x + b."""
    return lambda *inputs: fact(*inputs) - fact(*(torch.zeros_like(x) for x in inputs))


def turned(t: Tensor) -> Tensor:
    """Every element one place further."""
    return t.flatten(1).roll(1, 1).view_as(t)


def unlike(a: Any, b: Any) -> bool:
    """Do two results of a fact differ?"""
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return any(
        not torch.allclose(p.to(torch.float64), q.to(torch.float64), rtol=1e-6, atol=1e-9)
        for p, q in pairs
    )


# ---- the judge ---------------------------------------------------------------------------------------------------------------------------------------


def caught(asked: Iterable[tuple[Graph, list[int], int]], fact: str, change: Change) -> list[str]:
    """Spoil a fact of some numbers of graphs, one graph after the other, and return what the judge says first; without the mistake it says nothing."""
    for graph, numbers, seed in asked:
        case = nets.case_of(graph, seed, ball=Ball("linf", 0.1 * (1 + seed % 4), box=None))
        points = attacked(case, seed, steps=1)
        found = violations(replace(case, graph=mistaken(graph, numbers, fact, change)), points)
        if found:
            assert not violations(case, points)
            return found
    return []


def breaks_the_identity(
    op: Affine, shapes: list[tuple[int, ...]], out: tuple[int, ...], spoil: Change
) -> bool:
    """Is <y, W x> no longer <W^T y, x>, for the operation with a false adjoint, while it was?"""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(4, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    y = torch.randn(4, *out, generator=generator, dtype=torch.float64)
    forward = (without_constant(op.value)(*inputs) * y).flatten(1).sum(1)

    def holds(adjoint: Callable[[Tensor], tuple[Tensor, ...]]) -> bool:
        back = sum((x * b).flatten(1).sum(1) for x, b in zip(inputs, adjoint(y), strict=True))
        return torch.allclose(forward, torch.as_tensor(back), rtol=1e-9, atol=1e-9)

    assert holds(op.adjoint)
    return not holds(spoil(op.adjoint))


# ---- affine operations -------------------------------------------------------------------------------------------------------------------------------

X, Y = NodeResult(0, ()), NodeResult(1, ())  # the two numbers that depend on the point
Draw = Callable[..., Tensor]
Arguments = Callable[[Draw], tuple[Any, ...]]
ROW, WIDE, IMAGE, BLOCK = (5,), (2, 6), (2, 4, 4), (2, 2, 3, 2)

STATISTICS: Arguments = lambda w: (X, w(2), w(2), w(2), w(2).abs() + 0.2)  # noqa: E731
CALLS: dict[str, tuple[tuple[int, ...], Arguments]] = {
    "aten.linear.default": (ROW, lambda w: (X, w(4, 5), w(4))),
    "aten.conv1d.default": (WIDE, lambda w: (X, w(3, 2, 3), w(3), [2], [1])),
    "aten.conv2d.default": (IMAGE, lambda w: (X, w(2, 1, 2, 2), w(2), [1, 2], [1, 0], [2, 1], 2)),
    "aten.conv3d.default": (BLOCK, lambda w: (X, w(3, 2, 2, 2, 2), w(3))),
    "aten.batch_norm.default": (IMAGE, lambda w: (*STATISTICS(w), False, 0.1, 1e-5, False)),
    "aten._native_batch_norm_legit_no_training.default": (IMAGE, lambda w: (*STATISTICS(w), 0.1, 1e-5)),
    "aten.add.Tensor": (ROW, lambda w: (X, Y)),
    "aten.sub.Tensor": (ROW, lambda w: (X, Y)),
    "aten.add.Scalar": (ROW, lambda w: (X, 0.7)),
    "aten.sub.Scalar": (ROW, lambda w: (X, 0.7)),
    "aten.rsub.Scalar": (ROW, lambda w: (X, 0.7)),
    "aten.rsub.Tensor": (ROW, lambda w: (X, w(5))),
    "aten.mul.Tensor": (ROW, lambda w: (X, w(5))),
    "aten.mul.Scalar": (ROW, lambda w: (X, -1.7)),
    "aten.div.Tensor": (ROW, lambda w: (X, w(5).abs() + 0.3)),
    "aten.div.Scalar": (ROW, lambda w: (X, -0.6)),
    "aten.neg.default": (ROW, lambda w: (X,)),
    "aten.zeros_like.default": (ROW, lambda w: (X,)),
    "aten.pad.default": (IMAGE, lambda w: (X, [1, 0, 0, 2], "constant", 1.5)),
    "aten.constant_pad_nd.default": (IMAGE, lambda w: (X, [1, 0, 0, 2], -1.5)),
    "aten.conv_transpose1d.default": (WIDE, lambda w: (X, w(2, 3, 3), w(3), [2])),
    "aten.conv_transpose2d.input": (IMAGE, lambda w: (X, w(2, 2, 3, 3), w(2), [2, 2], [1, 1])),
    "aten.conv_transpose3d.input": (BLOCK, lambda w: (X, w(2, 1, 2, 2, 2), w(1), [2, 2, 2])),
    "aten.einsum.default": (WIDE, lambda w: ("ncd,ce->ned", [X, w(2, 3)])),
    "aten.matmul.default": (WIDE, lambda w: (w(3, 2), X)),
    "aten.mm.default": (ROW, lambda w: (X, w(5, 4))),
    "aten.bmm.default": (BLOCK[:3], lambda w: (X, w(2, 3, 4))),
    "aten.addmm.default": (ROW, lambda w: (w(4), X, w(5, 4))),
    "aten.baddbmm.default": (BLOCK[:3], lambda w: (w(2, 2, 4), X, w(2, 3, 4))),
    "aten.permute.default": (IMAGE, lambda w: (X, [0, 2, 3, 1])),
    "aten.transpose.int": (IMAGE, lambda w: (X, 1, 3)),
    "aten.slice.Tensor": (IMAGE, lambda w: (X, 2, 1, 4, 2)),
    "aten.select.int": (IMAGE, lambda w: (X, 1, 1)),
    "aten.cat.default": (IMAGE, lambda w: ([X, Y, X], 2)),
    "aten.stack.default": (WIDE, lambda w: ([Y, X], 1)),
    "aten.avg_pool1d.default": (WIDE, lambda w: (X, [3], [2], [1])),
    "aten.avg_pool2d.default": (IMAGE, lambda w: (X, [3, 3], [1, 1], [1, 1], False, False)),
    "aten.avg_pool3d.default": (BLOCK, lambda w: (X, [2, 2, 1])),
    "aten.adaptive_avg_pool1d.default": (WIDE, lambda w: (X, [4])),
    "aten.adaptive_avg_pool2d.default": (IMAGE, lambda w: (X, [2, 3])),
    "aten._adaptive_avg_pool2d.default": (IMAGE, lambda w: (X, [3, 2])),
    "aten.adaptive_avg_pool3d.default": (BLOCK, lambda w: (X, [1, 2, 2])),
    "aten.mean.dim": (IMAGE, lambda w: (X, [2])),
    "aten.sum.dim_IntList": (IMAGE, lambda w: (X, [1, 3])),
    "aten.flip.default": (IMAGE, lambda w: (X, [1, 2])),
    "aten.upsample_nearest1d.vec": (WIDE, lambda w: (X, None, [2.0])),
    "aten.upsample_nearest2d.vec": (IMAGE, lambda w: (X, None, [2.0, 1.5])),
    "aten.upsample_nearest3d.vec": (BLOCK, lambda w: (X, [3, 3, 3], None)),
    "aten.upsample_linear1d.vec": (WIDE, lambda w: (X, None, False, [1.5])),
    "aten.upsample_bilinear2d.vec": (IMAGE, lambda w: (X, None, True, [1.5, 2.0])),
    "aten.upsample_trilinear3d.vec": (BLOCK, lambda w: (X, [3, 4, 3], False, None)),
    "aten.upsample_nearest1d.default": (WIDE, lambda w: (X, [9])),
    "aten.upsample_nearest2d.default": (IMAGE, lambda w: (X, [5, 6])),
    "aten.upsample_bilinear2d.default": (IMAGE, lambda w: (X, [5, 6], False)),
    "aten.pixel_shuffle.default": ((4, 2, 2), lambda w: (X, 2)),
    "aten.pixel_unshuffle.default": (IMAGE, lambda w: (X, 2)),
    "aten.roll.default": (IMAGE, lambda w: (X, [1], [3])),
    "aten.index_select.default": (IMAGE, lambda w: (X, 2, torch.tensor([3, 0, 0]))),
    "aten.narrow.default": (IMAGE, lambda w: (X, 3, 1, 2)),
    "aten.movedim.int": (IMAGE, lambda w: (X, 1, 3)),
    "aten.repeat.default": (ROW, lambda w: (X, [1, 2])),
    "aten.t.default": (WIDE, lambda w: (X,)),
    "aten.tile.default": (WIDE, lambda w: (X, [1, 2, 1])),
    "aten.index.Tensor": (WIDE, lambda w: (X, [None, None, torch.tensor([4, 0, 4])])),
    "aten.channel_shuffle.default": ((4, 2, 2), lambda w: (X, 2)),
    "aten.diagonal.default": (IMAGE, lambda w: (X, 1, 2, 3)),
    "aten.mean.default": (WIDE, lambda w: (X,)),
    "aten.sum.default": (WIDE, lambda w: (X,)),
    "aten.unfold.default": (WIDE, lambda w: (X, 2, 3, 2)),
    "aten.cumsum.default": (WIDE, lambda w: (X, 2)),
    "aten.im2col.default": (IMAGE, lambda w: (X, [2, 2], [1, 1], [0, 0], [2, 2])),
    "aten.expand.default": ((1, 5), lambda w: (X, [-1, 3, 5])),
    "aten.view.default": (WIDE, lambda w: (X, [1, 3, 4])),
    "aten._unsafe_view.default": (WIDE, lambda w: (X, [1, 3, 4])),
    "aten.reshape.default": (WIDE, lambda w: (X, [1, 4, 3])),
    "aten.flatten.using_ints": (IMAGE, lambda w: (X, 2)),
    "aten.unsqueeze.default": (WIDE, lambda w: (X, 2)),
    "aten.squeeze.dim": ((1, 5), lambda w: (X, 1)),
    "aten.squeeze.dims": ((1, 5, 1), lambda w: (X, [1, 3])),
    "aten.unflatten.int": (WIDE, lambda w: (X, 2, [3, 2])),
}  # fmt: skip
ALONE = frozenset(f"aten.{name}.default" for name in ("bmm", "baddbmm", "t", "mean", "sum"))
"""Calls that only stand in programs of a single point, where the axis of points is not theirs."""


def affine_case(name: str, seed: int) -> tuple[Graph, int]:
    """Return the call between the input (and a number made of it) and a small net, and its number in the graph."""
    shape, arguments = CALLS[name]
    recipe = Recipe(shape, seed)
    op, given = affine_call(name, shape, arguments(recipe.normal))
    if 1 in given:
        recipe.add(Scale(recipe.normal(1, *shape), recipe.normal(1, *shape)))
    number = recipe.add(op, *given)
    recipe.activation("aten.relu.default")
    recipe.flatten()
    recipe.linear(3)
    return recipe.graph(), number


def affine_call(
    name: str, shape: tuple[int, ...], args: tuple[Any, ...]
) -> tuple[Affine, tuple[int, ...]]:
    """Return the operation that the table's builder makes of a call, and the numbers it is called on."""
    given = [a for a in leaves(args) if isinstance(a, NodeResult)]
    numbers = tuple(replace(a, shape=shape) if isinstance(a, NodeResult) else a for a in args)
    run, absolute = bound(name, args), bound(name, with_absolute_constants(args))
    ones = [torch.ones(1, *shape, dtype=torch.float64)] * len(given)
    places = tuple(i for i, a in enumerate(args) if isinstance(a, NodeResult))
    made = Call(
        name,
        run,
        numbers,
        places,
        (shape,) * len(given),
        tuple(run(*ones).shape[1:]) or (1,),
        torch.float64,
        torch.device("cpu"),
        absolute,
    )
    op = AFFINE[name](made)
    assert op is not None, f"{name} is not read"
    return op, tuple(v.number for v in given)


def bound(name: str, args: tuple[Any, ...]) -> Callable[..., Tensor]:
    """Return the call as a function of what depends on the point."""
    run = bind(
        Writer(torch.float64, torch.device("cpu"), int(name in ALONE)), target_of(name), args
    )
    return lambda *inputs: run(*inputs)[0] if "native" in name else run(*inputs)


WRONG_ADJOINTS: dict[str, Change] = {
    "too small": each(lambda b: 0.9 * b),
    "misplaced": each(turned),
    "too much": each(lambda b: b + 0.1),
}
WRONG_ADJOINTS["without the last input"] = result(
    lambda backs: (*backs[:-1], torch.zeros_like(backs[-1]))
)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", sorted(AFFINE))
def test_a_false_adjoint_is_caught_twice(name: str) -> None:
    wrong = 0
    for mistake, change in WRONG_ADJOINTS.items():
        graph, number = affine_case(name, 0)
        node = graph.nodes[number - 1]
        assert isinstance(node.op, Affine)
        y = torch.randn(
            4, *node.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        if not unlike(node.op.adjoint(y), change(node.op.adjoint)(y)) or (
            mistake == "without the last input" and len(node.inputs) == 1
        ):
            continue
        wrong += 1
        assert breaks_the_identity(
            node.op, [graph.shape(i) for i in node.inputs], node.shape, change
        )
        assert caught(asked_of(name), "adjoint", change)
    assert wrong


def asked_of(name: str) -> Iterator[tuple[Graph, list[int], int]]:
    """Yield networks with the call."""
    for seed in range(12):
        graph, number = affine_case(name, seed)
        yield graph, [number], seed


# weights of 0 cannot be too small
@pytest.mark.parametrize("name", sorted(set(AFFINE) - {"aten.zeros_like.default"}))
def test_false_absolute_weights_are_caught(name: str) -> None:
    assert caught(asked_of(name), "absolute", result(lambda reach: reach / 2))


def has_constant(name: str) -> bool:
    """Does the call add something that does not depend on the point?"""
    graph, number = affine_case(name, 0)
    node = graph.nodes[number - 1]
    return bool(
        node.op.value(
            *(torch.zeros(1, *graph.shape(i), dtype=torch.float64) for i in node.inputs)
        ).any()
    )


WITH_CONSTANT = sorted(name for name in CALLS if has_constant(name))


@pytest.mark.parametrize("name", WITH_CONSTANT)
def test_a_forgotten_constant_is_caught(name: str) -> None:
    assert caught(asked_of(name), "value", without_constant)


def test_every_builder_is_tried_and_most_kinds_of_them_with_a_constant() -> None:
    assert set(CALLS) == set(AFFINE)
    assert len(WITH_CONSTANT) >= 15 and {
        "aten.linear.default",
        "aten.conv3d.default",
        "aten.pad.default",
        "aten.baddbmm.default",
    } <= set(WITH_CONSTANT)


def windows(seed: int) -> Iterator[tuple[Graph, list[int], int]]:
    """Yield a graph with rows that go back through windows: a scaling and a sum between two convolutions."""
    recipe = Recipe((1, 6, 6), seed)
    first = recipe.conv(2, same=True)
    scaling = recipe.add(Scale(recipe.normal(1, 2, 1, 1), recipe.normal(1, 2, 1, 1)))
    adding = recipe.add(Sum((1.0, -1.0)), scaling, first)
    recipe.conv(2, same=True)
    recipe.activation("aten.relu.default")
    recipe.flatten()
    recipe.linear(3)
    yield recipe.graph(), [first, scaling, adding], seed


@pytest.mark.parametrize(("place", "fact", "change"), [
    (0, "window_adjoint", result(lambda back: 0.9 * back)), (0, "window_adjoint", result(turned)),
    (1, "slopes", each(lambda slope: 0.9 * slope)), (2, "slopes", each(lambda slope: 0.9 * slope)), (2, "slopes", result(lambda slopes: slopes[::-1])),
])  # fmt: skip
def test_a_false_fact_of_windows_is_caught(
    place: int, fact: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (coefficients, backward):
        monkeypatch.setattr(module, "WORTH_A_WINDOW", 1e9)
    asked = (
        (graph, [numbers[place]], k) for seed in range(8) for graph, numbers, k in windows(seed)
    )
    assert caught(asked, fact, change)


# ---- functions of one number -------------------------------------------------------------------------------------------------------------------------


def lines_changed(change: Callable[[Lines, Tensor, Tensor, Tensor], Lines]) -> Change:
    """Return the mistake in lines, from them, the interval's middle, a third of the room between them there, and the slope that it is worth."""

    def spoil(relax: Callable[..., Lines]) -> Callable[..., Lines]:
        def wrong(lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
            lines, middle = relax(lower, upper, alpha), (lower + upper) / 2
            room = (
                (lines.upper_slope - lines.lower_slope) * middle
                + lines.upper_intercept
                - lines.lower_intercept
            )
            return change(lines, middle, 0.3 * room, 0.6 * room / (upper - lower).clamp_min(1e-9))

        return wrong

    return spoil


def leaning(side: str, sign: float) -> Change:
    """Return the mistake that turns the lower or the upper line about its middle."""

    def lean(lines: Lines, middle: Tensor, _: Tensor, steep: Tensor) -> Lines:
        slope, at = getattr(lines, f"{side}_slope"), getattr(lines, f"{side}_intercept")
        return lines._replace(
            **{
                f"{side}_slope": slope + sign * steep,
                f"{side}_intercept": at - sign * steep * middle,
            }
        )

    return lines_changed(lean)


def narrowed(ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Take a tenth of a range off each of its ends."""
    low, high = ends
    return low + 0.1 * (high - low), high - 0.1 * (high - low)


WRONG_LINES: dict[str, tuple[str, Change]] = {
    "the upper line lowered": (
        "relax",
        lines_changed(
            lambda lines, _, much, __: lines._replace(upper_intercept=lines.upper_intercept - much)
        ),
    ),
    "the lower line raised": (
        "relax",
        lines_changed(
            lambda lines, _, much, __: lines._replace(lower_intercept=lines.lower_intercept + much)
        ),
    ),
    "the upper line turned left": ("relax", leaning("upper", -1.0)),
    "the upper line turned right": ("relax", leaning("upper", 1.0)),
    "the lower line turned left": ("relax", leaning("lower", -1.0)),
    "the lower line turned right": ("relax", leaning("lower", 1.0)),
    "the upper slope's sign": (
        "relax",
        lines_changed(lambda lines, *_: lines._replace(upper_slope=-lines.upper_slope)),
    ),
    "the lower slope's sign": (
        "relax",
        lines_changed(lambda lines, *_: lines._replace(lower_slope=-lines.lower_slope)),
    ),
    "the range narrowed": ("range", result(narrowed)),
}
PLACES = torch.linspace(-1, 1, 41, dtype=torch.float64)


def remembered(fact: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same method, which answers what it was asked before from memory: tangents take many steps."""
    known: dict[Any, Any] = {}

    def ask(*args: Any) -> Any:
        key = tuple((a.shape, *a.flatten().tolist()) if isinstance(a, Tensor) else a for a in args)
        if key not in known:
            known[key] = fact(*args)
        return known[key]

    return ask


def intervals_of(op: Elementwise) -> tuple[Tensor, Tensor]:
    """Return middles and half widths of intervals around the places where the function bends; around 1 where it asks for positive numbers."""
    draw, reach = random.Random(0), [0.4, 0.8, 2.0] * 4
    if isinstance(op, Smooth) and not bool(op.defined(torch.tensor(-1.0), torch.tensor(0.0))):
        middle, reach = (
            [draw.uniform(0.7, 1.5) for _ in reach],
            [draw.uniform(0.2, 0.6) for _ in reach],
        )
    else:
        corners = [
            0.0,
            *(
                c
                for name in ("breakpoints", "inflections", "turns")
                for c in getattr(op, name, None) or ()
                if math.isfinite(c)
            ),
        ]
        middle = [draw.choice(corners) + r * draw.uniform(-0.6, 0.6) for r in reach]
    return torch.tensor(middle, dtype=torch.float64), torch.tensor(reach, dtype=torch.float64)


def is_false(op: Elementwise, middle: Tensor, reach: Tensor, fact: str) -> Tensor:
    """On which intervals does the fact cut off a value of the function, by more than rounding?"""
    h, ends = middle + reach * PLACES[:, None], (middle - reach, middle + reach)
    f = op.value(h)
    if fact == "range":
        below, above = op.range(*ends)
    else:
        lines = op.relax(*ends)
        below, above = (
            lines.lower_slope * h + lines.lower_intercept,
            lines.upper_slope * h + lines.upper_intercept,
        )
    return ((f < below - 1e-6) | (f > above + 1e-6)).any(0)


def tilted(op: Elementwise, wrong: Elementwise, middle: Tensor, reach: Tensor) -> Case:
    """Ask for the margins of 0 over +-f(x) + t x on an interval, for t = 0 and the slopes of the false lines: at their own slope they show."""
    lines = wrong.relax(middle - reach, middle + reach)
    weights = torch.tensor(
        [
            [sign, -sign * float(t)]
            for sign in (1.0, -1.0)
            for t in (0.0, lines.lower_slope, lines.upper_slope)
        ],
        dtype=torch.float64,
    )
    recipe = Recipe((1,), 0)
    recipe.add(affine_call("aten.cat.default", (1,), ([X, Y], 1))[0], recipe.add(op), 0)
    recipe.add(Linear(torch.cat([torch.zeros(1, 2, dtype=torch.float64), weights]), None))
    return Case(
        recipe.graph(),
        middle.view(1, 1),
        torch.zeros(1, dtype=torch.long),
        Ball("linf", reach.view(1), box=None),
        Untargeted(),
    )


CONSTANT = ((0.4, 0.4), (0.7, 0.2))  # clamps to these are no function of their argument
# without ends it changes nothing: both lines are the function
LINES = (("aten.clip.default", (None,)),)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "args"),
    [entry for entry in nets.activations() if entry[1][1:] not in CONSTANT and entry not in LINES],
    ids=str,
)
def test_false_facts_of_a_function_are_caught(name: str, args: tuple[Any, ...]) -> None:
    made = ACTIVATIONS[name](args)
    assert made is not None
    op: Any = spoiled(made, "relax", remembered)
    middle, reach = intervals_of(op)
    seen = []
    for mistake, (fact, change) in WRONG_LINES.items():
        wrong: Any = spoiled(op, fact, change)
        shows = is_false(wrong, middle, reach, fact).nonzero()[:1, 0]
        if not len(shows):
            continue
        seen.append(mistake)
        case = tilted(op, wrong, middle[shows], reach[shows])
        points = nets.admissible(case, PLACES.view(-1, 1, 1) * reach[shows])
        assert violations(replace(case, graph=mistaken(case.graph, [1], fact, change)), points), (
            mistake
        )
        assert not violations(case, points)
    assert {"the upper line lowered", "the lower line raised", "the range narrowed"} <= set(seen)
    assert all(
        any(side in mistake and "turned" in mistake for mistake in seen)
        for side in ("upper", "lower")
    )


# ---- selections and products -------------------------------------------------------------------------------------------------------------------------


def lowered(planes: Planes) -> Planes:
    """Take a tenth off every ceiling's distance to the lowest one."""
    return planes._replace(
        ceiling=planes.ceiling - 0.1 * (planes.ceiling - planes.ceiling.amin()) - 0.01
    )


WRONG_PLANES: dict[str, tuple[str, Change]] = {
    "the ceiling lowered": ("relaxation", result(lowered)),
    "one winner everywhere": (
        "relaxation",
        result(lambda planes: planes._replace(exact=torch.ones_like(planes.exact))),
    ),
    "an element of another window": (
        "relaxation",
        result(lambda planes: planes._replace(pick=turned(planes.pick))),
    ),
    "the smallest for the largest": ("value", lambda fact: lambda x: -fact(-x)),
}
POOLS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "aten.max_pool1d.default": ((2, 6), (None, [2], [2])),
    "aten.max_pool2d.default": (IMAGE, (None, [3, 3], [1, 1], [1, 1])),
    "aten.max_pool3d.default": ((1, 4, 2, 4), (None, [2, 2, 2], [2, 2, 2])),
}


def pools(name: str) -> Iterator[tuple[Graph, list[int], int]]:
    """Yield networks with a selection of elements that move by different amounts, and little else that could make a bound loose."""
    shape, args = POOLS[name]
    pool = getattr(torch.nn.functional, name.split(".")[1])
    for seed in range(24):
        recipe = Recipe(shape, seed)
        op = SELECTIONS[name](args, shape, tuple(pool(torch.zeros(1, *shape), *args[1:]).shape[1:]))
        assert op is not None
        recipe.add(Scale(recipe.normal(1, *shape), recipe.normal(1, *shape, scale=0.3)))
        number = recipe.add(op)
        recipe.flatten()
        recipe.linear(3)
        yield recipe.graph(), [number], seed


@pytest.mark.parametrize("mistake", WRONG_PLANES)
@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_a_false_fact_of_a_selection_is_caught(name: str, mistake: str) -> None:
    assert caught(pools(name), *WRONG_PLANES[mistake])


def moved(side: str, share: float) -> Change:
    """Return the mistake that moves a plane of a product by a share of the room that the corners leave."""

    def spoil(saddle: Callable[..., Saddle]) -> Callable[..., Saddle]:
        def wrong(x: Any, y: Any, alpha: Tensor | None = None) -> Saddle:
            planes, name = saddle(x, y, alpha), f"{side}_intercept"
            return planes._replace(
                **{name: getattr(planes, name) + share * (x[1] - x[0]) * (y[1] - y[0])}
            )

        return wrong

    return spoil


WRONG_SADDLES: dict[str, tuple[str, Change]] = {
    "the upper plane lowered": ("relaxation", moved("upper", -0.2)),
    "the lower plane raised": ("relaxation", moved("lower", 0.2)),
    "the sign of the upper slope": (
        "relaxation",
        result(lambda planes: planes._replace(upper_x=-planes.upper_x)),
    ),
    "the sign of the lower slope": (
        "relaxation",
        result(lambda planes: planes._replace(lower_y=-planes.lower_y)),
    ),
    "the factors' slopes swapped": (
        "relaxation",
        result(lambda planes: planes._replace(lower_x=planes.lower_y, lower_y=planes.lower_x)),
    ),
    "the range narrowed": ("interval", result(narrowed)),
}


def products() -> Iterator[tuple[Graph, list[int], int]]:
    """Yield networks that multiply two independent numbers, and weigh the product and its factors."""
    for seed in range(24):
        recipe = Recipe((2,), seed)
        first, second = (
            recipe.add(
                Linear(recipe.normal(1, 2) * torch.tensor(keep).double(), recipe.normal(1)), 0
            )
            for keep in ((1, 0), (0, 1))
        )
        number = recipe.add(Product(), first, second)
        both = recipe.add(Sum((1.0, recipe.draw.choice([-2.0, 0.5, 1.5]))), first, second)
        recipe.add(affine_call("aten.cat.default", (1,), ([X, Y], 1))[0], number, both)
        recipe.linear(6)
        yield recipe.graph(), [number], seed


@pytest.mark.parametrize("mistake", WRONG_SADDLES)
def test_a_false_fact_of_a_product_is_caught(mistake: str) -> None:
    assert caught(products(), *WRONG_SADDLES[mistake])


def ends_changed(**shifts: float) -> Change:
    """Return the mistake that adds a share of the room to fields of a matrix product's planes."""

    def spoil(facets: Callable[..., Facets]) -> Callable[..., Facets]:
        def wrong(x: Any, y: Any, alpha: Tensor | None = None) -> Facets:
            planes = facets(x, y, alpha)
            room = (x[1] - x[0]) @ (y[1] - y[0])
            return planes._replace(
                **{name: getattr(planes, name) + share * room for name, share in shifts.items()}
            )

        return wrong

    return spoil


WRONG_FACETS: dict[str, tuple[str, Change]] = {
    "the lower plane raised": ("relaxation", ends_changed(low_low=-0.3)),
    "the upper plane lowered": ("relaxation", ends_changed(low_high=0.3)),
    "the ends of y swapped": (
        "relaxation",
        result(lambda planes: planes._replace(low_y=planes.high_y, high_y=planes.low_y)),
    ),
    "the other end of x": (
        "relaxation",
        result(lambda planes: planes._replace(low_x=planes.high_x)),
    ),
    "the range narrowed": ("interval", result(narrowed)),
}


def contractions() -> Iterator[tuple[Graph, list[int], int]]:
    """Yield networks that multiply two matrices of independent numbers, and weigh the product and its factors."""
    for seed in range(24):
        recipe = Recipe((4,), seed)
        first, second = (
            recipe.add(
                Linear(
                    torch.eye(4, dtype=torch.float64)[keep] * recipe.normal(2, 1), recipe.normal(2)
                ),
                0,
            )
            for keep in ([0, 1], [2, 3])
        )
        row, column = (
            recipe.add(
                Generic(lambda t, s=shape: t.reshape(len(t), *s), "reshape", ((2,),), True), k
            )  # type: ignore[misc]
            for k, shape in ((first, (1, 2)), (second, (2, 1)))
        )
        number = recipe.add(MatMul(), row, column)
        flat = recipe.add(
            Generic(lambda t: t.reshape(len(t), 1), "reshape", ((1, 1),), True), number
        )
        recipe.add(Generic(lambda a, b: torch.cat([a, b], 1), "cat", ((1,), (2,))), flat, first)
        recipe.linear(6)
        yield recipe.graph(), [number], seed


@pytest.mark.parametrize("mistake", WRONG_FACETS)
def test_a_false_fact_of_a_matrix_product_is_caught(mistake: str) -> None:
    assert caught(contractions(), *WRONG_FACETS[mistake])


def shares_changed(side: str, share: float) -> Change:
    """Return the mistake that moves a plane of log sum exp by a share of the room between both in the middle of the box."""

    def spoil(lines: Callable[..., Lines]) -> Callable[..., Lines]:
        def wrong(x: Any, alpha: Tensor | None = None) -> Lines:
            made, middle = lines(x), (x[0] + x[1]) / 2
            room = (
                (made.upper_slope - made.lower_slope) * middle
                + made.upper_intercept
                - made.lower_intercept
            )
            name = f"{side}_intercept"
            return made._replace(**{name: getattr(made, name) + share * room.mean(1, keepdim=True)})

        return wrong

    return spoil


WRONG_SHARES: dict[str, tuple[str, Change]] = {
    "the upper plane lowered": ("relaxation", shares_changed("upper", -0.7)),
    "the lower plane raised": ("relaxation", shares_changed("lower", 0.7)),
    "the upper slopes in another order": (
        "relaxation",
        result(lambda lines: lines._replace(upper_slope=turned(lines.upper_slope))),
    ),
    "the tangent above": (
        "relaxation",
        result(
            lambda lines: lines._replace(
                upper_slope=lines.lower_slope, upper_intercept=lines.lower_intercept
            )
        ),
    ),
}


def poolings() -> Iterator[tuple[Graph, list[int], int]]:
    """Yield networks with log sum exp of independent numbers, weighed against these."""
    for seed in range(24):
        recipe = Recipe((3,), seed)
        recipe.add(Scale(3 * recipe.normal(1, 3), recipe.normal(1, 3)))
        number = recipe.add(LogSumExp(1))
        total = recipe.add(affine_call("aten.sum.dim_IntList", (3,), (X, [1], True))[0])
        recipe.add(
            Generic(lambda a, b: torch.cat([a, b], 1), "cat", ((1,), (3,))), total, number - 1
        )
        recipe.linear(6)
        yield recipe.graph(), [number], seed


@pytest.mark.parametrize("mistake", WRONG_SHARES)
def test_a_false_fact_of_log_sum_exp_is_caught(mistake: str) -> None:
    assert caught(poolings(), *WRONG_SHARES[mistake])


# ---- what rewrites are made of -----------------------------------------------------------------------------------------------------------------------

REWRITTEN = (
    "softmax",
    "attention of torch",
    "matrix product",
    "product, broadcast",
    "variance",
    "quotient",
    "group norm",
    "three chunks",
    "constant that enlarges",
)


def kind_of(op: Op) -> str:
    """Name an operation, as the tables of this file do."""
    return str(getattr(op, "name", type(op).__name__))


def parts(x: Tensor) -> Tensor:
    """Divide and join again."""
    return torch.cat([a - b for a, b in (x.split(3, 1), x.unflatten(1, (2, 3)).unbind(1))], 1)


@cache
def graphs() -> list[Graph]:
    """Return captured graphs of modules whose operations are written as several, small ones first."""
    divided = nets.nn.Sequential(
        nets.nn.Linear(4, 6), nets.Apply(parts), nets.nn.Linear(6, 3)
    ).eval()
    own = capture(Classifier(divided), torch.rand(5, 4))
    return sorted(
        [own, *(nets.captured(name) for name in REWRITTEN)], key=lambda graph: len(graph.nodes)
    )


def rewritten(kind: str) -> Iterator[tuple[Graph, list[int], int]]:
    """Yield captured graphs with the numbers of this kind of operation."""
    for seed in range(4):
        for graph in graphs():
            numbers = [k for k, node in enumerate(graph.nodes, start=1) if kind_of(node.op) == kind]
            if numbers:
                yield graph, numbers, seed


MOVED = (
    "sum",
    "centre",
    "mean",
    "expand",
    "transpose",
    "aten.split.Tensor",
    "aten.unbind.int",
    "aten.chunk.default",
)


@pytest.mark.parametrize("kind", MOVED)
def test_a_false_fact_of_a_rewrite_s_moves_is_caught(kind: str) -> None:
    assert caught(rewritten(kind), "absolute", result(lambda reach: reach / 2))
    for graph, numbers, _ in rewritten(kind):
        for node in (graph.nodes[k - 1] for k in numbers):
            assert isinstance(node.op, Affine)
            assert breaks_the_identity(
                node.op,
                [graph.shape(i) for i in node.inputs],
                node.shape,
                WRONG_ADJOINTS["too small"],
            )


def cut_off(case: Case) -> list[str]:
    """Name every number whose relaxation, or range, cuts off a value that its operation takes on the boxes of its inputs.

    Where factors hang together, as in attention, no input drives them to a corner of their box, and a plane that is false there shows in no margin.
    """
    state, generator = relaxed(case), torch.Generator().manual_seed(0)
    found = []
    for number, node in enumerate(case.graph.nodes, start=1):
        if isinstance(node.op, Affine):
            continue
        boxes = [state.boxes[i] for i in node.inputs]
        shares = [
            torch.rand(64, *box.lower.shape, generator=generator, dtype=torch.float64)
            for box in boxes
        ]
        corners = [
            torch.where(torch.arange(64).view(-1, *[1] * (s.dim() - 1)) % 2 > 0, s, s.round())
            for s in shares
        ]
        places = [
            box.lower + s * (box.upper - box.lower) for box, s in zip(boxes, corners, strict=True)
        ]
        flat = [x.flatten(0, 1) for x in places]
        value = node.op.value(*flat).view(64, -1, *node.shape)
        below, above = between(
            state.relaxations[number], [x.view(64, -1, *x.shape[1:]) for x in flat]
        )
        if isinstance(node.op, LogSumExp):  # its lines hold together
            below, above = (
                t.mean(node.op.axis + 1, keepdim=True).expand_as(t) for t in (below, above)
            )
        # the lines are evaluated here with a rounding
        box, room = propagate(case.graph, number, state.boxes, CHECKED), 1e-12 * (1 + value.abs())
        low, high = torch.maximum(below, box.lower), torch.minimum(above, box.upper)
        found += [f"number {number} ({kind_of(node.op)})"] * bool(
            ((value < low - room) | (value > high + room)).any()
        )
    return found


def between(relaxation: Any, x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a relaxation says at points (R, N, *shape) of its inputs."""
    if isinstance(relaxation, Planes):
        picked = (
            x[0]
            .flatten(2)
            .gather(2, relaxation.pick.flatten(1).expand(len(x[0]), -1, -1))
            .view(len(x[0]), *relaxation.pick.shape)
        )
        return picked, torch.where(relaxation.exact, picked, relaxation.ceiling)
    if isinstance(relaxation, Facets):
        flat, rounds = [t.flatten(0, 1) for t in x], len(x[0])
        every = Facets(*(t.repeat(rounds, *[1] * (t.dim() - 1)) for t in relaxation))
        sign = torch.ones_like(every.low_low)
        low, high = (every.at(s, *flat).unflatten(0, (rounds, -1)) for s in (sign, -sign))
        return low, high
    lines = relaxation.lines()
    low = sum(part.lower_slope * t + part.lower_intercept for part, t in zip(lines, x, strict=True))
    high = sum(
        part.upper_slope * t + part.upper_intercept for part, t in zip(lines, x, strict=True)
    )
    return torch.as_tensor(low), torch.as_tensor(high)


NON_AFFINE = {
    MatMul: WRONG_FACETS,
    LogSumExp: WRONG_SHARES,
    Product: WRONG_SADDLES,
    Elementwise: WRONG_LINES,
    MaxPool: WRONG_PLANES,
}


@pytest.mark.parametrize(
    "name",
    [
        *(n for n in REWRITTEN if n != "constant that enlarges"),
        "max pool, ceil",
        "prelu, mish and silu",
    ],
)
def test_a_false_relaxation_in_a_captured_module_is_caught(name: str) -> None:
    graph, caught_kinds, kinds = nets.captured(name), set(), set()
    case = nets.case_of(graph, 1, points=2, ball=Ball("linf", 0.3, box=None))
    assert not cut_off(case)
    for number, node in enumerate(graph.nodes, start=1):
        if isinstance(node.op, Affine) or kind_of(node.op) in caught_kinds:
            continue
        kinds.add(kind_of(node.op))
        fact, change = next(
            iter(
                next(
                    table for kind, table in NON_AFFINE.items() if isinstance(node.op, kind)
                ).values()
            )
        )
        if any(
            f"number {number} " in text
            for text in cut_off(replace(case, graph=mistaken(graph, [number], fact, change)))
        ):
            caught_kinds.add(kind_of(node.op))
    assert caught_kinds == kinds != set()


# ---- operations composed of others ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Miswritten(Graph):
    """A graph that computes another function than its module; its outputs are those of the module."""

    honest: Graph | None = None

    def values(self, x: Tensor) -> list[Tensor]:
        """Its own inner values, and the true outputs."""
        assert self.honest is not None
        return [*super().values(x)[:-1], self.honest.values(x)[-1]]

    def to(self, dtype: torch.dtype) -> Graph:
        """Float64 as it is."""
        assert dtype == torch.float64
        return self


Rewrite = Callable[..., Any]
"""Writes one layer or function as several operations."""


def instead(changed: Callable[..., tuple[Any, ...]]) -> Callable[[Rewrite], Rewrite]:
    """Return the mistake that gives a rewrite other arguments."""
    return lambda right: lambda w, *args: right(w, *changed(*args))


def exchanged(name: str) -> Callable[[Rewrite], Rewrite]:
    """Return the mistake that takes the rewrite of another operation."""
    return lambda _: COMPOSITIONS[name]


def halves_exchanged(right: Rewrite) -> Rewrite:
    """The gate in the place of the value."""
    return lambda w, x, dim: right(
        w, w.move("roll", lambda t: t.roll(t.shape[dim] // 2, dim), x), dim
    )


def last_end_first(_: Rewrite) -> Rewrite:
    """Crossed ends, of which the lower one wins."""
    return lambda w, x, low, high: maximum(w, minimum(w, x, high), low)


def other_direction_first(
    x: Any, first: Tensor, weights: list[Tensor], *rest: Any
) -> tuple[Any, ...]:
    """Every layer's two directions with each other's weights."""
    return x, first, [weights[k ^ 4] for k in range(len(weights))], *rest


def one_state_more(x: Any, first: Tensor, weights: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    """A first state that is not 0."""
    return x, first + 1, weights, *rest


MASK = torch.tensor([True, False, False, True])
REWRITABLE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "softmax": (lambda t: t.softmax(1), (4,)),
    "log softmax": (lambda t: t.log_softmax(1), (4,)),
    "log sum exp": (lambda t: t.logsumexp(1, keepdim=True), (4,)),
    "layer norm": (nets.nn.LayerNorm(4), (4,)),
    "group norm": (nets.nn.GroupNorm(2, 4), (4, 3)),
    "larger of two": (lambda t: torch.maximum(t, t.flip(1)), (4,)),
    "smaller of two": (lambda t: torch.minimum(t, t.flip(1)), (4,)),
    "quotient": (lambda t: t / (2 + t.flip(1)), (4,)),
    "product": (lambda t: t * t.flip(1), (4,)),
    "masked": (lambda t: t.masked_fill(MASK, 0.2), (4,)),
    "variance": (lambda t: t.var(1, keepdim=True), (4,)),
}
"""Functions that are written as several operations, besides those of `READ`."""


COMPOSED: dict[str, tuple[str, Callable[[Rewrite], Rewrite]]] = {
    "glu": ("aten.glu.default", halves_exchanged),
    "rms norm": ("aten.rms_norm.default", instead(lambda x, shape, weight, eps: (x, shape, weight, 0.5))),
    "softshrink": ("aten.softshrink.default", instead(lambda x, size: (x, size / 2))),
    "threshold": ("aten.threshold.default", instead(lambda x, *_: (x, 0.4, 0.4))),
    "clamp by crossed tensors": ("aten.clamp.Tensor", last_end_first),
    "clamp from below": ("aten.clamp.Tensor", instead(lambda x, low, *_: (x, None, low))),
    "adaptive max pool": ("aten.adaptive_max_pool2d.default", lambda right: lambda w, x, size: scaled(w, right(w, x, size), 0.5)),
    "choice of slopes": ("aten.gt.Scalar", exchanged("aten.lt.Scalar")),
    "choice of curves": ("aten.where.self", instead(lambda mask, x, y: (mask, y, x))),
    "amax": ("aten.amax.default", exchanged("aten.amin.default")),
    "amin": ("aten.amin.default", exchanged("aten.amax.default")),
    "values of max": ("aten.max.dim", exchanged("aten.min.dim")),
    "norm of order 3": ("aten.linalg_vector_norm.default", instead(lambda x, order, *rest: (x, 1, *rest))),
    "largest size": ("aten.linalg_vector_norm.default", instead(lambda x, order, *rest: (x, -order, *rest))),
    "prod": ("aten.prod.dim_int", exchanged("aten.amax.default")),
    "std": ("aten.std.dim", instead(lambda x, dims, unbiased=True, keepdim=False: (x, dims, False, keepdim))),
    "rnn": ("aten.rnn_tanh.input", instead(one_state_more)),
    "rnn of two layers, both ways": ("aten.rnn_tanh.input", instead(other_direction_first)),
    "softmax": ("aten.softmax.int", exchanged("aten.log_softmax.int")),
    "log softmax": ("aten.log_softmax.int", exchanged("aten.softmax.int")),
    "log sum exp": ("aten.logsumexp.default", exchanged("aten.amax.default")),
    "layer norm": ("aten.layer_norm.default", instead(lambda x, shape, weight, bias, *_: (x, shape, weight, bias, 0.5))),
    "group norm": ("aten.group_norm.default", instead(lambda x, groups, *rest: (x, 1, *rest))),
    "larger of two": ("aten.maximum.default", exchanged("aten.minimum.default")),
    "smaller of two": ("aten.minimum.default", exchanged("aten.maximum.default")),
    "quotient": ("aten.div.Tensor", instead(lambda x, y: (y, x))),
    "product": ("aten.mul.Tensor", exchanged("aten.maximum.default")),
    "masked": ("aten.masked_fill.Scalar", instead(lambda x, mask, value: (x, ~mask, value))),
    "variance": ("aten.var.dim", instead(lambda x, dims, *_: (x, dims, 0))),
    "rnn with relu": ("aten.rnn_relu.input", exchanged("aten.rnn_tanh.input")),
}  # fmt: skip


def miscaptured(name: str, key: str, mistake: Callable[[Rewrite], Rewrite]) -> list[str]:
    """Capture a layer with a false rewrite, uncompared, and return what the judge says first."""
    function, shape = {**READ, **REWRITABLE}[name]
    model, x = Classifier(model_of(function, shape)), torch.rand(3, *shape, dtype=torch.float64)
    honest, called = capture(model, x), list[str]()

    def false(*args: Any, **options: Any) -> Any:
        called.append(key)
        return mistake(right)(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        right = COMPOSITIONS[key]
        patch.setitem(COMPOSITIONS, key, false)
        with pytest.raises(CaptureError):  # the mistake is noticed at once, unless nobody looks
            capture(Classifier(model_of(function, shape)), x)
        patch.setattr(capturing, "_compare", lambda *_: None)
        graph = capture(Classifier(model_of(function, shape)), x)
    assert called, f"{key} is no part of {name}"
    wrong = Miswritten(graph.input_shape, graph.nodes, honest=honest)
    for seed in range(6):
        case = nets.case_of(honest, seed, ball=Ball("linf", 0.05, box=None))
        points = attacked(case, seed, steps=1)
        found = violations(replace(case, graph=wrong), points)
        if found:
            assert not violations(case, points)
            return found
    return []


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", COMPOSED)
def test_a_false_rewrite_of_a_composed_operation_is_caught(name: str) -> None:
    assert miscaptured(name, *COMPOSED[name])


def test_every_composed_operation_of_torch_has_a_false_rewrite() -> None:
    own = {**REDUCTIONS, **RECURRENT}
    own |= {key: made for key, made in COMPOSITIONS.items() if REWRITES.get(key) is not made}
    tried = {key.split(".")[1].rstrip("123d") for key, _ in COMPOSED.values()}
    same = {"norm": "linalg_vector_norm", "ge": "gt", "lt": "gt", "le": "gt", "min": "max"}
    same |= {"clamp_min": "clamp", "clamp_max": "clamp", "hardshrink": "softshrink"}
    kinds = {key.split(".")[1].rstrip("123d") for key in own}
    assert {same.get(kind, kind) for kind in kinds} <= tried


def another(kind: str) -> Callable[[Rewrite], Rewrite]:
    """Return the mistake that takes the reader of another operation."""
    return lambda _: VARIABLES[kind]


def unread(_: Rewrite) -> Rewrite:
    """The input itself."""
    return lambda tape, step, v, *rest: v


def halved(right: Rewrite) -> Rewrite:
    """Half of what it should be."""
    return lambda tape, step, *values: tape.pair(
        "aten.mul.Tensor", right(tape, step, *values), torch.tensor(0.5, dtype=tape.dtype)
    )


def constant_changed(change: Callable[[Tensor], Tensor]) -> Callable[[Rewrite], Rewrite]:
    """Return the mistake that reads another constant."""
    return lambda right: lambda tape, step, v, held: right(tape, step, v, change(held))


def numbers(*shape: int) -> Any:
    """Return constants for a file."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).numpy()


ROWS, LINE = (1, 3, 4), (1, 4)
FILES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any], Callable[[Rewrite], Rewrite]]] = {
    "ReduceMax": (ROWS, {}, {"axes": [2]}, another("ReduceMin")),
    "ReduceMin": (ROWS, {}, {"axes": [2]}, another("ReduceMax")),
    "ReduceL1": (ROWS, {}, {"axes": [2]}, another("ReduceSumSquare")),
    "ReduceL2": (ROWS, {}, {"axes": [2]}, another("ReduceL1")),
    "ReduceSumSquare": (ROWS, {}, {"axes": [2]}, another("ReduceL2")),
    "ReduceLogSumExp": (ROWS, {}, {"axes": [2]}, another("ReduceMax")),
    "ReduceLogSum": (ROWS, {}, {"axes": [2]}, another("ReduceLogSumExp")),
    "ReduceProd": (ROWS, {}, {"axes": [2]}, another("ReduceMax")),
    "Greater": (LINE, {}, {}, another("Less")),
    "GreaterOrEqual": (LINE, {}, {}, another("LessOrEqual")),
    "Less": (LINE, {}, {}, another("Greater")),
    "LessOrEqual": (LINE, {}, {}, another("GreaterOrEqual")),
    "LpNormalization": (LINE, {}, {}, another("Softsign")),
    "RMSNormalization": (LINE, {"s": numbers(4)}, {}, constant_changed(lambda s: s.roll(1))),
    "Softsign": (LINE, {}, {}, another("LpNormalization")),
    "Shrink": (LINE, {}, {"lambd": 0.3, "bias": 0.3}, halved),
    "ThresholdedRelu": (LINE, {}, {"alpha": 0.0}, halved),
    "CumSum": (LINE, {"a": torch.tensor(1).numpy()}, {}, unread),
    "Trilu": ((1, 3, 3), {}, {}, unread),
    "GatherElements": (LINE, {"i": torch.tensor([[3, 1, 0]]).numpy()}, {"axis": 1}, constant_changed(lambda i: i.flip(1))),
    "Einsum": (LINE, {"w": numbers(4, 4)}, {"equation": "ab,bc->ac"}, constant_changed(lambda w: w.T)),
}  # fmt: skip


def misread(kind: str, folder: Path) -> list[str]:
    """Read a file with a false reader, and return what the judge says first."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from test_onnx import loaded, model, one

    shape, constants, attributes, mistake = FILES[kind]
    if kind.startswith(("Greater", "Less")):
        nodes = [
            onnx.helper.make_node(kind, ["x", "c"], ["m"]),
            onnx.helper.make_node("Mul", ["x", "s"], ["z"]),
            onnx.helper.make_node("Where", ["m", "z", "x"], ["y"]),
        ]
        held = {"c": torch.zeros(1).numpy(), "s": torch.full((1,), -0.5).numpy()}
        proto = model(nodes, shape, held)
    else:
        proto = one(kind, shape, constants, 23 if kind.startswith("RMS") else 17, **attributes)
    honest = loaded(folder, proto, paired=True).double().graph()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIABLES, kind, mistake(VARIABLES[kind]))
        graph = loaded(folder, proto, paired=True).double().graph()
    wrong = Miswritten(graph.input_shape, graph.nodes, honest=honest)
    for seed in range(6):
        case = nets.case_of(honest, seed, ball=Ball("linf", 0.05, box=None))
        points = attacked(case, seed, steps=1)
        found = violations(replace(case, graph=wrong), points)
        if found:
            assert not violations(case, points)
            return found
    return []


@pytest.mark.one_in(1)
@pytest.mark.parametrize("kind", FILES)
def test_a_false_reader_of_a_composed_operation_is_caught(kind: str, tmp_path: Path) -> None:
    assert misread(kind, tmp_path)


def test_every_reader_of_variables_has_a_false_one() -> None:
    assert FILES.keys() == VARIABLES.keys()


@pytest.mark.slow
def test_no_module_of_the_zoo_holds_an_operation_without_a_mutant() -> None:
    tried = {
        *CALLS,
        *MOVED,
        *POOLS,
        "reshape",
        "output",
        *(
            kind_of(op)
            for name, args in nets.activations()
            if (op := ACTIVATIONS[name](args)) is not None
        ),
    }
    tried |= {"Linear", "Conv", "Scale", "Sum", "MaxPool", "Product", "MatMul", "LogSumExp"}
    found = {kind_of(node.op) for name in nets.ZOO for node in nets.captured(name).nodes}
    assert found <= tried, found - tried
