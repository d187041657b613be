"""Is every bound of the lower jaw below everything an attack can find? Thousands of random
networks, and mutants that must be caught.

`violations` is the one judge: it bounds a case, and names every number and margin whose bound an
attacked point has crossed. Mutants are deliberate mistakes in the bounds; each has a test of its
own, which fails if the judge stays silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import nets
import pytest
import torch
from nets import Case, attacked, random_case
from torch import Tensor

from calipers.bounds import backward, coefficients
from calipers.bounds.backward import interval_margin_bounds, lower_bounds, margin_bounds, relax
from calipers.bounds.coefficients import Coefficients, Dense, Patch
from calipers.bounds.interval import Box
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import CHECKED, SEARCH, Arithmetic, plain_sums
from calipers.bounds.unstable import unstable_elements
from calipers.graph import affine, smooth_relaxation
from calipers.graph.activations import TwoPieces
from calipers.graph.affine import Conv, Linear
from calipers.graph.kinds import Affine
from calipers.graph.products import MaxPool
from calipers.graph.relaxations import Ends, Lines, Planes
from calipers.threats.ball import Ball, Fall, Region
from calipers.threats.norms import L0, L1, L2, Support

# 150 of 1,000 random networks each time; the others, and 1,000 more, on the slow shelf
BLOCKS, NETS = 20, 50
SAME = 1e-9  # float64, another order of summation
# the search for a touching point ends before rounding does, and where two roots meet it enlarges a
# difference
SAME_TANGENTS = 1e-6
FLOAT32 = (
    2e-4  # relative to the largest value of a number; SEARCH does not account for its rounding
)


# ---- the judge
# --------------------------------------------------------------------------------------------------


def relaxed(
    case: Case,
    arithmetic: Arithmetic = CHECKED,
    known: dict[int, Box] | None = None,
    *,
    refine: bool = True,
) -> Relaxed:
    """Relax a case as the certifiers do."""
    region = case.ball.region(case.x.to(arithmetic.dtype), outward=True)
    with torch.no_grad(), plain_sums():
        return relax(case.graph.to(arithmetic.dtype), region, arithmetic, known, refine=refine)


def margins_of(case: Case, state: Relaxed, *, refine: bool = True) -> Tensor:
    """Return the margins' lower bounds (N, S), float64."""
    rows = case.goal.rows(case.y, case.classes)
    with torch.no_grad(), plain_sums():
        return (margin_bounds if refine else interval_margin_bounds)(state, rows).double()


def violations(
    case: Case,
    points: Tensor,
    arithmetic: Arithmetic = CHECKED,
    known: dict[int, Box] | None = None,
) -> list[str]:
    """Name every number and margin whose bound one of the points (R, N, *D) has crossed, for CROWN
    and for plain intervals.
    """
    with torch.no_grad():
        values = [
            v.view(len(points), len(case.x), *v.shape[1:])
            for v in case.graph.values(points.flatten(0, 1))
        ]
    found = []
    for refine in (True, False):
        state = relaxed(case, arithmetic, known, refine=refine)
        method = f"{'CROWN' if refine else 'intervals'} in {arithmetic.dtype}"
        found += [
            f"{method}: number {k} ({_name(case, k)})"
            for k, box in state.boxes.items()
            if _escapes(values[k], box, _slack(values[k], arithmetic))
        ]
        found += [
            f"{method}: {text}"
            for text in _crossed_margins(
                case,
                values[-1],
                margins_of(case, state, refine=refine),
                _slack(values[-1], arithmetic),
            )
        ]
    return found


def _name(case: Case, number: int) -> str:
    return type(case.graph.nodes[number - 1].op).__name__ if number else "input"


def _slack(values: Tensor, arithmetic: Arithmetic) -> float:
    """Nothing for the checked arithmetic."""
    return 0.0 if arithmetic.checked else FLOAT32 * (1 + float(values.abs().max()))


def _escapes(values: Tensor, box: Box, slack: float) -> bool:
    """Is a value outside, or an end not a number?"""
    return not bool(
        ((values >= box.lower.double() - slack) & (values <= box.upper.double() + slack)).all()
    )


def _crossed_margins(case: Case, logits: Tensor, bounds: Tensor, slack: float) -> list[str]:
    margins = torch.stack([case.goal.margins(z, case.y) for z in logits])
    found = [] if bool((bounds - slack <= margins.amin(0)).all()) else ["a margin"]
    worst = torch.stack([case.goal.worst(m) for m in margins]).amin(0)
    return (
        found
        if bool((case.goal.worst(bounds) - slack <= worst).all())
        else [*found, "the worst margin"]
    )


def judged(case: Case, seed: int, arithmetic: Arithmetic = CHECKED) -> list[str]:
    """Attack a case and judge it."""
    return violations(case, attacked(case, seed), arithmetic)


def cases(
    first: int, count: int, activation: str | None = None, ball: Ball | None = None
) -> Iterator[tuple[int, Case]]:
    """Yield random cases with their seeds."""
    return ((seed, random_case(seed, activation, ball)) for seed in range(first, first + count))


# ---- bound <= everything attacked
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "block",
    [k if k < BLOCKS else pytest.param(k, marks=pytest.mark.slow) for k in range(2 * BLOCKS)],
)
def test_no_attacked_point_crosses_a_bound(block: int) -> None:
    for seed, case in cases(block * NETS, NETS):
        points = attacked(case, seed)
        assert nets.inside(case, points).all()
        assert not violations(case, points), f"seed {seed}"
        if seed % 3 == 0:
            assert not violations(case, points, SEARCH), f"seed {seed}"


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "args"), nets.activations(), ids=str)
def test_every_activation_in_a_network(name: str, args: tuple[Any, ...]) -> None:
    for seed, case in cases(50_000, 12, name):
        assert not judged(case, seed), f"seed {seed}"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", sorted(nets.ZOO))
def test_no_attacked_point_crosses_a_bound_of_a_captured_module(name: str) -> None:
    judge_captured(name, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(nets.ZOO))
def test_no_attacked_point_crosses_a_bound_of_a_captured_module_asked_often(name: str) -> None:
    judge_captured(name, range(2, 12))


def judge_captured(name: str, seeds: range) -> None:
    """Ask random questions about a module of the zoo."""
    graph = nets.captured(name)
    for seed in seeds:
        case = nets.case_of(graph, seed)
        assert not judged(case, seed), f"seed {seed}"


def test_the_question_is_neither_trivial_nor_hopeless() -> None:
    certified = broken = total = 0
    for seed, case in cases(0, 100):
        points = attacked(case, seed)
        worst = (
            case.worst(case.graph.values(points.flatten(0, 1))[-1], len(points))
            .view(len(points), -1)
            .amin(0)
        )
        proved = case.goal.worst(margins_of(case, relaxed(case))) > 0
        assert not bool((proved & (worst <= 0)).any())
        certified, broken, total = (
            certified + int(proved.sum()),
            broken + int((worst <= 0).sum()),
            total + len(case.x),
        )
    assert certified > 0.2 * total and broken > 0.15 * total


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arithmetic", [CHECKED, SEARCH], ids=["checked", "search"])
def test_boxes_of_a_larger_radius_remain_sound(arithmetic: Arithmetic) -> None:
    for seed, case in cases(10_000, 20):
        larger = case.at(case.ball.radii(len(case.x)) * 1.5)
        for refine in (True, False):
            known = relaxed(larger, arithmetic, refine=refine).boxes
            assert not violations(case, attacked(case, seed), arithmetic, known), f"seed {seed}"


def test_known_boxes_of_infinite_size_change_nothing() -> None:
    for seed, case in cases(10_000, 20):
        state = relaxed(case)
        nothing = {
            k: Box(torch.full_like(b.lower, -torch.inf), torch.full_like(b.upper, torch.inf))
            for k, b in state.boxes.items()
        }
        assert_same_boxes(state, relaxed(case, known=nothing), f"seed {seed}")


# ---- the same answer in other words
# --------------------------------------------------------------------------------------------------


def assert_same_boxes(a: Relaxed, b: Relaxed, why: str, tolerance: float = SAME) -> None:
    """Assert that all boxes of two states agree."""
    for number, box in a.boxes.items():
        for end in ("lower", "upper"):
            other = getattr(b.boxes[number], end)
            torch.testing.assert_close(
                other,
                getattr(box, end),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, k=number: f"{why}, number {k}: {m}",
            )


def counted(first: int, count: int) -> Iterator[tuple[int, Case]]:
    """Yield random cases in which the adversary may move a few features anywhere in a wide box."""
    return cases(first, count, ball=Ball("l0", 2.0, box=(-4.0, 6.0)))


def sparse(case: Case, seed: int) -> Tensor:
    """Return points (R, N, *D) with two features changed: random ones, and those that the margin's
    gradient names, at the ends of the box or between.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = len(case.x), case.x[0].numel()
    low, high = (float(end) for end in case.ball.box or (0, 0))
    centre = case.x.clone().requires_grad_()
    gradient = torch.autograd.grad(case.worst(case.graph.values(centre)[-1], 1).sum(), centre)[
        0
    ].flatten(1)
    steep = torch.where(gradient > 0, low, high)
    gain = (gradient * (steep - case.x.flatten(1))).neg()
    chosen = torch.rand(300, n, d, generator=generator, dtype=torch.float64).argsort(-1)[
        ..., : min(2, d)
    ]
    chosen = torch.cat([chosen, gain.topk(min(2, d), -1).indices.expand(1, -1, -1)])
    ends = torch.where(torch.rand(301, n, d, generator=generator) < 0.5, low, high).double()
    between = low + (high - low) * torch.rand(301, n, d, generator=generator, dtype=torch.float64)
    values = torch.where(torch.rand(301, n, 1, generator=generator) < 0.7, ends, between)
    values[-1] = steep
    flat = case.x.flatten(1).expand(301, -1, -1)
    return flat.scatter(-1, chosen, values.gather(-1, chosen)).view(301, *case.x.shape)


def test_no_point_with_few_changed_features_crosses_a_bound() -> None:
    """The radius says how many features move, not how far: taken for a length, it would certify
    against a cube of side 2.
    """
    for seed, case in counted(50_000, 25):
        points = sparse(case, seed)
        region = case.ball.region(case.x)
        assert (
            all(bool(region.contains(p).all()) for p in points[::50])
            and float((points - case.x).abs().max()) > 2.5
        )
        assert not violations(case, points), f"seed {seed}"
        assert not violations(case, points, SEARCH), f"seed {seed}"


def test_mutant_that_takes_a_count_for_a_length_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught(
        monkeypatch,
        L0,
        "alone",
        lambda self, radius: radius,
        asked=counted(50_000, 20),
        attack=sparse,
    )


def test_mutant_that_moves_one_feature_too_few_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    support = L0.support

    def fewer(self: L0, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Any:
        return support(self, g, radius - 1, low, high)

    assert caught(monkeypatch, L0, "support", fewer, asked=counted(50_000, 40), attack=sparse)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "slope",
    [
        lambda low, high: torch.zeros_like(low),
        lambda low, high: torch.ones_like(low),
        lambda low, high: (high * 7919).frac().abs(),
    ],
)
def test_margins_hold_for_every_choice_of_free_slopes(slope: Any) -> None:
    nonlinear = 0
    for seed, case in cases(51_000, 60):
        state = relaxed(case)
        other = state.sloped(slope)
        nonlinear += any(
            not torch.equal(a, b)
            for k in state.relaxations
            for a, b in zip(state.relaxations[k], other.relaxations[k], strict=True)
        )
        points = attacked(case, seed)
        found = _crossed_margins(
            case,
            case.graph.values(points.flatten(0, 1))[-1].view(len(points), len(case.x), -1),
            margins_of(case, other),
            0.0,
        )
        assert not found, f"seed {seed}: {found}"
    assert nonlinear > 20


def starts_of(case: Case, number: int, seed: int) -> list[Coefficients]:
    """Return rows of a number for every point, dense and, where it is an image made by a
    convolution, as patches.
    """
    shape = case.graph.shape(number)
    generator = torch.Generator().manual_seed(seed)
    n, size = len(case.x), torch.Size(shape).numel()
    starts: list[Coefficients] = [
        Dense(torch.randn(n, 3, *shape, generator=generator, dtype=torch.float64), None)
    ]
    if len(shape) == 3 and isinstance(case.graph.nodes[number - 1].op, Conv):
        points = torch.arange(n).repeat(4)
        picked, sign = (
            torch.randint(size, (len(points),), generator=generator),
            torch.ones(len(points), 1, dtype=torch.float64),
        )
        starts.append(coefficients.unit_rows(picked, points, shape, sign, windowed=True))
    return starts


def test_what_bends_in_the_end_is_bounded_on_both_sides() -> None:
    """One end is bounded first, and the other only where the first settled nothing: so both ends
    must be at least as tight as sweeps of their own.
    """
    seen = 0
    for seed, case in cases(20_000, 60):
        state = relaxed(case)
        for number in case.graph.nonlinear:
            users = [
                node.op
                for node in case.graph.nodes
                if node.inputs[0] == number and not isinstance(node.op, Affine)
            ]
            box = state.boxes[number]
            unstable = (
                torch.stack([op.unstable(box.lower, box.upper) for op in users]).any(0).flatten(1)
            )
            eye = (
                torch.eye(unstable.shape[1], dtype=torch.float64)
                .view(1, -1, *case.graph.shape(number))
                .repeat(len(case.x), *[1] * (1 + len(box.lower.shape[1:])))
            )
            low, negative = (lower_bounds(state, number, Dense(a, None)) for a in (eye, -eye))
            tight = (box.lower.flatten(1) >= low - SAME * (1 + low.abs())) & (
                box.upper.flatten(1) <= -negative + SAME * (1 + negative.abs())
            )
            assert bool(tight[unstable].all()), f"seed {seed}, number {number}"
            seen += int(unstable.sum())
    assert seen > 1000


@pytest.mark.parametrize(("name", "longest"), [("attention of torch", 1), ("variance", 2)])
def test_copies_are_bounded_once_and_before_they_are_made(name: str, longest: int) -> None:
    """One factor, not each of its copies; what goes into a curve, not what comes out of it."""
    graph = nets.captured(name)
    for number, way in graph.ways.items():
        behind = [torch.Size(graph.shape(k)).numel() for k in way]
        assert behind[0] == min(behind), f"number {number} is bounded where its elements are more"
    assert any(len(way) > longest for way in graph.ways.values())
    assert not any(graph.nodes[k - 1].op.elementwise for k in graph.nonlinear if k)
    case = nets.case_of(graph, 3)
    state = relaxed(case)
    for number, way in graph.ways.items():
        flags = unstable_elements(graph, way[0], state.boxes[way[0]])
        ends = [
            n.op.unstable(state.boxes[number].lower, state.boxes[number].upper)
            for n in graph.nodes
            if number in n.inputs and not isinstance(n.op, Affine)
        ]
        if any(bool(end.any()) for end in ends):
            assert bool(flags.any()), f"nobody bounds what number {number} is made of"


def test_a_row_of_margins_lies_below_the_attacked_values_of_every_number() -> None:
    for seed, case in cases(21_000, 40):
        state, points = relaxed(case), attacked(case, seed)
        values = case.graph.values(points.flatten(0, 1))
        for number in range(1, len(values)):
            start = starts_of(case, number, seed)[0]
            seen = torch.einsum(
                "nsd,rnd->rns",
                start.dense().a.flatten(2),
                values[number].view(len(points), len(case.x), -1),
            ).amin(0)
            assert bool((lower_bounds(state, number, start) <= seen).all()), (
                f"seed {seed}, number {number}"
            )


def assert_alone_as_together(case: Case, why: str) -> None:
    """Assert that each point's boxes and margins are the same alone, and in a batch of another
    order with a point repeated.
    """
    whole = relaxed(case)
    margins = margins_of(case, whole)
    order = torch.tensor([*range(len(case.x) - 1, -1, -1), 0])
    for index in [order, *(torch.tensor([i]) for i in range(len(case.x)))]:
        part = case.take(index)
        state = relaxed(part)
        expected = Relaxed(
            case.graph,
            whole.region,
            CHECKED,
            whole.rows,
            {k: b.take(index) for k, b in whole.boxes.items()},
        )
        assert_same_boxes(expected, state, why)
        torch.testing.assert_close(margins_of(part, state), margins[index], rtol=SAME, atol=SAME)
        assert bool((state.rows == whole.rows[index]).all())


def test_a_point_is_bounded_alone_as_in_a_batch() -> None:
    for seed, case in cases(30_000, 40):
        assert_alone_as_together(case, f"seed {seed}")


@pytest.mark.parametrize(
    ("memory", "rows"), [pytest.param(2**8, 1, marks=pytest.mark.slow), (2**11, 7)]
)
def test_grouping_of_rows_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, memory: int, rows: int
) -> None:
    for seed, case in cases(31_000, 24):
        before = relaxed(case)
        with monkeypatch.context() as small:
            small.setattr(backward, "MEMORY", memory)
            small.setattr(backward, "_ROWS_OF_WINDOWS", rows)
            assert_same_boxes(before, relaxed(case), f"seed {seed}")


def force_dense(patch: pytest.MonkeyPatch) -> None:
    """Start every sweep dense."""
    unit_rows = backward.unit_rows

    def dense_rows(
        flat: Tensor, points: Tensor, shape: tuple[int, ...], sign: Tensor, *, windowed: bool
    ) -> Coefficients:
        return unit_rows(
            flat.view(len(points), -1), points, shape, sign.view(len(points), -1), windowed=False
        )

    patch.setattr(backward, "unit_rows", dense_rows)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("worth", [0.0, 0.6, 1e9])
@pytest.mark.parametrize("matrix", [0, 2**20])
def test_patches_equal_dense_rows(
    monkeypatch: pytest.MonkeyPatch, worth: float, matrix: int
) -> None:
    for seed in range(40_000, 40_050, 2):
        case = random_case(seed)
        with monkeypatch.context() as forced:
            force_dense(forced)
            dense = relaxed(case)
        with monkeypatch.context() as forced:
            forced.setattr(coefficients, "WORTH_A_WINDOW", worth)
            forced.setattr(backward, "WORTH_A_WINDOW", worth)
            forced.setattr(affine, "WINDOW_MATRIX", matrix)
            # Rounding allowances count the terms of a row, and a patch has fewer: that is the only
            # difference.
            assert_same_boxes(dense, relaxed(case), f"seed {seed}", SAME_TANGENTS)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arithmetic", [CHECKED, SEARCH], ids=["checked", "search"])
def test_radius_zero_gives_the_forward_pass(arithmetic: Arithmetic) -> None:
    tolerance = 1e-10 if arithmetic.checked else FLOAT32
    for seed, case in cases(60_000, 80):
        still = case.at(0.0)
        values = case.graph.values(case.x)
        for refine in (True, False):
            state = relaxed(still, arithmetic, refine=refine)
            for number, box in state.boxes.items():
                for end in (box.lower, box.upper):
                    torch.testing.assert_close(
                        end.double(),
                        values[number],
                        rtol=tolerance,
                        atol=tolerance,
                        msg=lambda m, s=seed: f"seed {s}: {m}",
                    )
            expected = case.goal.margins(values[-1], case.y)
            torch.testing.assert_close(
                margins_of(still, state, refine=refine),
                expected,
                rtol=10 * tolerance,
                atol=10 * tolerance,
            )


def test_a_larger_radius_never_gives_tighter_intervals() -> None:
    for seed, case in cases(70_000, 80):
        small, large = (
            relaxed(case.at(case.ball.radii(len(case.x)) * share), refine=False)
            for share in (1.0, 1.2)
        )
        for number, box in small.boxes.items():
            room = 1e-12 * (1 + box.magnitude)
            wider = large.boxes[number]
            assert bool((wider.lower <= box.lower + room).all()) and bool(
                (wider.upper >= box.upper - room).all()
            ), f"seed {seed}, number {number}"


def test_crown_boxes_are_never_wider_than_intervals() -> None:
    for seed, case in cases(71_000, 60):
        tight, loose = relaxed(case), relaxed(case, refine=False)
        for number, box in tight.boxes.items():
            wide = loose.boxes[number]
            room = 1e-10 * (1 + wide.magnitude)
            assert bool((box.lower >= wide.lower - room).all()) and bool(
                (box.upper <= wide.upper + room).all()
            ), f"seed {seed}, number {number}"


# ---- mutants
# --------------------------------------------------------------------------------------------------


def caught(
    monkeypatch: pytest.MonkeyPatch,
    *mutation: Any,
    asked: Iterable[tuple[int, Case]] | None = None,
    attack: Callable[[Case, int], Tensor] = attacked,
) -> list[str]:
    """Replace an attribute (owner, name, value), and return what the judge says of the first random
    case that it objects to.

    Of the same case without the mutation it has nothing to say.
    """
    for seed, case in asked or cases(0, 60):
        points = attack(case, seed)
        with monkeypatch.context() as mutated:
            mutated.setattr(*mutation)
            found = violations(case, points)
        if found:
            assert not violations(case, points)
            return found
    return []


def changed_lines(change: Any) -> Any:
    """Return a `relax` of ReLU-like functions whose lines are changed where the function bends."""
    sound = TwoPieces.relax

    def relax_wrongly(
        self: TwoPieces, lower: Tensor, upper: Tensor, alpha: Tensor | None = None
    ) -> Lines:
        lines = sound(self, lower, upper, alpha)
        return Lines(
            *(
                torch.where(self.unstable(lower, upper), b, a)
                for a, b in zip(lines, change(lines), strict=True)
            )
        )

    return relax_wrongly


RELU = "aten.relu.default"


def test_mutant_wrong_slope_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = changed_lines(lambda lines: lines._replace(upper_slope=-lines.upper_slope))
    assert caught(monkeypatch, TwoPieces, "relax", wrong, asked=cases(0, 60, RELU))


def test_mutant_wrong_sign_of_the_lower_slope_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # -alpha x: only seen where the adaptive slope is 1.
    wrong = changed_lines(lambda lines: lines._replace(lower_slope=-lines.lower_slope))
    assert caught(monkeypatch, TwoPieces, "relax", wrong, asked=cases(0, 60, RELU))


def test_mutant_dropped_intercept_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = changed_lines(
        lambda lines: lines._replace(upper_intercept=torch.zeros_like(lines.upper_intercept))
    )
    assert caught(monkeypatch, TwoPieces, "relax", wrong, asked=cases(0, 60, RELU))


def test_mutant_lower_and_upper_line_swapped_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = changed_lines(
        lambda lines: Lines(
            lines.upper_slope, lines.upper_intercept, lines.lower_slope, lines.lower_intercept
        )
    )
    assert caught(monkeypatch, TwoPieces, "relax", wrong, asked=cases(0, 60, RELU))


def test_mutant_wrong_dual_norm_of_l2_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # radius * max |g| is the dual of l1: too short for an l2 ball.
    def as_for_l1(self: L2, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Support:
        return L1().support(g, radius, low, high)

    assert caught(
        monkeypatch, L2, "support", as_for_l1, asked=cases(0, 60, ball=Ball("l2", 0.5, box=None))
    )


def test_mutant_wrong_dual_norm_of_linf_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # radius * ||g||_2 in place of radius * ||g||_1.
    def as_for_l2(
        self: Region, a: Tensor, points: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Fall:
        value = self.radius[points][:, None].to(a.dtype) * a.norm(dim=-1)
        return Fall(value, value)

    assert caught(
        monkeypatch,
        Region,
        "window_fall",
        as_for_l2,
        asked=cases(0, 60, ball=Ball("linf", 0.2, box=None)),
    )


def test_mutant_primal_norm_in_place_of_the_dual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def primal(
        self: Region, a: Tensor, points: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Fall:
        value = self.radius[points][:, None].to(a.dtype) * self.norm.of(a)
        return Fall(value, value)

    assert caught(
        monkeypatch,
        Region,
        "window_fall",
        primal,
        asked=cases(0, 60, ball=Ball("linf", 0.2, box=None)),
    )


def test_mutant_weights_of_features_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Region.window_fall

    def unweighted(
        self: Region, a: Tensor, points: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Fall:
        return sound(self, a, points, low, high, None)

    for norm in nets.ORDERS:
        graphs = ((seed, nets.dense_net(2 * seed + 1)) for seed in range(40))
        asked = (
            (
                seed,
                nets.case_of(
                    g,
                    seed,
                    ball=Ball(
                        norm, 0.5, None, None, torch.full(g.input_shape, 0.4, dtype=torch.float64)
                    ),
                ),
            )
            for seed, g in graphs
        )
        assert caught(monkeypatch, Region, "window_fall", unweighted, asked=asked), norm


def test_mutant_missing_constant_of_affine_operations_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_bias(self: Any, op: Any, a: Coefficients, inputs: tuple[int, ...]) -> None:
        shapes = [self.state.graph.shape(i) for i in inputs]
        constant = op.value(*(torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes))
        self.offset = self.offset + a.dot(torch.zeros_like(constant))
        for i, back in zip(inputs, a.back(op, shapes), strict=True):
            self._add(i, back)

    assert caught(monkeypatch, backward._BackwardPass, "_through_affine", without_bias)


def test_mutant_missing_bias_of_convolution_in_intervals_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = backward.propagate

    def without_bias(graph: Any, number: int, boxes: dict[int, Box], arithmetic: Arithmetic) -> Box:
        node = graph.nodes[number - 1]
        if not isinstance(node.op, Conv):
            return sound(graph, number, boxes, arithmetic)
        nodes = list(graph.nodes)
        nodes[number - 1] = replace(node, op=replace(node.op, bias=None))
        return sound(replace(graph, nodes=tuple(nodes)), number, boxes, arithmetic)

    assert caught(monkeypatch, backward, "propagate", without_bias)


def test_mutant_second_branch_overwrites_the_first_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overwrite(self: Any, number: int, a: Coefficients) -> None:
        self.pending[number] = a

    assert caught(monkeypatch, backward._BackwardPass, "_add", overwrite)


def test_mutant_patch_reaches_out_of_the_image_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # Coefficients of padding leak to real pixels: seen only where convolutions follow each other
    # and nothing between them clears the padding.
    for module in (coefficients, backward):
        monkeypatch.setattr(module, "WORTH_A_WINDOW", 1e9)
    everywhere = lambda self: torch.ones_like(self.a[:, 0])  # noqa: E731
    assert any(
        "CROWN" in text
        for text in caught(monkeypatch, Patch, "_inside", everywhere, asked=stacked_convolutions())
    )


def stacked_convolutions() -> Iterator[tuple[int, Case]]:
    """Yield cases of two padded convolutions with nothing between them."""
    for seed in range(40):
        recipe = nets.Recipe((1, 6, 6), seed)
        recipe.conv(3, same=True)
        recipe.conv(3, same=True)
        recipe.activation(RELU)
        recipe.flatten()
        recipe.linear(3)
        yield seed, nets.case_of(recipe.graph(), seed)


def test_mutant_max_pool_picks_the_smallest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def smallest(self: MaxPool, ends: Ends, alpha: Tensor | None = None) -> Planes:
        lower, upper = ends
        low, high = self._gather(lower), self._gather(upper)
        worst = low.masked_fill(low.isinf(), torch.inf).argmin(-1, keepdim=True)
        pick = (
            self.windows.expand(len(lower), -1, -1)
            .gather(-1, worst)[..., 0]
            .view(len(lower), *self.shape)
        )
        return Planes(pick, torch.ones_like(pick, dtype=torch.bool), high.amax(-1).view_as(pick))

    assert caught(monkeypatch, MaxPool, "relaxation", smallest, asked=max_pools())


def max_pools() -> Iterator[tuple[int, Case]]:
    """Yield cases of a convolution, max pooling and a dense layer: little else can make a bound
    loose.
    """
    for seed in range(60):
        recipe = nets.Recipe((1, 6, 6), seed)
        recipe.conv(2)
        recipe.max_pool()
        recipe.flatten()
        recipe.linear(3)
        yield seed, nets.case_of(recipe.graph(), seed)


def test_mutant_max_pool_without_its_ceiling_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = MaxPool.relaxation

    def exact_everywhere(self: MaxPool, ends: Ends, alpha: Tensor | None = None) -> Planes:
        planes = sound(self, ends)
        return planes._replace(exact=torch.ones_like(planes.exact))

    assert caught(monkeypatch, MaxPool, "relaxation", exact_everywhere, asked=max_pools())


@pytest.mark.parametrize("op", [Linear, Conv])
def test_mutant_interval_without_absolute_weights_is_caught(
    monkeypatch: pytest.MonkeyPatch, op: type
) -> None:
    def signed(self: Any, *inputs: Tensor) -> Tensor:
        return replace(self, bias=None).value(*inputs)

    assert any("intervals" in text for text in caught(monkeypatch, op, "absolute", signed))


def test_mutant_tangent_that_is_not_proved_at_the_ends_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def through_the_place(curve: Any, at: Tensor, slope: Tensor, reach: Tensor) -> Tensor:
        # The tangent at the middle of the interval, whether or not it clears the ends.
        return curve.value(at) - slope * at

    assert caught(
        monkeypatch,
        smooth_relaxation,
        "_intercept",
        through_the_place,
        asked=cases(0, 60, "aten.tanh.default"),
    )


def test_mutant_that_forgets_which_end_a_row_bounds_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unit_rows = backward.unit_rows

    def upward(
        flat: Tensor, points: Tensor, shape: tuple[int, ...], sign: Tensor, *, windowed: bool
    ) -> Coefficients:
        return unit_rows(flat, points, shape, sign.abs(), windowed=windowed)

    assert caught(monkeypatch, backward, "unit_rows", upward)


def test_mutant_boxes_of_a_smaller_radius_are_caught() -> None:
    smaller = (
        (seed, case, relaxed(case.at(case.ball.radii(len(case.x)) * 0.5)).boxes)
        for seed, case in cases(0, 40)
    )
    assert any(violations(case, attacked(case, seed), known=known) for seed, case, known in smaller)


def test_mutant_half_the_radius_is_caught() -> None:
    assert any(
        violations(case.at(case.ball.radii(len(case.x)) * 0.5), attacked(case, seed))
        for seed, case in cases(0, 40)
    )
