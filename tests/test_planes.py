"""Do the planes of matrix products and of log sum exp lie where they should, whatever is chosen?
Against values at random points and corners of boxes.
"""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_soundness import relaxed, violations
from torch import Tensor, nn

from calipers.bounds import float64_check
from calipers.bounds.backward import Dense, lower_bounds
from calipers.bounds.dual_bound import Dual, Root
from calipers.bounds.float64_check import confirmed
from calipers.bounds.optimise import Ascent
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import SEARCH
from calipers.bounds.unstable import carried, unstable_elements
from calipers.graph.capture import capture
from calipers.graph.logsumexp import LogSumExp
from calipers.graph.matmul import Contracted, Facets, MatMul
from calipers.graph.products import SELECTIONS, Product
from calipers.graph.relaxations import Fixed, Lines
from calipers.models.classifier import Classifier
from calipers.threats.ball import Ball

Ends = tuple[Tensor, Tensor]
POINTS, STACK, ROWS, INNER, COLUMNS = 3, 2, 3, 4, 2


def drawn(seed: int, *shape: int, wide: float = 1.0) -> Ends:
    """Return random ends of boxes, some of them of no width."""
    generator = torch.Generator().manual_seed(seed)
    centre, radius = (
        torch.randn(*shape, generator=generator).double(),
        wide * torch.rand(*shape, generator=generator).double(),
    )
    radius = radius * (torch.rand(*shape, generator=generator) > 0.1)
    return centre - radius, centre + radius


def inside(ends: Ends, seed: int, count: int = 64) -> Tensor:
    """Return points of boxes (count, *shape), half of them corners."""
    share = torch.rand(
        count, *ends[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    share[::2] = share[::2].round()
    return ends[0] + share * (ends[1] - ends[0])


def factors(seed: int, wide: float = 1.0) -> tuple[Ends, Ends]:
    return drawn(seed, POINTS, STACK, ROWS, INNER, wide=wide), drawn(
        seed + 1, POINTS, STACK, INNER, COLUMNS, wide=wide
    )


def weights(seed: int) -> tuple[Tensor, Tensor]:
    """Return coefficients (P, *out) of both signs, and alpha."""
    generator = torch.Generator().manual_seed(seed + 2)
    shape = (POINTS, STACK, ROWS, COLUMNS)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.rand(
        shape, generator=generator, dtype=torch.float64
    )


def objection(facets_of: Callable[..., Facets], seed: int, wide: float) -> str:
    """Say whether the bound that coefficients get from the planes lies above a value."""
    op, (x, y), (a, alpha) = MatMul(), factors(seed, wide), weights(seed)
    for choice in (None, alpha, torch.zeros_like(alpha), torch.ones_like(alpha)):
        facets = facets_of(x, y, choice)
        (back_x, back_y), offset = facets.backward(a[:, None], [])
        for p, q in zip(inside(x, seed + 3), inside(y, seed + 4), strict=True):
            low = (
                (back_x[:, 0] * p).flatten(1).sum(1)
                + (back_y[:, 0] * q).flatten(1).sum(1)
                + offset[:, 0]
            )
            value = (a * op.value(p, q)).flatten(1).sum(1)
            room = 1e-15 * (
                a.abs() * facets.size(*(torch.maximum(e[0].abs(), e[1].abs()) for e in (x, y)))
            ).flatten(1).sum(1)
            if bool((low > value + room).any()):
                return f"seed {seed}: {low} above {value}"
    return ""


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-9, 0.1, 3.0, 1e4]))
def test_planes_of_a_matrix_product_bound_it(seed: int, wide: float) -> None:
    assert not objection(MatMul().relaxation, seed, wide)


@pytest.mark.parametrize(
    "name", ["low_low", "low_high", "high_low", "high_high", "low_x", "high_y"]
)
def test_mutant_with_a_false_end_is_caught(name: str) -> None:
    def wrong(x: Ends, y: Ends, alpha: Tensor | None) -> Facets:
        facets = MatMul().relaxation(x, y, alpha)
        sign = -1 if name in ("low_low", "high_high") else 1
        changed = (
            getattr(facets, name) + sign * 0.5
            if name.count("_") and name[-1] in "wh"
            else getattr(facets, name) + 1.0
        )
        return facets._replace(**{name: changed})

    assert any(objection(wrong, seed, 1.0) for seed in range(30))


def test_planes_are_those_of_each_product_by_itself() -> None:
    op, (x, y), (a, alpha) = MatMul(), factors(5), weights(5)
    wide_x, wide_y = (
        [e[..., None].expand(POINTS, STACK, ROWS, INNER, COLUMNS) for e in x],
        [e[..., None, :, :].expand(POINTS, STACK, ROWS, INNER, COLUMNS) for e in y],
    )
    saddle = Product().relaxation(
        (wide_x[0], wide_x[1]),
        (wide_y[0], wide_y[1]),
        alpha[..., None, :].expand(POINTS, STACK, ROWS, INNER, COLUMNS),
    )
    low = a[..., None, :] > 0
    slopes = [
        torch.where(low, below, above) for below, above in zip(saddle[:3], saddle[3:], strict=True)
    ]
    each = [a[..., None, :] * t for t in slopes]
    expected = each[0].sum(-1), each[1].sum(-3), each[2].flatten(1).sum(1)
    (back_x, back_y), offset = op.relaxation(x, y, alpha).backward(a[:, None], [])
    for ours, theirs in zip((back_x[:, 0], back_y[:, 0], offset[:, 0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_interval_of_a_matrix_product_is_met_and_kept() -> None:
    for seed in range(20):
        (x, y), op = factors(seed, 2.0), MatMul()
        low, high = op.interval(x, y)
        values = op.value(inside(x, seed, 400), inside(y, seed + 1, 400))
        assert bool((values >= low).all() and (values <= high).all())
        # one row with one column: its terms are independent, so corners attain the ends
        one = [t[..., :1, :] for t in x], [t[..., :1] for t in y]
        least = (
            torch.stack([a * b.transpose(-1, -2) for a in one[0] for b in one[1]]).amin(0).sum(-1)
        )
        torch.testing.assert_close(
            op.interval((one[0][0], one[0][1]), (one[1][0], one[1][1]))[0][..., 0],
            least,
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("kind", ["contraction", "product"])
def test_a_bound_changes_with_alpha_as_the_search_believes(kind: str) -> None:
    (x, y), (a, alpha) = factors(8), weights(8)
    if kind == "product":
        y = drawn(11, *x[0].shape)
        a, alpha = torch.randn_like(x[0]), torch.rand_like(x[0])
    sheet = (
        Product().parametrised(Product().relaxation(x, y), x, y)
        if kind == "product"
        else Contracted(MatMul().relaxation(x, y))
    )
    inputs = [inside(x, 1)[1], inside(y, 2)[1]]

    def bound(choice: Tensor) -> Tensor:
        backs, offset = sheet.backward(a, choice.flatten(1), [])
        at = sum((b * t).flatten(1).sum(1) for b, t in zip(backs, inputs, strict=True)) + offset
        torch.testing.assert_close(
            at,
            (a * sheet.at(a, choice.flatten(1), inputs)).flatten(1).sum(1),
            rtol=1e-10,
            atol=1e-10,
        )
        return torch.as_tensor(at)

    pull, step = (
        sheet.pull(a, inputs),
        torch.randn(alpha.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    )
    assert pull is not None
    rise = (bound(alpha + 1e-3 * step) - bound(alpha - 1e-3 * step)) / 2e-3
    torch.testing.assert_close(rise, (pull * step.flatten(1)).sum(1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["pooling", "selection"])
def test_planes_without_a_choice_have_the_value_that_goes_back(kind: str) -> None:
    """What the search sends forward through an operation is what its coefficients said going
    back.
    """
    ends = drawn(4, POINTS, 6, 2)
    pool = SELECTIONS["aten.max_pool1d.default"]((None, [2], [2]), (6, 2), (6, 1))
    assert pool is not None
    planes = LogSumExp(1).relaxation(ends) if kind == "pooling" else pool.relaxation(ends)
    sheet, x = Fixed(planes), inside(ends, 5)[1]
    a = torch.randn(
        POINTS,
        6,
        2 if kind == "pooling" else 1,
        generator=torch.Generator().manual_seed(6),
        dtype=torch.float64,
    )
    (back,), offset = sheet.backward(a, None, [(6, 2)])
    at = (back.view_as(x) * x).flatten(1).sum(1) + offset
    torch.testing.assert_close(
        at, (a * sheet.at(a, None, [x])).flatten(1).sum(1), rtol=1e-10, atol=1e-10
    )
    assert sheet.start() is None and sheet.pull(a, [x]) is None


# ---- log sum exp
# --------------------------------------------------------------------------------------------------


def cut_off(lines_of: Callable[[Ends], Lines], seed: int, wide: float, count: int) -> bool:
    """Do sums of lines cut off a value?"""
    ends, op = drawn(seed, 4, count, 3, wide=wide), LogSumExp(1)
    lines = lines_of(ends)
    for x in inside(ends, seed + 1, 200):
        value = op.value(x).sum(1)
        low, high = ((lines[k] * x + lines[k + 1]).sum(1) for k in (0, 2))
        if bool(((low > value) | (high < value)).any()):
            return True
    return False


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-12, 1e-3, 1.0, 30.0, 1e3]), st.integers(1, 9))
def test_sums_of_lines_hold_log_sum_exp(seed: int, wide: float, count: int) -> None:
    op, ends = LogSumExp(1), drawn(seed, 4, count, 3, wide=wide)
    assert not cut_off(op.relaxation, seed, wide, count)
    low, high = op.interval(ends)
    values = torch.stack([op.value(x) for x in inside(ends, seed)])
    assert bool((values >= low).all() and (values <= high).all())


WRONG: dict[str, Callable[[Lines], Lines]] = {
    "lower raised": lambda t: t._replace(lower_intercept=t.lower_intercept + 0.05),
    "upper lowered": lambda t: t._replace(upper_intercept=t.upper_intercept - 0.05),
    # in another order they would be as true: their entropy is the same
    "lower slopes of sum 1.2": lambda t: t._replace(lower_slope=1.2 * t.lower_slope),
    "upper slopes of another element": lambda t: t._replace(upper_slope=t.upper_slope.roll(1, 1)),
    "the tangent above": lambda t: t._replace(
        upper_slope=t.lower_slope, upper_intercept=t.lower_intercept
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mutant_of_the_lines_of_log_sum_exp_is_caught(mistake: str) -> None:
    op = LogSumExp(1)
    assert any(
        cut_off(lambda ends: WRONG[mistake](op.relaxation(ends)), seed, 1.0, 4)
        for seed in range(20)
    )


def test_log_sum_exp_over_boxes_without_an_end_says_nothing_and_no_nan() -> None:
    low, high = drawn(3, 2, 4, 1)
    low[0, 1], high[1, 2] = -torch.inf, torch.inf
    lines = LogSumExp(1).relaxation((low, high))
    assert not any(bool(t.isnan().any()) for t in lines)
    assert bool(
        (lines.lower_intercept == -torch.inf).all() and (lines.upper_intercept == torch.inf).all()
    )


def test_planes_of_log_sum_exp_are_tangent_where_the_box_is_small() -> None:
    """Over a box of half width h both planes are within h^2 of the function: its curvature is at
    most 1/2 for each unit of h^2 n.
    """
    centre = torch.randn(1, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for h in (1e-1, 1e-2, 1e-3):
        lines = LogSumExp(1).relaxation((centre - h, centre + h))
        gap = (
            (lines.upper_slope - lines.lower_slope) * centre
            + lines.upper_intercept
            - lines.lower_intercept
        ).sum()
        assert 0 < float(gap) < h**2 + 1e-12


# ---- whole networks
# --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax over one axis of a product, times values, and the log-softmax of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 4) -> (N, 4)."""
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        mixed = torch.softmax(scores, -1) @ self.value(x)
        return torch.log_softmax(self.out(mixed).sum(1), 1) + torch.logsumexp(
            x.sum(2), 1, keepdim=True
        )


@pytest.fixture(scope="module")
def attention() -> tuple[nets.Case, Tensor]:
    torch.manual_seed(1)
    module = Attention().double().eval()
    graph = capture(Classifier(module), torch.rand(2, 3, 4, dtype=torch.float64))
    case = nets.case_of(graph, 4, ball=Ball("linf", 0.3, box=None))
    return case, nets.attacked(case, 1, steps=20)


def test_attention_is_captured_as_products_of_matrices_and_log_sum_exp(
    attention: tuple[nets.Case, Tensor],
) -> None:
    kinds = [type(node.op) for node in attention[0].graph.nodes]
    assert kinds.count(MatMul) == 2 and kinds.count(LogSumExp) == 3 and Product not in kinds
    assert not violations(*attention)


def test_searched_planes_are_tighter_than_the_first_ones_and_hold(
    attention: tuple[nets.Case, Tensor],
) -> None:
    case, points = attention
    state = relaxed(case)
    number, rows = len(case.graph.nodes), torch.eye(4, dtype=torch.float64).repeat(2, 1)
    rows[4:] *= -1
    place = torch.arange(len(case.x)).repeat_interleave(len(rows))
    spec = rows.repeat(len(case.x), 1)[:, None]
    root = Root.of(state, SEARCH.dtype, case.ball.region(case.x.float()))
    dual = Dual(root, place, number, spec.float())
    start = confirmed(dual, dual.guess(), spec)
    plain = lower_bounds(state, number, Dense(rows.expand(len(case.x), -1, -1), None)).flatten()
    torch.testing.assert_close(start, plain, rtol=1e-5, atol=1e-6)
    _, free = Ascent(20, 0.3, enough=torch.inf)(dual, dual.guess())
    best = confirmed(dual, free, spec)
    assert bool((best >= start - 1e-6).all()) and float((best - start).mean()) > 1e-3
    contractions = [
        k for k, node in enumerate(case.graph.nodes, start=1) if isinstance(node.op, MatMul)
    ]
    assert all(bool((free.alpha[k] > 0.01).any()) for k in contractions)
    values = case.graph.values(points.flatten(0, 1))[-1].view(len(points), len(case.x), 4)
    seen = torch.einsum("kc,rnc->rnk", rows, values).amin(0).flatten()
    assert bool((best <= seen).all())


def asked(case: nets.Case) -> tuple[Dual, Tensor]:
    """Return the bounds of every output of every point, and what is bounded (P, 1, K)."""
    spec = torch.eye(4, dtype=torch.float64).repeat(len(case.x), 1)[:, None]
    root = Root.of(relaxed(case), SEARCH.dtype, case.ball.region(case.x.float()))
    return Dual(
        root, torch.arange(len(case.x)).repeat_interleave(4), len(case.graph.nodes), spec.float()
    ), spec


def test_weights_of_planes_outside_their_range_are_brought_back(
    attention: tuple[nets.Case, Tensor],
) -> None:
    """Far along the gradient, where a plane that is none would be as high as one likes."""
    case, points = attention
    dual, spec = asked(case)
    free = dual.guess()
    uphill = dual.gradient(free, dual.see(free))
    wild = free.each(lambda kind, k, t: t + 1e3 * uphill.of(kind, k).sign())
    values = case.graph.values(points.flatten(0, 1))[-1].view(len(points), -1).amin(0)
    bound = confirmed(dual, wild, spec)
    assert bool((bound <= values).all())
    torch.testing.assert_close(
        bound, confirmed(dual, free.each(lambda kind, k, t: wild.of(kind, k).clamp(0, 1)), spec)
    )


@pytest.mark.parametrize("name", ["attention of torch", "product, broadcast", "group norm"])
def test_the_allowance_for_rounding_is_that_of_the_planes_chosen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = nets.case_of(nets.captured(name), 3), list[Relaxed]()

    def watched(state: Relaxed, number: int, start: Dense) -> Tensor:
        seen.append(state)
        return lower_bounds(state, number, start)

    monkeypatch.setattr(float64_check, "lower_bounds", watched)
    outputs, count = case.graph.nodes[-1].shape[0], len(case.x)
    spec = torch.eye(outputs, dtype=torch.float64).repeat(count, 1)[:, None]
    root = Root.of(relaxed(case), SEARCH.dtype, case.ball.region(case.x.float()))
    dual = Dual(
        root, torch.arange(count).repeat_interleave(outputs), len(case.graph.nodes), spec.float()
    )
    products = 0
    for end in (0.0, 1.0):
        free = dual.guess().each(lambda kind, k, t, end=end: torch.full_like(t, end))  # type: ignore[misc]
        confirmed(dual, free, spec)
        state = seen.pop()
        for number, relaxation in state.relaxations.items():
            boxes = [
                root.state.boxes[i].take(dual.rows) for i in case.graph.nodes[number - 1].inputs
            ]
            assert bool(
                (
                    state.sizes[number]
                    >= relaxation.size(*(b.magnitude for b in boxes)) * (1 - 1e-12)
                ).all()
            )
            products += case.graph.nodes[number - 1].op.label in ("Product", "MatMul")
    assert products


def test_scores_are_bounded_where_their_softmax_is_asked_for(
    attention: tuple[nets.Case, Tensor],
) -> None:
    case, _ = attention
    state = relaxed(case)
    for number, node in enumerate(case.graph.nodes, start=1):
        box = state.boxes[node.inputs[0]]
        if isinstance(node.op, LogSumExp):
            assert bool(node.op.unstable(box.lower, box.upper).all())
            assert not bool(node.op.unstable(box.lower, box.lower).any())
            assert bool(unstable_elements(case.graph, node.inputs[0], box).all()), number


def test_a_way_through_a_curve_carries_its_range(attention: tuple[nets.Case, Tensor]) -> None:
    """What reads exp(z) is asked about the box of exp(z), not that of z."""
    graph, state = attention[0].graph, relaxed(attention[0])
    ways = [
        way
        for way in graph.ways.values()
        if any(graph.nodes[k - 1].op.elementwise for k in way[1:])
    ]
    assert ways
    for way in ways:
        found, last = carried(graph, way, state.boxes[way[0]]), state.boxes[way[-1]]
        torch.testing.assert_close(found.lower, last.lower, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.upper, last.upper, rtol=1e-6, atol=1e-9)
