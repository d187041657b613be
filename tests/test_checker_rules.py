"""Do the rules of the independent checker hold: functions, products, windows, cut-up inputs? Every one by property, and by a mutant that it catches."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_checker import only_proved_by
from torch import Tensor, nn

from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN
from calipers.certificates.input_split import InputSplit
from calipers.certificates.proof_writer import differs
from calipers.graph import smooth_table
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.graph.ir import Node as GraphNode
from calipers.graph.serialise import described
from calipers.graph.smooth_relaxation import Smooth
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.record import checker
from calipers.record.checker import FUNCTIONS, Function, Operation, Proof, prove
from calipers.record.proofs import contents
from calipers.threats.ball import Ball

sys.path.insert(0, str(Path(__file__).parent))
from test_checker import _after, _curve, _leaves, by_hand, rewritten

MADE = (
    smooth_table.softplus(1.0, 20.0), smooth_table.softplus(3.0, 4.0), smooth_table.elu(1.0, 1.0, 1.0), smooth_table.elu(1.6732632423543772, 1.0507009873554805, 1.0),
    smooth_table.elu(2.0, 1.0, 0.5), *(c for p in (3.0, 4.0, -2.0, 1.5, 0.3) if (c := smooth_table.power(p)) is not None),
)  # fmt: skip
SMOOTH: dict[str, Smooth] = {
    c.name: c for c in (*(v for v in vars(smooth_table).values() if isinstance(v, Smooth)), *MADE)
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As the checker is: a NaN proves nothing, and is no error."""
    with np.errstate(all="ignore"):
        yield


def known(op: Smooth) -> Function:
    """Return the checker's function for a smooth operation, by way of its description."""
    network, _ = described(Graph((1,), (GraphNode(op, (0,), (1,), "here"),)))
    (facts,) = network["nodes"]
    return FUNCTIONS[facts["function"]](*facts["parameters"])


def domain(op: Smooth) -> tuple[float, float]:
    """Return where to look at a function."""
    positive = op.name in ("log", "sqrt", "rsqrt", "reciprocal") or op.name.startswith(
        ("power -", "power 1.5", "power 0.3")
    )
    return (0.05, 6.0) if positive else (-0.9, 6.0) if op.name == "log1p" else (-6.0, 6.0)


def intervals(
    op: Smooth, draw: np.random.Generator, count: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """Return random intervals, narrow and wide."""
    first, last = domain(op)
    low = draw.uniform(first, last, count)
    return low, np.minimum(
        low + draw.exponential(1.0, count) * draw.choice([0.0, 1e-3, 1.0, 5.0], count), last
    )


def along(low: np.ndarray, high: np.ndarray, count: int = 300) -> list[np.ndarray]:
    """Return places spread over intervals, their ends first and last."""
    return [low + (high - low) * share for share in np.linspace(0, 1, count)]


@pytest.mark.parametrize("name", SMOOTH)
def test_every_smooth_function_has_its_like_in_the_checker(name: str) -> None:
    op = SMOOTH[name]
    function, t = known(op), np.linspace(*domain(op), 20001)
    theirs = op.value(torch.from_numpy(t)).numpy()
    fall = function.jump[0] * (t >= function.jump[1])
    assert (
        np.abs(function.value(t) - theirs)
        <= checker.ROOM / 4 * (1 + np.abs(t) + np.abs(theirs)) + fall
    ).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_curvature_is_bounded_between_kinks(name: str) -> None:
    op = SMOOTH[name]
    function, t = known(op), np.linspace(*domain(op), 20001)
    x = torch.from_numpy(t).requires_grad_()
    (second,) = torch.autograd.grad(op.derivative(x).sum(), x)
    nonlinear = np.abs(second.numpy())
    away = np.ones(len(t), bool)
    for breakpoint in (*function.breakpoints, function.jump[1]):
        away &= np.abs(t - breakpoint) > 1e-3
    assert function.curvature is not None
    for width in (1, 50, 3000):
        bound = np.broadcast_to(function.curvature(t[:-width], t[width:]), len(t) - width)
        for k in range(0, width + 1, max(1, width // 10)):
            seen = np.where(away[k : len(t) - width + k], nonlinear[k : len(t) - width + k], 0.0)
            assert (seen <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", [*SMOOTH, "two pieces", "clip"])
def test_lines_hold_for_any_slope(name: str) -> None:
    draw = np.random.Generator(np.random.PCG64(2))
    op = SMOOTH.get(name, smooth_table.TANH)
    function = known(op) if name in SMOOTH else FUNCTIONS[name](-0.5, 0.25)
    low, high = intervals(op, draw)
    below, over = (
        draw.choice([0, 1e-7, 1.0, -1.0, 0.25, np.nan, 2.0], 400)
        + draw.normal(size=400) * draw.choice([0, 0.2], 400)
        for _ in range(2)
    )
    with np.errstate(all="ignore"):
        slope, at, upper, upper_at = function.lines(low, high, [below, over])
        level = np.zeros_like(low)
        least, most = function.least(1, level, low, high), -function.least(-1, level, low, high)
        assert np.isfinite(least).all() and np.isfinite(most).all()
        for t in along(low, high):
            y, fall = function.value(t), function.jump[0] * (t > function.jump[1])
            assert (
                (slope[0] * t + at <= y - fall).all()
                and (y <= upper[0] * t + upper_at).all()
                and (least <= y - fall).all()
                and (y <= most).all()
            )


@pytest.mark.parametrize("name", SMOOTH)
def test_lines_lose_next_to_nothing(name: str) -> None:
    # As low as the tool's own lines of the same slopes, but for what the last cells leave.
    draw = np.random.Generator(np.random.PCG64(3))
    op = SMOOTH[name]
    function, (low, high) = known(op), intervals(op, draw)
    lines = op.relax(
        torch.from_numpy(low), torch.from_numpy(high), torch.from_numpy(draw.uniform(size=400))
    )
    with np.errstate(all="ignore"):
        _, at, _, upper_at = function.lines(
            low, high, [lines.lower_slope.numpy(), lines.upper_slope.numpy()]
        )
        assert function.curvature is not None
        curved = np.broadcast_to(function.curvature(low, high), low.shape) * (high - low) ** 2
    room = 1e-4 * curved + 1e-8 + 4 * function.jump[0]
    assert (lines.lower_intercept.numpy() - at <= room).all() and (
        upper_at - lines.upper_intercept.numpy() <= room
    ).all()


def test_where_functions_are_not_defined_nothing_is_proved() -> None:
    for name, low, high in (
        ("log", -1.0, 1.0),
        ("log", 0.0, 1.0),
        ("sqrt", -1.0, 1.0),
        ("reciprocal", -1.0, 1.0),
        ("rsqrt", 0.0, 1.0),
        ("power -2.0", -1.0, 2.0),
    ):
        ends = np.array([low]), np.array([high])
        with np.errstate(all="ignore"):
            assert np.isneginf(known(SMOOTH[name]).least(1, np.zeros(1), *ends)).all(), name


# ---- operations on several numbers -----------------------------------------------------------------------------------------------------------------


def node(
    kind: str,
    arrays: dict[str, np.ndarray],
    inputs: list[int],
    size: int,
    shapes: list[tuple[int, ...]],
    **facts: Any,
) -> Operation:
    """Return an operation of a proof file."""
    return Operation({"op": kind, "inputs": inputs, "shape": [size], **facts}, arrays, shapes)


def boxes(draw: np.random.Generator, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes, some of which are points on some sides."""
    low = draw.normal(size=(count, size)) * 2
    return low, low + np.abs(draw.normal(size=(count, size))) * draw.choice(
        [0.0, 0.1, 3.0], (count, size)
    )


def operations(draw: np.random.Generator) -> dict[str, tuple[Operation, list[int]]]:
    """Return each kind of operation that is not affine, and the sizes of its inputs."""
    pairs = {
        "left": draw.integers(0, 5, 9),
        "right": draw.integers(0, 4, 9),
        "into": draw.integers(0, 3, 9),
    }
    windows = np.stack([draw.choice(6, 3, replace=False) for _ in range(4)])
    padded = windows.copy()
    padded[1, 2] = padded[3, 0] = 6
    return {
        "product": (node("product", pairs, [0, 1], 3, [(5,), (4,)]), [5, 4]),
        "largest": (node("largest", {"windows": padded}, [0], 4, [(6,)]), [6]),
        "logsumexp": (node("logsumexp", {"windows": windows}, [0], 4, [(6,)], share=0.25), [6]),
    }


def evaluated(one: Operation, x: list[np.ndarray]) -> np.ndarray:
    """Return what an operation makes of inputs (B, n), written down once more."""
    if one.kind == "product":
        every = x[0][:, one.held["left"]] * x[1][:, one.held["right"]]
        return np.stack([every[:, one.held["into"] == k].sum(1) for k in range(one.size)], 1)
    members = np.concatenate([x[0], np.full((len(x[0]), 1), -np.inf)], 1)[:, one.held["windows"]]
    return (
        members.max(2)
        if one.kind == "largest"
        else one.facts["share"] * np.log(np.exp(members).sum(2))
    )


def planed(one: Operation, slopes: np.ndarray, at: np.ndarray, x: list[np.ndarray]) -> np.ndarray:
    """Return the value of planes at inputs."""
    total = at.copy()
    for n, term in enumerate(one.terms):
        assert term is not None
        into, index = term
        inputs = np.concatenate([x[n], np.zeros((len(x[n]), 1))], 1)[:, index] * slopes[n]
        for k in range(one.size):
            total[:, k] += inputs[:, into == k].sum(1)
    return total


@pytest.mark.parametrize("kind", ["product", "largest", "logsumexp"])
def test_operations_lie_between_their_planes(kind: str) -> None:
    draw = np.random.Generator(np.random.PCG64(4))
    for _ in range(10):
        one, sizes = operations(draw)[kind]
        ends = [boxes(draw, 40, size) for size in sizes]
        for given in ([None, None], [draw.uniform(-0.5, 1.5, (40, one.size)) for _ in range(2)]):
            low, low_at, high, high_at = one.planes(ends, given)
            _, least, _, most = one.planes(ends, given, flat=True)
            for _ in range(30):
                share = [
                    draw.choice([0.0, 1.0], end[0].shape)
                    if draw.random() < 0.5
                    else draw.uniform(size=end[0].shape)
                    for end in ends
                ]
                x = [end[0] + s * (end[1] - end[0]) for s, end in zip(share, ends, strict=True)]
                y, tiny = evaluated(one, x), 1e-12
                assert (least <= y + tiny).all() and (y <= most + tiny).all()
                assert (planed(one, low, low_at, x) <= y + tiny).all() and (
                    y <= planed(one, high, high_at, x) + tiny
                ).all()


def test_planes_are_those_that_tools_use() -> None:
    # Products touch at corners, the logarithm of a sum in the middle: a plane that held for another reason would not.
    draw = np.random.Generator(np.random.PCG64(5))
    one = node(
        "product",
        {"left": np.arange(3), "right": np.arange(3), "into": np.arange(3)},
        [0, 1],
        3,
        [(3,), (3,)],
    )
    ends = [boxes(draw, 20, 3) for _ in range(2)]
    low, low_at, _, _ = one.planes(ends, [None, None])
    np.testing.assert_allclose(low[0], ends[1][0])
    np.testing.assert_allclose(low_at, -ends[0][0] * ends[1][0], atol=1e-12)
    pool, sizes = operations(draw)["logsumexp"]
    end = boxes(draw, 20, sizes[0])
    middle = (end[0] + end[1]) / 2
    low, low_at, _, _ = pool.planes([end], [None, None])
    np.testing.assert_allclose(
        planed(pool, low, low_at, [middle]), evaluated(pool, [middle]), atol=1e-11
    )


# ---- mutants ---------------------------------------------------------------------------------------------------------------------------------------


def _two(
    kind: str,
    arrays: dict[str, np.ndarray],
    weight: float,
    bias: float,
    choices: dict[str, np.ndarray] | None = None,
    **facts: Any,
) -> bytes:
    """Return a file about weight * f(x, -x) + bias for x in [-1, 1]."""
    first = {"op": "linear", "inputs": [0], "shape": [2]}
    second = {"op": kind, "inputs": [1, 1] if kind == "product" else [1], "shape": [1], **facts}
    held = {
        "net.1.weight": np.array([[1.0], [-1.0]]),
        "net.3.weight": np.full((1, 1), weight),
        "net.3.bias": np.array([bias]),
    }
    arrays = {f"net.2.{name}": value for name, value in arrays.items()}
    return by_hand(
        [first, second, {"op": "linear", "inputs": [2], "shape": [1]}],
        {**held, **arrays, **(choices or {})},
        _leaves(1),
    )


PAIR = {"left": np.array([0]), "right": np.array([1]), "into": np.array([0])}
SADDLE = _two("product", PAIR, 1.0, 0.9, {"pass0.2.low": np.full((1, 1), 0.5)})
"""0.9 - x^2, negative at both ends, by the mean of both planes."""
POOL = _two("logsumexp", {"windows": np.array([[0, 1]])}, -1.0, 1.1, share=1.0)
"""1.1 - log(exp(x) + exp(-x)), negative at both ends."""
VALLEY = _two("logsumexp", {"windows": np.array([[0, 1]])}, 1.0, -0.7, share=1.0)
"""log(exp(x) + exp(-x)) - 0.7, negative at 0 alone."""
MOST = _two("largest", {"windows": np.array([[0, 1]])}, -1.0, 0.5)
"""0.5 - |x|."""
FALL = _after(_curve("softplus", 1.0, 0.5), 1.0, -0.51)
"""softplus(x) - 0.51 up to 0.5, x - 0.51 from there on: negative just above 0.5, and below -0.4."""


def _halves(gap: float = 0.0, start: float = -1.001, bias: float = 2.0) -> bytes:
    """Return a file about |x| + bias in two parts, [start, -gap] and [gap, 1]."""
    part = {
        "pass0.part.place": np.zeros(1, int),
        "pass0.part.low": np.array([[start], [gap]]),
        "pass0.part.high": np.array([[-gap], [1.001]]),
    }
    nodes = [
        {"op": "linear", "inputs": [0], "shape": [1]},
        _curve("two pieces", -1.0, 1.0),
        {"op": "linear", "inputs": [2], "shape": [1]},
    ]
    held = {
        "net.1.weight": np.ones((1, 1)),
        "net.3.weight": np.ones((1, 1)),
        "net.3.bias": np.array([bias]),
    }
    return by_hand(nodes, {**held, **part}, {**_leaves(2), "part": np.arange(2)})


HOLE = _halves(0.1, bias=-0.05)
"""|x| - 0.05, false at 0, which lies in neither part."""
MUTANTS: dict[str, tuple[dict[str, str], bytes]] = {
    "products at two corners only": (
        {"for a in ends[0] for b in ends[1]]": "for a, b in zip(ends[0], ends[1], strict=True)]"},
        SADDLE,
    ),
    "sums of exponentials without chords": (
        {"- 1 + (low / t - chord * lows).sum(2)": "- 1 - (chord * lows).sum(2)"},
        POOL,
    ),
    "a tangent above its function": (
        {"total(middle) - (weight * middle).sum(2)": "total(highs) - (weight * middle).sum(2)"},
        VALLEY,
    ),
    "the largest by its lower end": (
        {"np.where(wins, 0.0, highs.max(2))": "np.where(wins, 0.0, lows.max(2))"},
        MOST,
    ),
    "parts that may leave a gap": (
        {"if covered(low, high,": "if True or covered(low, high,"},
        HOLE,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_a_rule_proves_what_is_false(name: str) -> None:
    assert only_proved_by(*MUTANTS[name])


@pytest.mark.parametrize("name", ["left", "right", "into"])
def test_places_of_different_lengths_are_rejected(name: str) -> None:
    pairs = {key: np.zeros(3, int) for key in PAIR}
    assert "not above 0" in prove(_two("product", pairs, 1.0, 0.9)).reason
    assert (
        "fit together" in prove(_two("product", {**pairs, name: np.zeros(1, int)}, 1.0, 0.9)).reason
    )
    entries = {"row0": np.zeros(2, int), "column0": np.arange(2), "value0": np.ones(2)}
    assert prove(_two("matrix", entries, 1.0, 0.9)).proved  # x - x
    for short in entries:
        assert (
            "fit together"
            in prove(_two("matrix", {**entries, short: entries[short][:1]}, 1.0, 0.9)).reason
        )


def test_parts_have_to_cover_the_threat() -> None:
    assert prove(_halves()).proved and prove(_halves(start=-1.5)).proved
    for bad in (_halves(0.1), _halves(1e-9), _halves(start=-0.99)):
        assert "cover" in prove(bad).reason


def test_a_function_that_falls_is_bounded_behind_its_fall() -> None:
    function = FUNCTIONS["softplus"](1.0, 0.5)
    with np.errstate(all="ignore"):
        least = function.least(1, np.zeros(1), np.array([0.4]), np.array([1.0]))
    assert least <= 0.5 and function.value(np.array([0.5])) > 0.9
    assert "not above 0" in prove(FALL).reason


# ---- whole networks ------------------------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One head of attention over three tokens, a layer norm, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.key, self.value, self.last = (
            nn.Linear(2, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x.view(-1, 3, 2))
        t = t + torch.softmax(self.query(t) @ self.key(t).transpose(1, 2) / 2, -1) @ self.value(t)
        return self.last((self.norm(t) * torch.sigmoid(t)).mean(1))


SMALL: dict[str, Any] = {
    "attention": Attention,
    **{
        act.__name__: lambda act=act: nn.Sequential(
            nn.Linear(6, 6), act(), nn.Linear(6, 6), act(), nn.Linear(6, 3)
        )
        for act in (
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            nn.Softplus,
            nn.ELU,
            nn.SELU,
            nn.Hardswish,
            nn.LogSigmoid,
            nn.Tanh,
            nn.ReLU,
        )
    },
}
RADII = {"linf": 0.02, "l2": 0.04, "l1": 0.08}
TOOLS = (
    CROWN(proofs=True),
    AlphaCROWN(steps=4, intermediate=3, proofs=True),
    BranchAndBound(seconds=2, steps=4, intermediate=3, proofs=True),
    InputSplit(1.0, proofs=True),
)


def small(kind: str, seed: int, norm: str, share: float, points: int = 2) -> Problem:
    """Return random points and a random network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, x = SMALL[kind]().eval(), torch.rand(points, 6)
    return Problem.pose(module, x, module(x).argmax(1), Ball(norm, RADII[norm] * share))


def proofs(problem: Problem, tools: tuple[Any, ...] = TOOLS) -> list[tuple[int, bytes]]:
    """Return all proofs of all claims, by place."""
    claims = (claim for tool in tools for claim in tool(problem) if isinstance(claim, Claim))
    return [
        (i, data)
        for claim in claims
        for i, data in zip(claim.index.tolist(), claim.proofs or (), strict=False)
        if data is not None
    ]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("norm", tuple(RADII))
@pytest.mark.parametrize("kind", SMALL)
def test_certificates_of_smooth_networks_are_proved_again(kind: str, norm: str) -> None:
    made = 0
    for seed, share in ((1, 0.3), (2, 1.5)):
        problem = small(kind, seed, norm, share)
        for i, data in proofs(problem):
            verdict = prove(data)
            assert verdict.proved, verdict.reason
            assert not differs(problem, i, data)
            made += 1
    assert made > 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("norm", tuple(RADII))
@pytest.mark.parametrize("kind", SMALL)
def test_no_bound_of_the_checker_lies_above_a_sample(kind: str, norm: str) -> None:
    # At a radius that holds a counterexample, none of the leaves' bounds may be larger than the margins that were sampled there.
    problem = small(kind, 3, norm, 0.5, points=1)
    generator = torch.Generator().manual_seed(0)
    for _, data in proofs(problem)[:3]:
        for radius in (RADII[norm] * 2, 0.5, 3.0):
            wide = rewritten(
                data, lambda header, _, radius=radius: header["threat"].update(radius=radius)
            )
            part = problem.at(torch.tensor([radius], dtype=torch.float64))
            region = part.region.take([0] * 500)
            x = region.project(
                part.x[0] + (torch.rand(500, 6, generator=generator) - 0.5) * 4 * radius
            )
            worst = part.goal.worst(
                part.goal.margins(part.classifier.logits64(x), part.y.expand(500))
            )
            assert not (prove(wide).proved and float(worst.min()) <= 0)


def split() -> tuple[Problem, bytes]:
    """Return a problem and its proof by several boxes of the input."""
    for seed, share in itertools.product(range(20), (8, 12, 16, 24)):
        problem = small("ReLU", seed, "linf", share, points=1)
        for _, data in proofs(problem, (InputSplit(5.0, proofs=True),)):
            if prove(data).leaves >= 6:
                return problem, data
    raise AssertionError("no point needs several boxes")


def test_boxes_of_an_input_are_proved_again_and_none_is_to_spare() -> None:
    problem, data = split()
    _, arrays = contents(data)
    assert prove(data).proved and not differs(problem, 0, data)
    (name,) = [n for n in arrays if n.endswith("part.low")]

    def shifted(header: dict[str, Any], held: dict[str, Any]) -> None:
        held[name] = held[name].astype(float)
        held[name][0] += 1e-6 * np.arange(held[name].shape[1])

    def wider(header: dict[str, Any], held: dict[str, Any]) -> None:
        high = name.replace("low", "high")
        held[high] = held[high].astype(float)
        held[high][0] += 1.0

    def without(header: dict[str, Any], held: dict[str, Any]) -> None:
        keep = next(n for n in held if n.endswith(".case")).partition(".")[0]
        for column in ("part", "case", "weights"):
            held[f"{keep}.{column}"] = held[f"{keep}.{column}"][1:]

    for change in (shifted, without):
        assert "cover" in prove(rewritten(data, change)).reason
    # larger than needed is no lie
    assert (
        "not above 0" in prove(rewritten(data, wider)).reason
        or prove(rewritten(data, wider)).proved
    )


def test_a_larger_threat_is_not_covered_by_its_boxes() -> None:
    _, data = split()
    assert (
        "cover"
        in prove(
            rewritten(
                data,
                lambda header, _: header["threat"].update(radius=header["threat"]["radius"] * 1.01),
            )
        ).reason
    )


def test_any_weights_of_planes_are_sound() -> None:
    problem = small("attention", 1, "linf", 1.0)
    draw = np.random.Generator(np.random.PCG64(6))
    for i, data in proofs(problem, (CROWN(proofs=True),)):
        numbers = [k for k, one in enumerate(Proof(data).nodes, start=1) if one.kind == "product"]
        assert numbers

        def tilt(
            header: dict[str, Any],
            held: dict[str, Any],
            numbers: list[int] = numbers,
            size: float = 1.0,
            far: float = 0.0,
        ) -> None:
            for k in numbers:
                for side in ("low", "high"):
                    held[f"pass0.{k}.{side}"] = draw.uniform(
                        -size, 1 + size, (1, math.prod(header["network"]["nodes"][k - 1]["shape"]))
                    )
            header["threat"]["radius"] = max(far, header["threat"]["radius"])

        other = torch.rand(2000, 6, generator=torch.Generator().manual_seed(i))
        wrong = other[problem.classifier.logits(other).argmax(1) != problem.y[i]]
        if len(wrong):
            far = float((wrong - problem.x[i]).abs().amax(1).min())
            assert not prove(rewritten(data, lambda h, a, far=far: tilt(h, a, far=far))).proved


def test_the_network_of_the_file_is_the_model_with_attention() -> None:
    problem = small("attention", 7, "linf", 0.1)
    _, data = proofs(problem, (CROWN(proofs=True),))[0]
    proof, graph = Proof(data), graph_of(problem.classifier, problem.x)
    for x in problem.x.double():
        values, theirs = [x.numpy().reshape(1, -1)], graph.to(torch.float64).values(x[None])
        for k, one in enumerate(proof.nodes, start=1):
            inputs = [values[i] for i in one.inputs]
            if one.affine:
                values.append(
                    sum(
                        forward(v, np.asarray)
                        for (forward, _), v in zip(one.maps, inputs, strict=True)
                    )
                    + one.constant
                )
            else:
                values.append(
                    one.function.value(inputs[0])
                    if one.kind == "function"
                    else evaluated(one, inputs)
                )
            np.testing.assert_allclose(
                values[-1][0], theirs[k].flatten().numpy(), rtol=1e-9, atol=1e-9
            )
