"""Is the allowance for rounding large enough? Sums, networks and traps evaluated exactly, in
rational numbers.

A float64-checked bound speaks about the network in real arithmetic. So every claim here is compared
with `fractions.Fraction`, without any tolerance.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from calipers.bounds.backward import interval_margin_bounds, margin_bounds, relax
from calipers.bounds.coefficients import Dense
from calipers.bounds.interval import Box
from calipers.bounds.rounding import CHECKED, SEARCH, Arithmetic, plain_sums
from calipers.graph.activations import TwoPieces
from calipers.graph.affine import Linear
from calipers.graph.capture import capture
from calipers.graph.ir import Graph, Node
from calipers.graph.relaxations import Lines
from calipers.models.classifier import Classifier
from calipers.threats.ball import Ball

UNCHECKED = Arithmetic(torch.float64, checked=False)
RELU = TwoPieces(0.0, 1.0)
Vector = list[Fraction]


# ---- sums
# --------------------------------------------------------------------------------------------------


def sums_in_many_orders(a: Tensor, b: Tensor, draw: random.Random) -> list[float]:
    """Return <a, b> as computed in several orders and blockings."""
    products = (a * b).tolist()
    shuffled = draw.sample(products, len(products))
    running = [0.0, 0.0, 0.0]
    for forward, backward, other in zip(products, reversed(products), shuffled, strict=True):
        running = [running[0] + forward, running[1] + backward, running[2] + other]
    blocks = [float(p.sum()) for p in (a * b).split(7)]
    return [
        *running,
        sum(blocks),
        float(a @ b),
        float(torch.linalg.vecdot(a, b)),
        float((a * b).sum()),
        float(nn.functional.linear(a[None], b[None])),
    ]


@pytest.mark.parametrize("terms", [1, 2, 3, 17, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gamma_bounds_a_sum_in_any_order(terms: int, dtype: torch.dtype) -> None:
    draw, generator = random.Random(terms), torch.Generator().manual_seed(terms)
    arithmetic = Arithmetic(dtype, checked=True)
    for spread in (0.0, 1.0, 4.0):
        sizes = 10 ** (spread * torch.randn(2, terms, generator=generator, dtype=torch.float64))
        a, b = (torch.randn(2, terms, generator=generator, dtype=torch.float64) * sizes).to(dtype)
        b[-1] = -(a[:-1] @ b[:-1]) / a[-1] if terms > 1 else b[-1]  # cancels almost all of the sum
        products = [Fraction(p) * Fraction(q) for p, q in zip(a.tolist(), b.tolist(), strict=True)]
        exact, size = sum(products), sum(abs(p) for p in products)
        for computed in sums_in_many_orders(a, b, draw):
            assert abs(Fraction(computed) - exact) <= Fraction(arithmetic.gamma(terms)) * size


def test_gamma_is_zero_where_rounding_is_not_accounted_for() -> None:
    assert SEARCH.gamma(1000) == UNCHECKED.gamma(3) == 0.0
    assert SEARCH.guarantee == "real" and CHECKED.guarantee == "float64-checked"


def test_gamma_grows_with_the_terms_and_with_the_coarseness() -> None:
    steps = [CHECKED.gamma(n) for n in (0, 1, 10, 10_000, 10_000_000)]
    assert steps == sorted(steps) and steps[0] > 0 and steps[-1] < 1e-8
    assert Arithmetic(torch.float32, checked=True).gamma(10) > 1e6 * CHECKED.gamma(10)


# ---- networks, exactly
# --------------------------------------------------------------------------------------------------


def network(*layers: tuple[Tensor, Tensor | None] | TwoPieces) -> Graph:
    """Return a dense graph of (weight, bias) pairs and activations."""
    first = next(layer for layer in layers if isinstance(layer, tuple))
    nodes, shape = [], (first[0].shape[1],)
    for number, layer in enumerate(layers):
        op = Linear(*layer) if isinstance(layer, tuple) else layer
        shape = (layer[0].shape[0],) if isinstance(layer, tuple) else shape
        nodes.append(Node(op, (number,), shape, "exact"))
    return Graph((first[0].shape[1],), tuple(nodes))


def exact_values(graph: Graph, x: Vector) -> list[Vector]:
    """Return every number of a dense ReLU network in rational arithmetic."""
    results = [x]
    for node in graph.nodes:
        inputs = results[-1]
        if isinstance(node.op, Linear):
            rows = [[Fraction(w) for w in row] for row in node.op.weight.tolist()]
            bias = (
                [Fraction(0)] * len(rows)
                if node.op.bias is None
                else [Fraction(b) for b in node.op.bias.tolist()]
            )
            results.append(
                [
                    sum((w * v for w, v in zip(row, inputs, strict=True)), b)
                    for row, b in zip(rows, bias, strict=True)
                ]
            )
        else:
            results.append([max(v, Fraction(0)) for v in inputs])
    return results


def corners(x: Tensor, radius: float, box: tuple[float, float] | None) -> list[Vector]:
    """Return the corners of an linf ball cut by a box, exactly."""
    ends = []
    for value in map(Fraction, x.tolist()):
        low, high = value - Fraction(radius), value + Fraction(radius)
        ends.append(
            (low, high)
            if box is None
            else (max(low, Fraction(box[0])), min(high, Fraction(box[1])))
        )
    return [list(corner) for corner in itertools.product(*ends)]


def bounds(
    graph: Graph, x: Tensor, ball: Ball, arithmetic: Arithmetic = CHECKED
) -> tuple[dict[int, Box], float, float]:
    """Return the boxes of one point, and the lower bounds of logit 0 minus logit 1 by CROWN and by
    intervals.
    """
    rows = torch.tensor([[[1.0, -1.0]]])
    region = ball.region(x[None].to(arithmetic.dtype), outward=True)
    with torch.no_grad(), plain_sums():
        tight, loose = (
            relax(graph.to(arithmetic.dtype), region, arithmetic, refine=refine)
            for refine in (True, False)
        )
        return (
            tight.boxes,
            float(margin_bounds(tight, rows)),
            float(interval_margin_bounds(loose, rows)),
        )


def too_high(
    graph: Graph,
    x: Tensor,
    radius: float,
    box: tuple[float, float] | None,
    arithmetic: Arithmetic = CHECKED,
) -> list[str]:
    """Name every bound that the exact value at some corner of the region crosses; a bound that is
    not finite claims nothing.
    """
    boxes, crown, interval = bounds(graph, x, Ball("linf", radius, box), arithmetic)
    found = []
    for corner in corners(x, radius, box):
        values = exact_values(graph, corner)
        margin = values[-1][0] - values[-1][1]
        found += [
            f"{name}: {bound} > {float(margin)}"
            for name, bound in (("CROWN", crown), ("intervals", interval))
            if math.isfinite(bound) and Fraction(bound) > margin
        ]
        for number, value in enumerate(values):
            ends = zip(
                boxes[number].lower[0].tolist(), value, boxes[number].upper[0].tolist(), strict=True
            )
            found += [
                f"number {number}"
                for low, v, high in ends
                if (math.isfinite(low) and v < Fraction(low))
                or (math.isfinite(high) and v > Fraction(high))
            ]
    return found


def mixed(generator: torch.Generator, *shape: int, spread: float) -> Tensor:
    """Return weights whose sizes spread over that many powers of ten, both ways."""
    size = 10 ** (spread * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * size


def ill_conditioned(
    seed: int, *, linear: bool
) -> tuple[Graph, Tensor, float, tuple[float, float] | None]:
    """Return a network whose last layer cancels almost everything the layers before made, with a
    point, a radius and a box.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    spread = draw.choice([0.5, 3.0, 8.0])
    inputs, width = 3, draw.choice([2, 4])
    hidden = (
        mixed(generator, width, inputs, spread=spread),
        mixed(generator, width, spread=spread),
    )
    second = (
        mixed(generator, width, width, spread=spread),
        mixed(generator, width, spread=spread) if draw.random() < 0.5 else None,
    )
    layers = [hidden, second] if linear else [hidden, RELU, second, RELU]
    x = torch.rand(inputs, generator=generator, dtype=torch.float64)
    features = network(*layers).values(x[None])[-1][0]
    row = mixed(generator, 1, width, spread=spread)
    last = torch.cat(
        [row, row * (1 + 1e-13 * torch.randn(row.shape, generator=generator, dtype=torch.float64))]
    )
    bias = torch.stack([draw.choice([0.0, 1e-9, 1.0]) - features @ last[0], -(features @ last[1])])
    return (
        network(*layers, (last, bias)),
        x,
        10 ** draw.uniform(-14, -1),
        draw.choice([None, (0.0, 1.0)]),
    )


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "relu"])
def test_bounds_of_ill_conditioned_networks_lie_below_the_exact_values(
    block: int, linear: bool
) -> None:
    for seed in range(block * 40, block * 40 + 40):
        assert not too_high(*ill_conditioned(seed, linear=linear)), f"seed {seed}"


def test_mutant_without_allowances_is_caught() -> None:
    assert (
        sum(bool(too_high(*ill_conditioned(seed, linear=True), UNCHECKED)) for seed in range(60))
        > 10
    )


def test_the_allowance_costs_next_to_nothing_on_a_well_conditioned_network() -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (2, 5))
    )
    graph = network((first, None), RELU, (last, None))
    x = torch.rand(4, generator=generator, dtype=torch.float64)
    checked, unchecked = (
        bounds(graph, x, Ball("linf", 0.1), arithmetic)[1] for arithmetic in (CHECKED, UNCHECKED)
    )
    assert 0 < unchecked - checked < 1e-11


# ---- traps
# --------------------------------------------------------------------------------------------------


def back_door(big: float, *, relu: bool) -> Graph:
    """Return a network whose margin is exactly 1/2 - x, though floats that add x to `big` first see
    1/2 (after Zombori et al. 2021).
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    layers = [
        (one, torch.tensor([big], dtype=torch.float64)),
        *([RELU] if relu else []),
        (one, torch.tensor([-big], dtype=torch.float64)),
    ]
    return network(
        *layers,
        *([RELU] if relu else []),
        (
            torch.tensor([[0.0], [1.0]], dtype=torch.float64),
            torch.tensor([0.5, 0.0], dtype=torch.float64),
        ),
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("power", [20, 52, 53, 54, 60, 200, 1000])
def test_back_door_that_hides_in_rounding_is_not_certified(power: int, relu: bool) -> None:
    graph, x = back_door(2.0**power, relu=relu), torch.zeros(1, dtype=torch.float64)
    assert exact_values(graph, [Fraction(1)])[-1][0] < exact_values(graph, [Fraction(1)])[-1][1]
    assert not too_high(graph, x, 1.0, None)
    _, crown, interval = bounds(graph, x, Ball("linf", 1.0, None))
    assert not crown > 0 and not interval > 0


@pytest.mark.parametrize("arithmetic", [CHECKED, SEARCH], ids=["checked", "search"])
def test_overflow_is_never_certified(arithmetic: Arithmetic) -> None:
    # The margin is 1 - relu(relu(big^2 x) - 1): at x > 0 it falls without end, but every box beyond
    # is infinite or not a number.
    for power in (20, 30, 100, 160, 300):
        big, one = (
            torch.full((1, 1), 10.0**power, dtype=torch.float64),
            torch.ones(1, 1, dtype=torch.float64),
        )
        logits = torch.cat([0 * one, one]), torch.tensor([1.0, 0.0], dtype=torch.float64)
        graph = network((big, None), RELU, (big, None), RELU, (one, -one[0]), RELU, logits)
        _, crown, interval = bounds(
            graph, torch.zeros(1, dtype=torch.float64), Ball("linf", 0.1, None), arithmetic
        )
        assert not crown > 0 and not interval > 0, power


def test_underflow_is_never_certified() -> None:
    # The product of the first two weights vanishes in float64, and later ones bring it back: the
    # exact margin at x = 1 is 1 - 1e17 * (1.5e-16 - 1e-17) = -13.
    def layer(weight: float, bias: float = 0.0) -> tuple[Tensor, Tensor]:
        return torch.tensor([[weight]], dtype=torch.float64), torch.tensor(
            [bias], dtype=torch.float64
        )

    logits = (
        torch.tensor([[0.0], [1e17]], dtype=torch.float64),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    graph = network(layer(1e-162), RELU, layer(1.5e-162), RELU, layer(1e308, -1e-17), RELU, logits)
    assert exact_values(graph, [Fraction(1)])[-1][0] < exact_values(graph, [Fraction(1)])[-1][1]
    assert not too_high(graph, torch.zeros(1, dtype=torch.float64), 1.0, None)


def exact_batch_norm(x: Fraction, mean: float, scale: Fraction, bias: float) -> Fraction:
    """Return (x - mean) * scale + bias."""
    return (x - Fraction(mean)) * scale + Fraction(bias)


def layer_before(kind: str, bias: float) -> list[nn.Module]:
    """Return x + bias as a layer that a batch norm is merged into."""
    layer: nn.Module = {"linear": nn.Linear(1, 1), "conv": nn.Conv1d(1, 1, 1)}[kind].double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(bias)
    return [layer] if kind == "linear" else [nn.Unflatten(1, (1, 1)), layer]


@pytest.mark.parametrize(
    "before",
    ["nothing", "linear", "conv", "linear with a bias", "conv with a bias", "linear, scaled again"],
)
def test_batch_norm_whose_constants_cancel_is_not_certified_falsely(before: str) -> None:
    """Folding a batch norm into one factor and one shift, and these into the layer before, rounds
    by what cancels, not by what is left of it.
    """
    wrong = []
    for seed in range(10):
        draw = random.Random(seed)
        mean, weight = draw.uniform(1, 2) * 2.0**20, draw.uniform(0.5, 1.0)
        added = draw.uniform(1, 2) * 2.0**20 if before.endswith("bias") else 0.0
        shift = (mean - added) * weight
        front = [] if before == "nothing" else layer_before(before.split()[0].strip(","), added)
        # changes nothing, and has no large constants of its own
        again = [nn.BatchNorm1d(1, eps=0.0).double()] if before.endswith("again") else []
        norm = nn.BatchNorm1d(1, eps=0.0).double().eval()
        with torch.no_grad():
            norm.running_mean.fill_(mean)
            norm.running_var.fill_(1.0)
            norm.weight.fill_(weight)
            norm.bias.fill_(shift)
        last = nn.Linear(1, 2).double()
        with torch.no_grad():
            last.weight.copy_(torch.tensor([[1.0], [0.0]]))
            last.bias.zero_()
        graph = capture(
            Classifier(nn.Sequential(*front, norm, *again, nn.Flatten(), last).eval()),
            torch.zeros(3, 1, dtype=torch.float64),
        )
        assert any(type(node.op).__name__ == "Scale" for node in graph.nodes) == (
            before == "nothing"
        )
        exact = exact_batch_norm(Fraction(-1e-3) + Fraction(added), mean, Fraction(weight), shift)
        _, crown, interval = bounds(
            graph, torch.zeros(1, dtype=torch.float64), Ball("linf", 1e-3, None)
        )
        wrong += [
            (seed, name)
            for name, bound in (("CROWN", crown), ("intervals", interval))
            if Fraction(bound) > exact
        ]
    assert not wrong


# ---- how sums are run
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tf32", [True, False])
def test_plain_sums_puts_the_switches_back(tf32: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.enabled
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with plain_sums():
            assert (
                torch.backends.cuda.matmul.fp32_precision != "tf32"
                and not torch.backends.cudnn.enabled
            )
        assert (
            torch.backends.cuda.matmul.allow_tf32 == tf32 and torch.backends.cudnn.enabled == cudnn
        )
        with pytest.raises(ZeroDivisionError), plain_sums():
            raise ZeroDivisionError
        assert (
            torch.backends.cuda.matmul.allow_tf32 == tf32 and torch.backends.cudnn.enabled == cudnn
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def test_plain_sums_works_where_the_user_chose_tf32_by_its_new_name() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with plain_sums():
            assert torch.backends.cuda.matmul.fp32_precision != "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- relaxed operations
# --------------------------------------------------------------------------------------------------


def coefficients_err_by(size: Callable[[Lines, Box], Tensor]) -> float:
    """Return the largest error of a coefficient that a relaxation computes, in roundings of the
    size its allowance is made of.
    """
    generator = torch.Generator().manual_seed(0)
    low, high, a = (torch.randn(400_000, generator=generator) * 2 for _ in range(3))
    zero, one = torch.zeros_like(low), torch.ones_like(low)
    lines = Lines(low[None], zero[None], high[None], zero[None])
    computed = Dense(a[None, None], None).through(lines, [])[0][0].dense().a[0, 0]
    # a product of two float32 numbers is a float64 number
    exact = torch.where(a > 0, a.double() * low.double(), a.double() * high.double())
    allowed = (
        torch.finfo(torch.float32).eps
        / 2
        * a.abs().double()
        * size(lines, Box(-one[None], one[None]))[0].double()
    )
    return float(((computed.double() - exact).abs() / allowed).max())


def test_the_allowance_of_a_relaxed_operation_counts_both_lines() -> None:
    """The slope is computed as the lower line's and the rise from it, which may cancel: at most
    three roundings of both sizes together.
    """
    assert 1 < coefficients_err_by(lambda lines, box: lines.size(box.magnitude)) <= 3


def test_mutant_that_counts_the_lines_themselves_is_caught() -> None:
    assert (
        coefficients_err_by(
            lambda lines, box: (
                torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs()) * box.magnitude
            )
        )
        > 3
    )
