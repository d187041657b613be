"""Is the geometry of each threat set right? Support and projection against solvers, extremes of the
numbers, and the random streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.stats import kstest
from torch import Tensor

from calipers.errors import BadInput
from calipers.random_streams import Streams, key_of
from calipers.threats.ball import Ball, Region
from calipers.threats.norms import NORMS, distance_between, norm_named, support_rounding

P = ["linf", "l2", "l1"]
DTYPES = [torch.float32, torch.float64]
D, CASES = 5, 40


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([values], dtype=dtype)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes(seed: int, unbounded: bool = False) -> tuple[Tensor, Tensor]:
    """Return CASES random boxes around 0, some sides closed at 0, some infinite."""
    g = drawn(seed)
    low, high = (torch.rand(CASES, D, generator=g, dtype=torch.float64) * 0.8 for _ in range(2))
    if unbounded:
        return torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
    low[torch.rand(CASES, D, generator=g) < 0.2] = 0.0
    high[torch.rand(CASES, D, generator=g) < 0.1] = torch.inf
    return -low, high


def weights(seed: int, kind: str) -> Tensor | None:
    return (
        None
        if kind == "plain"
        else torch.rand(D, generator=drawn(seed), dtype=torch.float64) * 3 + 0.2
    )


def weighted_support(
    norm: str, g: Tensor, radius: Tensor, low: Tensor, high: Tensor, w: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return value and maximiser the way a region asks for them: in units where the weighted ball
    is a plain one.
    """
    w = torch.ones(D, dtype=g.dtype) if w is None else w
    found = norm_named(norm).support(g / w, radius, low * w, high * w)
    return found.value, found.delta / w


def true_support(
    norm: str, g: np.ndarray, radius: float, low: np.ndarray, high: np.ndarray, w: np.ndarray
) -> float:
    """Return the maximum of <g, delta> by linear programming, or by the KKT conditions for l2 (a
    scalar equation, bisected).
    """
    if norm == "linf":
        return -linprog(
            -g,
            bounds=[
                (max(a, -radius / v), min(b, radius / v))
                for a, b, v in zip(low, high, w, strict=True)
            ],
        ).fun
    if norm == "l1":  # delta = p - q with p, q >= 0
        bounds = [(0, b) for b in high] + [(0, -a) for a in low]
        return -linprog(
            np.concatenate([-g, g]), A_ub=[np.concatenate([w, w])], b_ub=[radius], bounds=bounds
        ).fun

    def at(log_s: float) -> np.ndarray:
        return np.clip(math.exp(log_s) * g / w**2, low, high)

    lo, hi = -60.0, 60.0
    for _ in range(200):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if np.linalg.norm(w * at(middle)) <= radius else (lo, middle)
    return float(g @ at(lo))


def rows(*tensors: Tensor) -> Iterator[list[np.ndarray]]:
    return ([t[i].numpy() for t in tensors] for i in range(len(tensors[0])))


# ---- support
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbounded", [True, False], ids=["ball", "ball and box"])
@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize("norm", P)
def test_support_value_and_maximiser_are_optimal(norm: str, kind: str, unbounded: bool) -> None:
    g = torch.randn(CASES, D, generator=drawn(1), dtype=torch.float64)
    g[:8, 0] = 0.0
    g[8:12, 1] = g[8:12, 2]  # ties
    low, high = boxes(2, unbounded)
    radius = torch.linspace(0.01, 3.0, CASES, dtype=torch.float64)
    w = weights(3, kind)
    value, delta = weighted_support(norm, g, radius, low, high, w)
    ones = np.ones(D) if w is None else w.numpy()
    best = [
        true_support(norm, *case[:1], float(case[1]), *case[2:], ones)
        for case in rows(g, radius, low, high)
    ]
    assert np.allclose(value.numpy(), best, rtol=1e-6, atol=1e-6)
    assert torch.allclose((g * delta).sum(1), value, rtol=1e-9, atol=1e-12)
    assert ((delta >= low - 1e-12) & (delta <= high + 1e-12)).all()
    assert (norm_named(norm).of(delta if w is None else delta * w) <= radius * (1 + 1e-12)).all()


def region_of(
    norm: str,
    n: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    radius: float = 0.4,
    boxed: bool = True,
    kind: str = "all",
) -> Region:
    """Return regions around n random points of shape (2, 3) with a mask and weights."""
    g = drawn(seed)
    x = torch.rand(n, 2, 3, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[True, True, False], [True, True, True]]) if kind == "all" else None
    w = torch.rand(2, 3, generator=g, dtype=torch.float64) + 0.5 if kind == "all" else None
    return Ball(norm, radius, box=(0.0, 1.0) if boxed else None, mask=mask, weights=w).region(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", P)
def test_no_sample_beats_the_support(norm: str, dtype: torch.dtype) -> None:
    region = region_of(norm, 6, dtype)
    g = torch.randn(6, 2, 3, generator=drawn(4), dtype=torch.float64).to(dtype)
    value = region.support(g).value.double()
    slack = 2 * support_rounding(6) * torch.finfo(dtype).eps
    for seed in range(300):
        streams = Streams.of(seed, [str(i) for i in range(6)], torch.device("cpu"))
        points = region.snap(region.sample(streams))
        assert region.contains(points).all()
        assert (
            (g.double() * points.double()).flatten(1).sum(1) <= value + slack * (1 + value.abs())
        ).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_any_multiplier_gives_a_dual_value_above_the_support(seed: int, factor: float) -> None:
    """The support is the smallest dual value: a perturbed multiplier can only be worse, so it may
    be rounded freely.
    """
    g = torch.randn(1, D, generator=drawn(seed), dtype=torch.float64)
    low, high = (t[:1] for t in boxes(seed % 1000))
    radius = torch.rand(1, generator=drawn(seed), dtype=torch.float64) + 0.05
    size, cap = g.abs(), torch.where(g > 0, high, -low).minimum(radius[:, None])
    slack = 1 + 1e-12
    m = factor * float(size.norm()) / float(radius)
    inner = torch.minimum(size / m, cap)
    l2_dual = (size * inner - m * inner.square() / 2).sum() + m * float(radius) ** 2 / 2
    assert float(l2_dual) * slack >= float(norm_named("l2").support(g, radius, low, high).value)
    t = factor * float(size.mean())
    l1_dual = t * float(radius) + (cap * (size - t).clamp_min(0)).sum()
    assert float(l1_dual) * slack >= float(norm_named("l1").support(g, radius, low, high).value)


@pytest.mark.parametrize(
    ("norm", "step", "gain"),
    [("l2", (0.6, -0.8), 5.0), ("linf", (1.0, -1.0), 7.0), ("l1", (0.0, -1.0), 4.0)],
)
def test_the_dual_norm_steps_of_the_textbook(
    norm: str, step: tuple[float, float], gain: float
) -> None:
    g, radius, wide = (
        tensor(3.0, -4.0),
        torch.ones(1, dtype=torch.float64),
        tensor(torch.inf, torch.inf),
    )
    found = norm_named(norm).support(g, radius, -wide, wide)
    assert torch.allclose(found.delta, tensor(*step), atol=1e-15)
    assert float(found.value) == pytest.approx(gain, abs=1e-15) == float(norm_named(norm).dual(g))
    moved = norm_named(norm).step(g, radius, -wide, wide)
    assert torch.allclose(moved, tensor(*step), atol=1e-15)


def test_ties_and_zero_gradients_are_defined() -> None:
    wide, radius = torch.full((2, 3), torch.inf), torch.ones(2)
    g = torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 2.0]])
    for norm in P:
        found = norm_named(norm).support(g, radius, -wide, wide)
        assert found.value[0] == 0 and found.delta[0].abs().sum() == 0
        assert found.value[1] == pytest.approx(float(norm_named(norm).dual(g)[1]), rel=1e-6)
        assert norm_named(norm).of(found.delta)[1] <= 1 + 1e-6
        assert norm_named(norm).step(g, radius, -wide, wide)[0].abs().sum() == 0


def test_an_l1_step_spends_what_a_full_feature_leaves() -> None:
    found = norm_named("l1").support(
        tensor(5.0, 3.0, 1.0), torch.tensor([1.0]), -torch.ones(1, 3), tensor(0.25, 0.5, 9.0)
    )
    assert (
        found.delta.tolist() == [[0.25, 0.5, 0.25]]
        and float(found.value) == 5 * 0.25 + 3 * 0.5 + 0.25
    )


# ---- extremes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", P)
def test_tiny_huge_and_zero_numbers_make_no_nan_and_stay_inside(
    norm: str, dtype: torch.dtype
) -> None:
    """Squares of 1e-30 vanish in float32, and those of 1e30 overflow: the steps of a saturated
    model are of that size.
    """
    sizes, w = (0.0, 1e-30, 1.0, 1e30), torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    for size in sizes:
        for r in sizes:
            for end in (math.inf, 1.0, 1e-30, 0.0):
                g, radius = (
                    tensor(3.0, -4.0, 0.0, dtype=dtype) * size,
                    torch.tensor([r], dtype=dtype),
                )
                high = torch.full_like(g, end)
                found = norm_named(norm).support(g, radius, -high, high)
                projected, shrunk = (
                    norm_named(norm).project(g, radius, -high, high, weight) for weight in (None, w)
                )
                step = norm_named(norm).step(g, radius, -high, high)
                case = f"size {size}, radius {r}, box {end}"
                assert not found.value.isnan().any(), case
                for delta, measure in (
                    (found.delta, 1.0),
                    (projected, 1.0),
                    (shrunk, w),
                    (step, 1.0),
                ):
                    assert delta.isfinite().all(), case
                    assert (
                        norm_named(norm).of(delta.double() * measure) <= r * (1 + 1e-6)
                    ).all(), case
                reach = float((g.double() * found.delta.double()).sum())
                if reach == 0 or 1e-36 < reach < 1e36:  # a value that float32 can hold
                    assert float(found.value) >= reach * (1 - 1e-5), case
                # and so the multiplier of l2, their quotient
                if reach == 0 or (1e-36 < reach < 1e36 and 1e-36 * size < r < 1e36 * size):
                    assert float(found.value) <= reach * (1 + 1e-5), case


def test_a_step_along_a_vanishing_gradient_has_full_length() -> None:
    g = torch.tensor([[3e-30, -4e-30], [3e30, -4e30]])
    wide, radius = torch.full((2, 2), torch.inf), torch.ones(2)
    for delta in (
        norm_named("l2").support(g, radius, -wide, wide).delta,
        norm_named("l2").step(g, radius, -wide, wide),
    ):
        assert torch.allclose(delta, torch.tensor([[0.6, -0.8], [0.6, -0.8]]), atol=1e-6)
    assert torch.allclose(norm_named("l2").dual(g), torch.tensor([5e-30, 5e30]))


# ---- projection
# --------------------------------------------------------------------------------------------------


def project(
    norm: str, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, w: Tensor | None
) -> Tensor:
    return norm_named(norm).project(delta, radius, low, high, w)


@pytest.mark.parametrize("unbounded", [True, False], ids=["ball", "ball and box"])
@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize("norm", P)
def test_projection_is_inside_idempotent_and_nearest(norm: str, kind: str, unbounded: bool) -> None:
    g = drawn(7)
    delta = torch.randn(CASES, D, generator=g, dtype=torch.float64) * 1.5
    low, high = boxes(8, unbounded)
    radius = torch.linspace(0.05, 2.5, CASES, dtype=torch.float64)
    w = weights(9, kind)
    measure = (
        (lambda d: norm_named(norm).of(d)) if w is None else (lambda d: norm_named(norm).of(d * w))
    )
    near = project(norm, delta, radius, low, high, w)
    assert (measure(near) <= radius * (1 + 1e-9)).all() and ((near >= low) & (near <= high)).all()
    assert torch.allclose(project(norm, near, radius, low, high, w), near, atol=1e-9)
    # Nearest: the way on to the point makes an obtuse angle with the way to any other admissible
    # perturbation (Kinderlehrer and Stampacchia).
    for _ in range(200):
        other = torch.rand(CASES, D, generator=g, dtype=torch.float64) * 2 - 1
        other = (other * 2).clamp(low, high)
        other = other * (radius / measure(other).clamp_min(1e-12)).clamp(max=1)[:, None]
        assert (((delta - near) * (other - near)).sum(1) <= 1e-7).all()


@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projection_equals_a_quadratic_program(norm: str, kind: str) -> None:
    g = drawn(10)
    delta = torch.randn(8, D, generator=g, dtype=torch.float64) * 1.5
    low, high = (t[:8].clamp(-9, 9) for t in boxes(11))
    radius = torch.linspace(0.1, 1.5, 8, dtype=torch.float64)
    w = weights(12, kind)
    near = project(norm, delta, radius, low, high, w)
    v = np.ones(D) if w is None else w.numpy()
    for y, r, a, b, mine in rows(delta, radius, low, high, near):
        # p - q: the l1 length is linear in it
        split = np.concatenate([np.maximum(y, 0), np.maximum(-y, 0)])
        length = (
            (lambda z, r=r: r - v @ (z[:D] + z[D:]))
            if norm == "l1"
            else (lambda z, r=r: r**2 - np.sum((v * (z[:D] - z[D:])) ** 2))
        )
        bounds = [(0, c) for c in b] + [(0, -c) for c in a]
        solved = minimize(
            lambda z, y=y: np.sum((z[:D] - z[D:] - y) ** 2),
            split * 0,
            bounds=bounds,
            constraints={"type": "ineq", "fun": length},
        )
        theirs = solved.x[:D] - solved.x[D:]
        assert np.sum((mine - y) ** 2) <= np.sum((theirs - y) ** 2) + 1e-6
        assert np.allclose(mine, theirs, atol=2e-3)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projection_equals_dykstras_alternation(norm: str) -> None:
    """Alternating between ball and box with Dykstra's corrections converges to the projection onto
    the intersection (Boyle and Dykstra 1986).
    """
    delta = torch.randn(CASES, D, generator=drawn(13), dtype=torch.float64)
    low, high = boxes(14)
    radius = torch.linspace(0.05, 2.0, CASES, dtype=torch.float64)
    wide = torch.full_like(low, torch.inf)
    x, p, q = delta.clone(), torch.zeros_like(delta), torch.zeros_like(delta)
    for _ in range(4000):
        y = project(norm, x + p, radius, -wide, wide, None)
        p = x + p - y
        x = (y + q).clamp(low, high)
        q = y + q - x
    assert torch.allclose(project(norm, delta, radius, low, high, None), x, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", P)
def test_projection_fixes_interior_points_bit_for_bit(norm: str, dtype: torch.dtype) -> None:
    """A known bug blows interior points up to the radius: it clamps the perturbation where it
    should clamp the factor.
    """
    delta = torch.randn(CASES, D, generator=drawn(15), dtype=dtype) * 0.1
    radius, w = norm_named(norm).of(delta) * 1.01, torch.full((D,), 0.9, dtype=dtype)
    wide = torch.full_like(delta, torch.inf)
    for weight in (None, w):
        assert torch.equal(project(norm, delta, radius, -wide, wide, weight), delta)
        assert torch.equal(project(norm, delta, radius, -delta.abs(), delta.abs(), weight), delta)
    assert (
        project(
            norm,
            torch.zeros(2, D, dtype=dtype),
            torch.tensor([0.0, 1.0], dtype=dtype),
            -wide[:2],
            wide[:2],
            None,
        )
        .abs()
        .sum()
        == 0
    )


def test_the_l1_projection_is_not_radial() -> None:
    wide = tensor(torch.inf, torch.inf)
    assert project("l1", tensor(3.0, 1.0), torch.ones(1), -wide, wide, None).tolist() == [
        [1.0, 0.0]
    ]


# ---- distances
# --------------------------------------------------------------------------------------------------


def test_distances_in_all_four_norms() -> None:
    a, b = torch.zeros(2, 1, 3), torch.tensor([[[3.0, 0.0, -4.0]], [[0.0, 0.0, 0.0]]])
    assert {n: distance_between(a, b, n).tolist() for n in ("linf", "l2", "l1", "l0")} == {
        "linf": [4, 0],
        "l2": [5, 0],
        "l1": [7, 0],
        "l0": [2, 0],
    }
    assert distance_between(a, b, "l0").dtype == torch.float64
    assert [float(norm_named(n).dual(tensor(3.0, -4.0))) for n in P] == [7, 5, 4]
    assert [NORMS[n].longest_unit(16) for n in P] == [4, 1, 1]


def test_norms_are_found_by_their_usual_names() -> None:
    assert [norm_named(n).name for n in ("Linf", "inf", "l∞", "L2", "2", "euclidean", "1")] == [
        "linf",
        "linf",
        "linf",
        "l2",
        "l2",
        "l2",
        "l1",
    ]
    assert norm_named("0") == norm_named("l0") and norm_named("l0").is_count
    with pytest.raises(BadInput, match=r"unknown norm 'l3'; a Ball takes 'linf', 'l2' or 'l1'"):
        norm_named("l3")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=D, max_size=D),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=D, max_size=D),
)
def test_hoelder_and_the_triangle(a: list[float], b: list[float]) -> None:
    x, y = tensor(*a), tensor(*b)
    for norm in map(norm_named, P):
        assert float((x * y).sum().abs()) <= float(norm.of(x) * norm.dual(y)) * (1 + 1e-12)
        assert float(norm.of(x + y)) <= float(norm.of(x) + norm.of(y)) * (1 + 1e-12)


# ---- random streams
# --------------------------------------------------------------------------------------------------


def streams(*names: str, seed: int = 0) -> Streams:
    return Streams.of(seed, names, torch.device("cpu"))


def test_streams_are_uniform_and_normal() -> None:
    many = streams(*map(str, range(40)))
    uniform, normal = many.uniform(500, torch.float64), many.normal(501, torch.float64)
    assert ((uniform >= 0) & (uniform < 1)).all() and normal.isfinite().all()
    assert kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    for numbers in (uniform, normal):
        within, between = (
            torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()])),
            torch.corrcoef(numbers[:, :500]),
        )
        assert (
            abs(float(within[0, 1])) < 0.03 and float((between - torch.eye(40)).abs().max()) < 0.25
        )


def test_a_job_draws_the_same_numbers_whoever_runs_beside_it() -> None:
    together, alone, reversed_ = (
        streams("a", "b", "c").fork(3),
        streams("b").fork(3),
        streams("c", "b", "a").fork(3),
    )
    for draw in (lambda s: s.uniform(64, torch.float32), lambda s: s.normal(64, torch.float32)):
        assert torch.equal(draw(together)[1:2], draw(alone)) and torch.equal(
            draw(together), draw(reversed_).flip(0)
        )
        assert torch.equal(draw(together.take(torch.tensor([2, 0])))[1], draw(together)[0])
        assert torch.equal(draw(together)[:, :10], draw(together)[:, :64][:, :10])
    assert torch.equal(
        streams("a").uniform(10, torch.float64), streams("a").uniform(99, torch.float64)[:, :10]
    )


def test_forks_seeds_and_names_give_different_numbers() -> None:
    base = streams("a")
    every = [
        base,
        *map(base.fork, range(50)),
        base.fork(3).fork(4),
        base.fork(4).fork(3),
        streams("a", seed=1),
        streams("b"),
    ]
    first = torch.cat([s.uniform(8, torch.float64) for s in every])
    assert len({tuple(row) for row in first.tolist()}) == len(every)
    assert torch.equal(base.fork(torch.tensor([7])).keys, base.fork(7).keys)
    assert key_of(1, 23) != key_of(12, 3) and 0 <= key_of("x") < 2**63


def test_streams_leave_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    streams("a").fork(1).normal(100, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", P)
def test_samples_are_uniform_in_the_ball(norm: str) -> None:
    """The share of the volume within half the radius is 2^-d."""
    d, n = 3, 6000
    ball = Ball(norm, 2.0, box=None).region(torch.zeros(n, d, dtype=torch.float64))
    points = ball.sample(streams(*map(str, range(n))))
    length = ball.norm.of(points)
    assert float(length.max()) <= 2.0 and float(length.max()) > 1.9
    assert float((length < 1).double().mean()) == pytest.approx(2.0**-d, abs=0.02)
    assert float(points.mean(0).abs().max()) < 0.06
