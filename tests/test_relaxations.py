"""Do the lines of every activation sandwich it, for every alpha, on every interval, in floating
point? Compared in 60-digit arithmetic, without any tolerance.

The lines are floating-point slopes and intercepts, taken exactly. Checked is the claim about real
numbers, slope * x + intercept <= f(x) for every x of the interval: at the ends, at the function's
corners and inflections, between them, and where the difference is smallest (found by a
golden-section search).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import nets
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from calipers.graph import products, smooth_relaxation, smooth_table
from calipers.graph.activations import ACTIVATIONS, Clip, TwoPieces
from calipers.graph.kinds import Elementwise
from calipers.graph.products import SELECTIONS, MaxPool, Product
from calipers.graph.smooth_relaxation import Smooth, Wave, _everywhere
from calipers.graph.smooth_table import CURVES

DTYPES = [torch.float64, torch.float32]
ENTRIES = nets.activations()
ALPHAS = (None, 0.0, 1.0, 0.37)


@pytest.fixture(autouse=True)
def _sixty_digits() -> Iterator[None]:
    with mpmath.workdps(60):
        yield


def _sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def _elu(alpha: mpf, scale: mpf, inner: mpf) -> Callable[[mpf], mpf]:
    return lambda x: scale * (x if x > 0 else alpha * mpmath.expm1(inner * x))


def _softplus(beta: mpf, threshold: mpf) -> Callable[[mpf], mpf]:
    return lambda x: x if beta * x > threshold else mpmath.log1p(mpmath.exp(beta * x)) / beta


def _tanh_gelu(x: mpf) -> mpf:
    return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpf("0.044715") * x**3)))


EXACT: dict[str, Callable[..., Any]] = {
    "tanh": mpmath.tanh,
    "sigmoid": _sigmoid,
    "erf": mpmath.erf,
    "atan": mpmath.atan,
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2 if abs(x) < 30 else max(x, mpf(0)),
    "gelu by tanh": _tanh_gelu,
    "silu": lambda x: x * _sigmoid(x),
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))) if x < 200 else x,
    "log sigmoid": lambda x: -mpmath.log1p(mpmath.exp(-x)) if x > -200 else x,
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "log": mpmath.log,
    "log1p": mpmath.log1p,
    "sqrt": mpmath.sqrt,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x * x,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "softplus": _softplus,
    "elu": _elu,
    "power": lambda p: lambda x: x**p if p != int(p) else x ** int(p),
}
"""The functions once more, by name; those with parameters take these first."""


def exact(op: Elementwise, dtype: torch.dtype) -> Callable[[mpf], mpf]:
    """Return the function in high precision; its constants are the ones that the dtype can hold,
    since the network that runs has those.
    """

    def held(value: float) -> mpf:
        return mpf(float(torch.tensor(value, dtype=dtype))) if math.isfinite(value) else mpf(value)

    if isinstance(op, TwoPieces):
        return lambda x: held(op.right) * x if x > 0 else held(op.left) * x
    if isinstance(op, Clip):
        return lambda x: min(max(x, held(op.low)), held(op.high))
    if isinstance(op, Smooth):
        name, *parameters = op.name.rsplit(" ", op.name.count(" ") if op.name[-1].isdigit() else 0)
        return EXACT[name](*map(mpf, map(float, parameters))) if parameters else EXACT[name]
    raise NotImplementedError(
        f"write down {type(op).__name__} in high precision, so that its lines can be tested"
    )


def corners(op: Elementwise) -> list[float]:
    """Return the places where a function changes its nature."""
    if isinstance(op, Smooth):
        threshold = [float(op.name.split()[2]) / float(op.name.split()[1])] if op.jump else []
        quarters = [k * math.pi / 2 for k in range(-4, 5)] if isinstance(op, Wave) else []
        return [*op.inflections, *op.turns, *threshold, *quarters] or [0.0]
    return [c for c in (op.low, op.high) if math.isfinite(c)] if isinstance(op, Clip) else [0.0]


def furthest(op: Elementwise, dtype: torch.dtype) -> float:
    """Return how large arguments can be before the function leaves the dtype's numbers."""
    largest = 1e30 if dtype == torch.float32 else 1e200
    if isinstance(op, Smooth) and op.name.startswith("exp"):
        return math.log(largest)
    if isinstance(op, Smooth) and op.name.startswith(("power", "square")):
        return largest**0.2
    return largest


def known(
    op: Elementwise, bounds: list[tuple[float, float]], dtype: torch.dtype
) -> list[tuple[float, float]]:
    """Return the intervals over which the function has a value that the dtype holds."""
    far = furthest(op, dtype)
    # poles aside: there the value soon leaves the dtype
    near = -far if not isinstance(op, Smooth) or op.defined is _everywhere else 1e-8
    inside = [
        (low, high)
        for low, high in bounds
        if max(abs(low), abs(high)) <= far and (near < 0 or min(abs(low), abs(high)) >= near)
    ]
    ends = torch.tensor(inside, dtype=dtype)
    defined = (
        op.defined(*ends.unbind(1))
        if isinstance(op, Smooth)
        else torch.ones(len(ends), dtype=torch.bool)
    )
    return [interval for interval, yes in zip(inside, defined.tolist(), strict=True) if yes]


def intervals(op: Elementwise, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Return random and hostile intervals with ends in the dtype: tiny, huge, one-sided, of no
    width, touching corners and stepping just over them.
    """
    generator = torch.Generator().manual_seed(5)
    scale = 10 ** (torch.rand(60, generator=generator, dtype=torch.float64) * 8 - 5)
    ends = torch.randn(60, 2, generator=generator, dtype=torch.float64) * scale[:, None]
    found = [(float(a), float(b)) for a, b in ends.sort(1).values]
    eps, huge = torch.finfo(dtype).eps, furthest(op, dtype)
    for corner in corners(op):
        for width in (1e-25, eps, 1e-3, 0.5, 3.0, 40.0, 1e4, huge):
            found += [
                (corner - width, corner),
                (corner, corner + width),
                (corner - width, corner + width),
            ]
            found += [(corner - width / 7, corner + width), (corner - width, corner + width / 7)]
            found += [
                (corner - width, corner + eps),
                (corner - eps, corner + width),
                (corner - width, corner + 1e-25),
                (corner - 1e-25, corner + width),
            ]
    found += [(c, c) for c in (0.0, 1.0, -1.0, 0.3, -17.0, 30.0, huge, -huge, 1e-25, *corners(op))]
    found += [(x, x + abs(x) * eps) for x in (1.0, -1.0, 0.3, 19.0, -19.0)]
    found += [(-huge, huge), (18.0, 21.0), (-21.0, -18.0), (-20.0, 9.0), (-9.0, 20.0), (-8.1, 8.2)]
    rounded = torch.tensor(found, dtype=torch.float64).to(dtype).double()
    return known(op, [(low, high) for low, high in rounded.tolist() if low <= high], dtype)


def places(op: Elementwise, low: float, high: float) -> list[mpf]:
    """Return places of an interval to look at: the ends, corners inside, and a spread that is dense
    near the ends.
    """
    inside = [mpf(c) + mpf(s) for c in corners(op) for s in (0, 1e-9, -1e-9, 0.5, -0.5, 2, -2)]
    width = mpf(high) - mpf(low)
    shares = (
        [mpf(k) / 8 for k in range(9)]
        + [mpf(10) ** -k for k in (2, 4, 9)]
        + [1 - mpf(10) ** -k for k in (2, 4, 9)]
    )
    return [
        x for x in [*inside, *(mpf(low) + width * s for s in shares)] if mpf(low) <= x <= mpf(high)
    ]


def smallest(gap: Callable[[mpf], mpf], low: mpf, high: mpf, steps: int) -> mpf:
    """Return the smallest gap that a golden-section search comes across."""
    ratio = (mpmath.sqrt(5) - 1) / 2
    a, b, best = low, high, gap(low)
    for _ in range(steps):
        left, right = b - ratio * (b - a), a + ratio * (b - a)
        at_left, at_right = gap(left), gap(right)
        best = min(best, at_left, at_right)
        a, b = (a, right) if at_left < at_right else (left, b)
    return best


def crossings(
    op: Elementwise, dtype: torch.dtype, alpha: float | None, bounds: list[tuple[float, float]]
) -> list[str]:
    """Name every interval on which a line is on the wrong side of the function."""
    lower, upper = torch.tensor(bounds, dtype=torch.float64).to(dtype).unbind(1)
    lines = op.relax(lower, upper, None if alpha is None else torch.full_like(lower, alpha))
    assert all(line.dtype == dtype and line.shape == lower.shape for line in lines)
    f, found = exact(op, dtype), []
    for (low, high), *row in zip(bounds, *(line.tolist() for line in lines), strict=True):
        assert all(math.isfinite(v) for v in row), f"[{low!r}, {high!r}]: {row}"
        low_slope, low_at, high_slope, high_at = map(mpf, row)
        at = places(op, low, high)
        under = min(f(x) - low_slope * x - low_at for x in at)
        over = min(high_slope * x + high_at - f(x) for x in at)
        if isinstance(op, Smooth) and high > low:
            cuts = sorted({mpf(low), mpf(high), *(mpf(c) for c in corners(op) if low < c < high)})
            for a, b in itertools.pairwise(cuts):
                under = min(
                    under, smallest(lambda x, m=low_slope, c=low_at: f(x) - m * x - c, a, b, 25)
                )
                over = min(
                    over, smallest(lambda x, m=high_slope, c=high_at: m * x + c - f(x), a, b, 25)
                )
        if under < 0 or over < 0:
            found.append(
                f"[{low!r}, {high!r}] alpha={alpha}: below by {mpmath.nstr(under, 5)}, above by "
                f"{mpmath.nstr(over, 5)}"
            )
    return found


def _start(name: str, alpha: float | None) -> int:
    """Which of the intervals come first: with every alpha others."""
    return ALPHAS.index(alpha) * 2 + len(name) % 2


@pytest.mark.one_in(8)
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "args"), ENTRIES, ids=str)
def test_lines_sandwich_the_function(
    name: str, args: tuple[Any, ...], dtype: torch.dtype, alpha: float | None
) -> None:
    op = ACTIVATIONS[name](args)
    bounds = intervals(op, dtype)
    assert not crossings(
        op, dtype, alpha, bounds[_start(name, alpha) :: 9] if isinstance(op, Smooth) else bounds
    )


@pytest.mark.parametrize(("name", "args"), ENTRIES, ids=str)
def test_lines_sandwich_the_function_on_many_random_intervals(
    name: str, args: tuple[Any, ...]
) -> None:
    """Ten thousand intervals with an alpha each, evaluated in float64 with a margin for that
    evaluation only.
    """
    op, generator = ACTIVATIONS[name](args), torch.Generator().manual_seed(11)
    scale = 10 ** (torch.rand(10_000, 1, generator=generator, dtype=torch.float64) * 6 - 3)
    lower, upper = (
        (torch.randn(10_000, 2, generator=generator, dtype=torch.float64) * scale)
        .sort(1)
        .values.unbind(1)
    )
    lower, upper = torch.tensor(
        known(op, torch.stack([lower, upper], 1).tolist(), torch.float64), dtype=torch.float64
    ).unbind(1)
    lines = op.relax(lower, upper, torch.rand(len(lower), generator=generator, dtype=torch.float64))
    share = torch.rand(len(lower), 20, generator=generator, dtype=torch.float64)
    x = torch.cat(
        [
            lower[:, None],
            upper[:, None],
            (lower[:, None] + (upper - lower)[:, None] * share).clamp(
                lower[:, None], upper[:, None]
            ),
        ],
        1,
    )
    low_slope, low_at, high_slope, high_at = (line[:, None] for line in lines)
    slack = 1e-15 * (1 + x.abs() * (1 + low_slope.abs() + high_slope.abs()) + op.value(x).abs())
    assert len(lower) > 1000
    assert bool((low_slope * x + low_at <= op.value(x) + slack).all()) and bool(
        (op.value(x) <= high_slope * x + high_at + slack).all()
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "args"), ENTRIES, ids=str)
def test_range_holds_every_value(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    op = ACTIVATIONS[name](args)
    f, bounds = exact(op, dtype), intervals(op, dtype)
    lower, upper = torch.tensor(bounds, dtype=torch.float64).to(dtype).unbind(1)
    smallest_values, largest_values = op.range(lower, upper)
    for (low, high), least, most in zip(
        bounds, smallest_values.tolist(), largest_values.tolist(), strict=True
    ):
        values = [f(x) for x in places(op, low, high)]
        # One rounding of the value itself is part of the function as it runs.
        size = max(abs(v) for v in values)
        room = 2 * mpf(torch.finfo(dtype).eps) * size
        assert mpf(least) <= min(values) + room and max(values) <= mpf(most) + room, (
            f"[{low!r}, {high!r}]"
        )
        if isinstance(op, Wave) and (
            max(abs(low), abs(high)) >= smooth_relaxation._FAR or high - low > 1
        ):
            assert most <= 1 and least >= -1
            continue
        assert mpf(most) - mpf(least) - 2 * getattr(op, "jump", 0.0) <= max(values) - min(
            values
        ) + 40 * mpf(torch.finfo(dtype).eps) * (1 + size), f"[{low!r}, {high!r}] is wide"


@pytest.mark.parametrize(("name", "args"), ENTRIES, ids=str)
def test_where_nothing_bends_both_lines_are_the_function(name: str, args: tuple[Any, ...]) -> None:
    op = ACTIVATIONS[name](args)
    bounds = torch.tensor(intervals(op, torch.float64), dtype=torch.float64)
    lower, upper = bounds[bounds.abs().amax(1) < 1e5].unbind(1)
    lines, straight = op.relax(lower, upper), ~op.unstable(lower, upper)
    assert bool(straight.any())
    for x in (lower, upper, (lower + upper) / 2):
        for slope, at in (
            (lines.lower_slope, lines.lower_intercept),
            (lines.upper_slope, lines.upper_intercept),
        ):
            allowed = 1e-12 * (
                1 + torch.maximum(lower.abs(), upper.abs()) * (1 + slope.abs()) + op.value(x).abs()
            ) + getattr(op, "jump", 0.0)
            assert bool(((slope * x + at - op.value(x)).abs() <= allowed)[straight].all())


@pytest.mark.parametrize(("name", "args"), ENTRIES, ids=str)
def test_bends_says_where_the_function_is_no_straight_line(
    name: str, args: tuple[Any, ...]
) -> None:
    op = ACTIVATIONS[name](args)
    bounds = torch.tensor(intervals(op, torch.float64), dtype=torch.float64)
    bounds = bounds[(bounds.abs().amax(1) < 50) & ((bounds[:, 1] - bounds[:, 0]) > 0.1)]
    lower, upper = bounds.unbind(1)
    share = torch.linspace(0, 1, 201, dtype=torch.float64)
    x = lower[:, None] + (upper - lower)[:, None] * share
    chord = op.value(lower)[:, None] + (op.value(upper) - op.value(lower))[:, None] * share
    curved = (op.value(x) - chord).abs().amax(1) > 1e-9
    assert not bool((curved & ~op.unstable(lower, upper)).any())


@pytest.mark.parametrize(("name", "args"), ENTRIES, ids=str)
def test_an_interval_of_no_width_gives_the_value(name: str, args: tuple[Any, ...]) -> None:
    op = ACTIVATIONS[name](args)
    x = torch.tensor(
        [
            low
            for low, _ in known(
                op, [(x, x) for x in torch.linspace(-7, 7, 57).tolist()], torch.float64
            )
        ],
        dtype=torch.float64,
    )
    for alpha in (None, torch.full_like(x, 0.4)):
        lines = op.relax(x, x, alpha)
        for slope, at in (
            (lines.lower_slope, lines.lower_intercept),
            (lines.upper_slope, lines.upper_intercept),
        ):
            torch.testing.assert_close(
                slope * x + at, op.value(x), rtol=1e-12, atol=1e-12 + getattr(op, "jump", 0.0)
            )


def test_adaptive_slope_of_relu_follows_the_larger_side() -> None:
    relu = ACTIVATIONS["aten.relu.default"]((None,))
    lower, upper = torch.tensor(
        [[-1.0, 2.0], [-2.0, 1.0], [-1.0, 1.0]], dtype=torch.float64
    ).unbind(1)
    lines = relu.relax(lower, upper)
    assert lines.lower_slope.tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(
        lines.upper_slope, torch.tensor([2 / 3, 1 / 3, 0.5], dtype=torch.float64)
    )
    torch.testing.assert_close(
        lines.upper_intercept, torch.tensor([2 / 3, 2 / 3, 0.5], dtype=torch.float64)
    )
    assert not lines.lower_intercept.any()


MUTANTS: dict[str, Callable[[Any], Any]] = {
    "an inflection too far left": lambda op: dataclasses.replace(
        op, inflections=tuple(c - 0.3 for c in op.inflections)
    ),
    "an inflection too far right": lambda op: dataclasses.replace(
        op, inflections=tuple(c + 0.3 for c in op.inflections)
    ),
    "convex where it is concave": lambda op: dataclasses.replace(op, convex=not op.convex),
    "a value a millionth too high": lambda op: dataclasses.replace(
        op, run=lambda x: op.run(x) + 1e-6
    ),
    "a value a millionth too low": lambda op: dataclasses.replace(
        op, run=lambda x: op.run(x) - 1e-6
    ),
    "a derivative too steep": lambda op: dataclasses.replace(
        op, derivative=lambda x: op.derivative(x) + 0.05
    ),
    "a wave out of step": lambda op: dataclasses.replace(op, shift=op.shift + 0.3),
    "no jump": lambda op: dataclasses.replace(op, jump=0.0),
}
CURVED = [(name, args) for name, args in ENTRIES if name in CURVES]


def breakable(op: Smooth, mistake: str) -> bool:
    """Can the mistake make a line wrong? The intercept is a proof for any slope, so a false
    derivative does only where it enters the proof.
    """
    if isinstance(op, Wave):
        return "wave" in mistake or "value" in mistake  # it finds its inflections by itself
    if "derivative" in mistake or "wave" in mistake:
        return False
    if mistake.endswith("too high") and op.jump > 1e-6:
        return False  # the room for the jump hides it
    return {
        "inflection": bool(op.inflections) and op.defined is _everywhere and not op.jump,
        "jump": op.jump > 0,
    }.get(mistake.split()[1], True)


def broken(op: Smooth, mistake: str) -> list[str]:
    """Judge a mutant on intervals of a size at which its mistake shows."""
    mutant: Smooth = MUTANTS[mistake](op)
    starts = [c + d for c in corners(op) for d in (-2.0, -0.4, -0.1, 0.0, 0.1, 0.4)] + [0.5, 1.5]
    bounds = known(op, [(a, a + w) for a in starts for w in (0.1, 0.5, 3.0, 6.0)], torch.float64)
    assert len(bounds) > 5
    return [
        text
        for alpha in (0.0, 1.0, None)
        for text in crossings(mutant, torch.float64, alpha, bounds)
    ]


IN_EVERY_RUN = ("an inflection too far left", "a value a millionth too low")


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "mistake",
    [m if m in IN_EVERY_RUN else pytest.param(m, marks=pytest.mark.slow) for m in MUTANTS],
)
@pytest.mark.parametrize(("name", "args"), CURVED, ids=str)
def test_the_judge_catches_a_false_fact_of_every_curve(
    name: str, args: tuple[Any, ...], mistake: str
) -> None:
    op = ACTIVATIONS[name](args)
    assert isinstance(op, Smooth)
    if not breakable(op, mistake):
        return
    assert broken(op, mistake)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "args"), CURVED, ids=str)
def test_the_judge_catches_lines_without_room_for_rounding(
    name: str, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smooth_relaxation, "_ULPS", 0)
    op = ACTIVATIONS[name](args)
    assert any(
        crossings(op, dtype, alpha, intervals(op, dtype)[::4])
        for dtype in DTYPES
        for alpha in (None, 0.37)
    )


def test_where_a_function_has_no_value_its_lines_bound_nothing() -> None:
    for name, low, high in (
        ("log", 0.0, 1.0),
        ("log", -1.0, 1.0),
        ("sqrt", -1e-9, 4.0),
        ("rsqrt", 0.0, 1.0),
        ("reciprocal", -1.0, 2.0),
        ("log1p", -2.0, 0.0),
    ):
        op = ACTIVATIONS[f"aten.{name}.default"]((None,))
        assert op is not None
        for alpha in (None, torch.tensor([0.3], dtype=torch.float64)):
            lines = op.relax(
                torch.tensor([low], dtype=torch.float64),
                torch.tensor([high], dtype=torch.float64),
                alpha,
            )
            assert [float(line) for line in lines] == [0.0, -math.inf, 0.0, math.inf], name
        assert [
            float(end) for end in op.range(*torch.tensor([[low], [high]], dtype=torch.float64))
        ] == [
            -math.inf,
            math.inf,
        ]


AT_ZERO = [smooth_table.RSQRT_OR_0, smooth_table.RECIPROCAL_OR_0]


def overlooked(op: smooth_table.OrZero) -> bool:
    """Return whether a range or a line leaves out a value on an interval that holds 0."""
    for low, high in ((0.0, 0.0), (0.0, 1.0), (0.0, 1e-300)):
        ends = [torch.tensor([end], dtype=torch.float64) for end in (low, high)]
        x = torch.cat([ends[0], torch.linspace(low, high, 9, dtype=torch.float64)])
        value, (least, most), lines = op.value(x), op.range(*ends), op.relax(*ends)
        under = lines.lower_slope * x + lines.lower_intercept
        over = lines.upper_slope * x + lines.upper_intercept
        if not bool(
            ((least <= value) & (value <= most) & (under <= value) & (value <= over)).all()
        ):
            return True
    return False


@pytest.mark.parametrize("op", AT_ZERO, ids=lambda op: op.name)
def test_a_value_at_zero_lies_between_bounds_that_reach_zero(op: smooth_table.OrZero) -> None:
    assert not overlooked(op)
    mutant = dataclasses.replace(op, defined=lambda lower, upper: lower >= 0)
    assert overlooked(mutant), "the mutant takes 0 for a place like any other"


@pytest.mark.parametrize("op", AT_ZERO, ids=lambda op: op.name)
def test_a_value_at_zero_has_a_finite_gradient(op: smooth_table.OrZero) -> None:
    x = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(op.value(x).sum(), x)
    assert op.value(x)[0] == 0 and gradient[0] == 0
    torch.testing.assert_close(gradient[1], op.derivative(x.detach())[1])


def test_slopes_of_alpha_are_the_tangents_of_the_convex_side() -> None:
    """At 0 the tangent at the first sound place, at 1 at the last: below exp the two ends, below
    gelu the places whose tangents clear both ends.
    """
    low, high = (torch.tensor([v], dtype=torch.float64) for v in (-1.0, 2.0))
    exp = ACTIVATIONS["aten.exp.default"]((None,))
    gelu = ACTIVATIONS["aten.gelu.default"]((None,))
    assert exp is not None and gelu is not None
    for alpha, place in ((0.0, -1.0), (1.0, 2.0), (0.5, 0.5)):
        assert float(
            exp.relax(low, high, torch.tensor([alpha], dtype=torch.float64)).lower_slope
        ) == pytest.approx(math.exp(place))
    for alpha in (0.0, 0.5, 1.0):
        lines = gelu.relax(
            -4 * torch.ones_like(low),
            4 * torch.ones_like(low),
            torch.tensor([alpha], dtype=torch.float64),
        )
        ends = [
            float(gelu.value(x) - lines.lower_slope * x - lines.lower_intercept)
            for x in (torch.tensor([e], dtype=torch.float64) for e in (-4.0, 4.0))
        ]
        assert min(ends) >= 0 and (alpha == 0.5 or min(ends) < 1e-9)


def test_the_judge_catches_a_chord_whose_intercept_is_rounded_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # -slope * lower, without looking at the other end and without room: what most implementations
    # do.
    def careless(self: TwoPieces, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Any:
        lines = sound(self, lower, upper, alpha)
        return lines._replace(
            upper_intercept=torch.where(self.unstable(lower, upper), -lines.upper_slope * lower, 0)
        )

    sound = TwoPieces.relax
    monkeypatch.setattr(TwoPieces, "relax", careless)
    op = TwoPieces(0.0, 1.0)
    assert crossings(op, torch.float64, None, intervals(op, torch.float64))


# ---- products
# --------------------------------------------------------------------------------------------------


def factors(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return boxes of two factors: of all signs and sizes, some of no width, some around 0 or
    touching it.
    """
    generator = torch.Generator().manual_seed(9)
    centre = torch.randn(2, 3000, generator=generator, dtype=torch.float64) * 10 ** (
        torch.rand(2, 3000, generator=generator, dtype=torch.float64) * 8 - 4
    )
    width = torch.rand(2, 3000, generator=generator, dtype=torch.float64) * 10 ** (
        torch.rand(2, 3000, generator=generator, dtype=torch.float64) * 14 - 10
    )
    width[0, ::7], width[1, ::5], centre[:, ::11] = 0, 0, 0
    low, high = (centre - width).to(dtype), (centre + width).to(dtype)
    low[:, ::13] = low[:, ::13].clamp(min=0)
    high = torch.maximum(low, high)
    return (low[0], high[0]), (low[1], high[1])


def outside(op: Product, dtype: torch.dtype, alpha: float | None) -> int:
    """Count the corners that a plane or a range cuts off, exactly: a product is straight along both
    axes, so corners decide.
    """
    x, y = factors(dtype)
    saddle = op.relaxation(x, y, None if alpha is None else torch.full_like(x[0], alpha))
    least, most = op.interval(x, y)
    rows = torch.stack([*x, *y, *saddle, least, most]).T.tolist()
    found = 0
    for low_x, high_x, low_y, high_y, ax, ay, a, bx, by, b, small, large in (
        [mpf(v) for v in row] for row in rows[::3]
    ):
        for p, q in itertools.product((low_x, high_x), (low_y, high_y)):
            found += not (
                ax * p + ay * q + a <= p * q <= bx * p + by * q + b and small <= p * q <= large
            )
    return found


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_of_a_product_sandwich_it(dtype: torch.dtype, alpha: float | None) -> None:
    assert not outside(Product(), dtype, alpha)


def test_planes_of_a_product_touch_it_in_two_corners() -> None:
    x, y = (
        tuple(torch.tensor([end], dtype=torch.float64) for end in ends)
        for ends in ((-1.0, 2.0), (0.5, 3.0))
    )
    for alpha, touched in ((0.0, [(0, 0), (0, 1), (1, 0)]), (1.0, [(1, 1), (0, 1), (1, 0)])):
        saddle = Product().relaxation(x, y, torch.tensor([alpha], dtype=torch.float64))  # type: ignore[arg-type]
        for i, j in touched:
            gap = (
                x[i] * y[j] - saddle.lower_x * x[i] - saddle.lower_y * y[j] - saddle.lower_intercept
            )
            assert 0 <= float(gap) < 1e-13


@pytest.mark.parametrize("mistake", ["no room", "swapped", "slack"])
def test_the_judge_catches_planes_of_a_product_that_cut(mistake: str) -> None:
    class Mutant(Product):
        """Intercepts without room, slopes of the wrong ends, or a lower plane that is a little too
        high.
        """

        def relaxation(self, x: Any, y: Any, alpha: Tensor | None = None) -> Any:
            sound = super().relaxation(x, y, alpha)
            if mistake == "slack":
                return sound._replace(lower_intercept=sound.lower_intercept + 1e-6)
            if mistake == "swapped":
                return sound._replace(lower_x=sound.upper_x)
            size = torch.maximum(x[0].abs(), x[1].abs()) * torch.maximum(y[0].abs(), y[1].abs())
            return sound._replace(
                lower_intercept=sound.lower_intercept
                + products._ULPS * torch.finfo(size.dtype).eps * size
            )

    assert outside(Mutant(), torch.float64, 0.37)


# ---- max pooling
# --------------------------------------------------------------------------------------------------

POOLS = [
    ((2, 4, 4), ([2, 2], [2, 2], [0, 0], [1, 1], False)),
    ((1, 5, 5), ([3, 3], [2, 2], [1, 1], [1, 1], False)),
    ((1, 5, 5), ([2, 2], [2, 2], [0, 0], [1, 1], True)),
    ((1, 5, 5), ([3, 2], [1, 2], [1, 1], [1, 1], True)),
    ((2, 5, 5), ([2, 2], [1, 1], [0, 0], [2, 2], False)),
    ((2, 7), ([3], [2], [1], [1], False)),
]


def pool_of(shape: tuple[int, ...], arguments: tuple[Any, ...]) -> MaxPool:
    """Return the operation for these arguments."""
    rank = len(shape) - 1
    run = (torch.nn.functional.max_pool1d, torch.nn.functional.max_pool2d)[rank - 1]
    out = tuple(run(torch.zeros(1, *shape), *arguments).shape[1:])
    op = SELECTIONS[f"aten.max_pool{rank}d.default"]((None, *arguments), shape, out)
    assert isinstance(op, MaxPool)
    return op


def boxes(shape: tuple[int, ...], count: int = 60) -> tuple[Tensor, Tensor]:
    """Return boxes of many widths, some of none, some with ties."""
    generator = torch.Generator().manual_seed(2)
    centre = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    centre[::5] = centre[::5].round()
    size = torch.logspace(-3, 0.5, count, dtype=torch.float64).view(-1, *[1] * len(shape))
    width = torch.rand(count, *shape, generator=generator, dtype=torch.float64) * size
    width[::4] *= torch.rand(len(width[::4]), *shape, generator=generator) < 0.5
    width[0] = 0
    return centre - width, centre + width


def inside(lower: Tensor, upper: Tensor) -> Iterator[Tensor]:
    """Yield points of the boxes: corners and others."""
    generator = torch.Generator().manual_seed(4)
    yield from (lower, upper)
    for _ in range(20):
        share = torch.rand(lower.shape, generator=generator, dtype=torch.float64)
        yield from (
            torch.where(share < 0.5, lower, upper),
            torch.minimum(lower + share * (upper - lower), upper),
        )


@pytest.mark.parametrize(("shape", "arguments"), POOLS)
def test_planes_of_max_pooling_sandwich_it(
    shape: tuple[int, ...], arguments: tuple[Any, ...]
) -> None:
    op = pool_of(shape, arguments)
    lower, upper = boxes(shape)
    planes = op.relaxation((lower, upper))
    assert bool(planes.exact.any()) and not bool(planes.exact.all())
    for x in inside(lower, upper):
        value = op.value(x)
        picked = x.flatten(1).gather(1, planes.pick.flatten(1)).view_as(value)
        assert bool((picked <= value).all())
        assert bool((picked == value)[planes.exact].all())
        assert bool((value <= planes.ceiling).all())


@pytest.mark.parametrize(("shape", "arguments"), POOLS)
def test_windows_of_max_pooling_are_the_elements_that_matter(
    shape: tuple[int, ...], arguments: tuple[Any, ...]
) -> None:
    op = pool_of(shape, arguments)
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        op._gather(x).amax(-1).view(4, *op.shape), op.value(x), rtol=0, atol=0
    )
    for row in op.windows:
        members = [i for i in row.tolist() if i < x[0].numel()]
        assert members and len(members) == len(set(members))


@pytest.mark.parametrize(("shape", "arguments"), POOLS)
def test_elements_that_cannot_win_or_must_win_do_not_bend(
    shape: tuple[int, ...], arguments: tuple[Any, ...]
) -> None:
    op = pool_of(shape, arguments)
    lower, upper = boxes(shape)
    unstable = op.unstable(lower, upper)
    assert unstable.shape == lower.shape and bool(unstable.any()) and not bool(unstable[0].any())
    # Wherever a plane is not exact some member of its window bends; one alone where the element to
    # beat has no width.
    flags = (
        torch.nn.functional.pad(unstable.flatten(1), (0, 1))[:, op.windows]
        .sum(-1)
        .view_as(op.relaxation((lower, upper)).exact)
    )
    assert bool((flags[~op.relaxation((lower, upper)).exact] >= 1).all())


def test_max_pooling_where_nothing_is_known_stays_inside_the_image() -> None:
    op = pool_of(*POOLS[1])
    unknown = torch.full((1, 1, 5, 5), torch.inf, dtype=torch.float64)
    planes = op.relaxation((-unknown, unknown))
    assert int(planes.pick.max()) < 25
