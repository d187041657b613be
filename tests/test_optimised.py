"""Do bounds hold whatever slopes, multipliers, weights and cuts are chosen, and is the ascent's
gradient right? Random networks, attacks, and mutants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nets
import pytest
import torch
from nets import Case, attacked, random_case
from torch import Tensor

from calipers.bounds import float64_check, forward, intermediate
from calipers.bounds.backward import relax
from calipers.bounds.dual_bound import Dual, Free, Root
from calipers.bounds.float64_check import confirmed
from calipers.bounds.intermediate import sharpening
from calipers.bounds.interval import Box
from calipers.bounds.optimise import Ascent
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import CHECKED, SEARCH, plain_sums
from calipers.certificates.subproblems import Branches, candidates, uncut
from calipers.threats.ball import Ball

SAME = 1e-9
NETS = 12


def rooted(case: Case) -> Root:
    """Relax a case and hang branches on it."""
    with torch.no_grad(), plain_sums():
        state = relax(case.graph, case.ball.region(case.x, outward=True), CHECKED)
    return Root.of(state, SEARCH.dtype, case.ball.region(case.x.float()))


def cut_values(
    case: Case, root: Root, points: Tensor, generator: torch.Generator, share: float
) -> dict[int, Box]:
    """Return random cuts (N, U) of the root's columns, such that every point (R, N, *D) with index
    0 satisfies them: z at that point decides the side.
    """
    values = case.graph.values(points[0])
    cuts = uncut(root, torch.arange(len(case.x)))
    for k in cuts:
        z, columns = root.columns[k].get(values[k]).float(), root.columns[k]
        # so near that the multiplier counts
        at = columns.filled(z + torch.randn(z.shape, generator=generator) * z.abs().mean() * 0.1)
        cut = columns.filled((torch.rand(z.shape, generator=generator) < share).float()).bool()
        z64 = columns.get(values[k])
        above = z64 >= at.double()
        inf = torch.full_like(z, torch.inf)
        cuts[k] = Box(torch.where(cut & above, at, -inf), torch.where(cut & ~above, at, inf))
    return cuts


def chosen_freely(dual: Dual, generator: torch.Generator) -> Free:
    """Return random choices: alpha anywhere in [0, 1], multipliers of any sign (those without a
    constraint are to be ignored), any weights.
    """

    def change(kind: str, k: int, t: Tensor) -> Tensor:
        noise = torch.rand(t.shape, generator=generator)
        if kind == "alpha":
            i = dual.graph.nodes[k - 1].inputs[0]
            return dual.columns[i].filled(noise.round() if k % 2 else noise)
        return (noise - 0.5) * (4 if kind == "mix" else 0.3)

    return dual.guess().each(change)


def satisfies(case: Case, root: Root, cuts: dict[int, Box], points: Tensor) -> Tensor:
    """Does each point (R, N, *D) lie in the branch, (R, N) bool?"""
    fits = torch.ones(points.shape[:2], dtype=torch.bool)
    for r, one in enumerate(points):
        values = case.graph.values(one)
        for k, box in cuts.items():
            z = root.columns[k].get(values[k])
            fits[r] &= (
                (z >= box.lower.double()) & (z <= box.upper.double()) | ~root.columns[k].real
            ).all(1)
    return fits


def crossed(case: Case, seed: int) -> list[str]:
    """Choose at random or by ascent, confirm, and name what an attacked point inside the branch has
    crossed.
    """
    generator = torch.Generator().manual_seed(seed)
    points = attacked(case, seed)
    points = points[torch.randperm(len(points), generator=generator)]
    root, found = rooted(case), []
    numbers = [len(case.graph.nodes), *[k for k in case.graph.nonlinear if k > 1][-1:]]
    for number in numbers:
        shape = case.graph.shape(number)
        spec = torch.randn(len(case.x), 2, *shape, generator=generator, dtype=torch.float64)
        offsets = torch.randn(len(case.x), 2, generator=generator, dtype=torch.float64)
        for share in (0.0, 0.1, 0.3, 1.0):
            cuts = cut_values(case, root, points, generator, share)
            dual = Dual(
                root, torch.arange(len(case.x)), number, spec.float(), offsets.float(), cuts
            )
            with torch.no_grad(), plain_sums():
                free = (
                    Ascent(6, 0.25, 0.3)(dual, dual.guess())[1]
                    if share == 0.1
                    else chosen_freely(dual, generator)
                )
                bound = confirmed(dual, free, spec, offsets)
            inside = satisfies(case, root, cuts, points)
            assert bool(inside[0].all())
            for r, one in enumerate(points):
                value = case.graph.values(one)[number].flatten(1)
                best = ((spec.flatten(2) @ value[..., None])[..., 0] + offsets).amax(1)
                low = inside[r] & (bound > best + SAME * (1 + best.abs()))
                found += [
                    f"number {number}, cut {share}: {float(bound[i]):.6g} > {float(best[i]):.6g}"
                    for i in torch.nonzero(low).flatten()
                ]
    return found


def some(first: int, count: int, activation: str | None = None) -> Iterator[tuple[int, Case]]:
    """Yield random cases."""
    return ((seed, random_case(seed, activation)) for seed in range(first, first + count))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("block", range(6))
def test_bounds_hold_for_any_choice(block: int) -> None:
    for seed, case in some(block * NETS, NETS):
        assert not crossed(case, seed), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(nets.ZOO))
def test_bounds_hold_for_any_choice_on_captured_modules(name: str) -> None:
    graph = nets.captured(name)
    assert not crossed(nets.case_of(graph, 1), 1)


@pytest.mark.parametrize("activation", [None, "aten.relu.default", "aten.tanh.default"])
def test_the_search_sees_what_is_confirmed(activation: str | None) -> None:
    for seed, case in some(500, 12, activation):
        generator = torch.Generator().manual_seed(seed)
        root = rooted(case)
        cuts = cut_values(case, root, attacked(case, seed), generator, 0.3)
        rows = case.goal.rows(case.y, case.classes).double()
        dual = Dual(
            root, torch.arange(len(case.x)), len(case.graph.nodes), rows.float(), None, cuts
        )
        free = dual.clamped(chosen_freely(dual, generator))
        with torch.no_grad(), plain_sums():
            seen, proved = dual.see(free), confirmed(dual, free, rows)
        scale = 1 + max(float(v.abs().max()) for v in seen.values.values())
        assert torch.allclose(seen.bound.double(), proved, rtol=1e-3, atol=1e-4 * scale), (
            f"seed {seed}"
        )


@pytest.mark.parametrize("seed", range(700, 710))
def test_the_gradient_is_that_of_the_bound(seed: int) -> None:
    case = random_case(seed, "aten.relu.default")
    generator = torch.Generator().manual_seed(seed)
    state = rooted(case).state
    root = Root.of(state, torch.float64, case.ball.region(case.x))
    cuts = cut_values(case, root, attacked(case, seed), generator, 0.4)
    rows = case.goal.rows(case.y, case.classes).double()
    dual = Dual(
        root,
        torch.arange(len(case.x)),
        len(case.graph.nodes),
        rows,
        None,
        {k: Box(b.lower.double(), b.upper.double()) for k, b in cuts.items()},
    )
    free = dual.clamped(chosen_freely(dual, generator).each(lambda kind, k, t: t.double()))
    free = free.each(lambda kind, k, t: t * 0.9 + 0.05 if kind == "alpha" else t)
    with torch.no_grad():
        gradient, before = dual.gradient(free, dual.see(free)), dual.see(free).bound
        towards = free.each(
            lambda kind, k, t: torch.randn(t.shape, generator=generator, dtype=torch.float64)
        )
        towards = towards.each(
            lambda kind, k, t: torch.where(free.of(kind, k) == 0, 0.0, t) if kind == "beta" else t
        )
        # Filling moves with the element that it repeats.
        for k in free.alpha:
            towards.alpha[k] = dual.columns[case.graph.nodes[k - 1].inputs[0]].filled(
                towards.alpha[k]
            )
        step = 1e-7
        after = dual.see(free.each(lambda kind, k, t: t + step * towards.of(kind, k))).bound
        predicted = torch.zeros_like(before)
        for kind, held in (("alpha", free.alpha), ("beta", free.beta), ("mix", {0: free.mix})):
            for k in held:
                weigh = (
                    1.0
                    if kind == "mix"
                    else dual.weigh[case.graph.nodes[k - 1].inputs[0] if kind == "alpha" else k]
                )
                predicted += (gradient.of(kind, k) * towards.of(kind, k) * weigh).sum(1)
    assert torch.allclose(
        (after - before) / step,
        predicted,
        rtol=1e-3,
        atol=1e-3 * (1 + float(predicted.abs().max())),
    ), f"seed {seed}"


def test_the_ascent_never_ends_below_its_start_and_often_above() -> None:
    better = total = 0
    for _, case in some(900, 20, "aten.relu.default"):
        root = rooted(case)
        rows = case.goal.rows(case.y, case.classes)[:, :1].float()
        dual = Dual(root, torch.arange(len(case.x)), len(case.graph.nodes), rows)
        with torch.no_grad():
            start = dual.see(dual.guess()).bound
            best, free = Ascent(15, 0.25)(dual, dual.guess())
            again = dual.see(free).bound
        assert bool((best >= start).all()) and torch.allclose(best, again, rtol=1e-5, atol=1e-5)
        open_ = start <= 0
        better, total = better + int((best > start + 1e-4)[open_].sum()), total + int(open_.sum())
    assert better > 0.3 * total > 0


def boxes_crossed(case: Case, seed: int, boxes: dict[int, Box]) -> list[int]:
    """Name the numbers whose box an attacked point has left."""
    points = attacked(case, seed)
    values = case.graph.values(points.flatten(0, 1))
    found = []
    for k, box in boxes.items():
        v = values[k].view(len(points), len(case.x), *values[k].shape[1:])
        room = SAME * (1 + v.abs())
        if bool(((v < box.lower - room) | (v > box.upper + room)).any()):
            found.append(k)
    return found


def sharpened(case: Case) -> Relaxed:
    """Relax a case with boxes made sharp."""
    region = case.ball.region(case.x, outward=True)
    with torch.no_grad(), plain_sums():
        return relax(
            case.graph,
            region,
            CHECKED,
            tighten=sharpening(Ascent(6, 0.25), case.ball.region(case.x.float())),
        )


def test_sharpened_boxes_hold_and_are_narrower() -> None:
    narrower = total = 0
    for seed, case in some(1100, 12):
        sharp, plain = sharpened(case), rooted(case).state
        assert not boxes_crossed(case, seed, sharp.boxes), f"seed {seed}"
        for k in case.graph.nonlinear:
            wide = plain.boxes[k].upper - plain.boxes[k].lower
            narrower += int((sharp.boxes[k].upper - sharp.boxes[k].lower < wide - 1e-6).sum())
            total += wide.numel()
    assert narrower > 0.02 * total


@pytest.mark.parametrize("activation", ["aten.tanh.default", "aten.gelu.default"])
def test_ends_of_curves_are_ascended_to_the_last_step(activation: str) -> None:
    """A ReLU's input of known sign is settled, a curve's bends on: there the ascent must not stop
    at 0.
    """
    for _, case in some(1200, 4, activation):
        small = case.ball.region(case.x.float())
        with torch.no_grad(), plain_sums():
            for_ever = relax(
                case.graph,
                case.ball.region(case.x, outward=True),
                CHECKED,
                tighten=sharpening(Ascent(6, 0.25, enough=torch.inf), small),
            )
        usual = sharpened(case)
        for k in case.graph.nonlinear:
            torch.testing.assert_close(
                usual.boxes[k].lower, for_ever.boxes[k].lower, rtol=1e-6, atol=1e-9
            )
            torch.testing.assert_close(
                usual.boxes[k].upper, for_ever.boxes[k].upper, rtol=1e-6, atol=1e-9
            )


def box_cases(first: int, count: int) -> Iterator[tuple[int, Case]]:
    """Random networks over balls that are boxes, few features free."""
    for seed in range(first, first + count):
        case = random_case(seed)
        mask = torch.zeros(case.x[0].numel(), dtype=torch.bool)
        mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))[:4]] = True
        yield (
            seed,
            nets.case_of(
                case.graph, seed, ball=Ball("linf", 0.2, (0.0, 1.0), mask.view(case.x.shape[1:]))
            ),
        )


def forms_crossed(case: Case, seed: int) -> list[int]:
    """Push forms forward over the case's boxes, and name the numbers that an attacked point has
    left.
    """
    with torch.no_grad(), plain_sums():
        boxes, _ = forward.forward(
            case.graph, *case.ball.region(case.x, outward=True).outer_box(), CHECKED
        )
    return boxes_crossed(case, seed, boxes)


def test_forms_hold() -> None:
    for seed, case in box_cases(1300, 30):
        assert not forms_crossed(case, seed), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(nets.ZOO))
def test_forms_hold_on_captured_modules(name: str) -> None:
    mask = torch.zeros(nets.captured(name).input_shape).flatten()
    mask[:6] = 1
    case = nets.case_of(
        nets.captured(name),
        3,
        ball=Ball("linf", 0.05, None, mask.bool().view(nets.captured(name).input_shape)),
    )
    assert not forms_crossed(case, 3)


def test_children_cover_their_parent() -> None:
    for seed, case in some(1500, 15, "aten.relu.default"):
        root = rooted(case)
        rows = torch.arange(len(case.x))
        cuts = uncut(root, rows)
        spec = case.goal.rows(case.y, case.classes)[:, :1].float()
        dual = Dual(root, rows, len(case.graph.nodes), spec, None, cuts)
        free = dual.guess()
        with torch.no_grad():
            splits = candidates(dual, dual.see(free), 2)
        points = attacked(case, seed)
        for split in splits:
            children = split.children(
                Branches(torch.zeros(len(rows)), rows, torch.zeros_like(rows), cuts, free)
            )
            halves = [
                satisfies(
                    case, root, {k: box.take(part) for k, box in children.cuts.items()}, points
                )
                for part in torch.arange(2 * len(rows)).chunk(2)
            ]
            assert bool((halves[0] | halves[1]).all())
            both = (halves[0] & halves[1])[:, split.can]
            assert not bool(both.any()) or bool((halves[0] | ~halves[0])[:, split.can].all())


# ---- mutants
# --------------------------------------------------------------------------------------------------


def is_caught(
    monkeypatch: pytest.MonkeyPatch, judge: Any, cases: Iterator[tuple[int, Case]], *mutation: Any
) -> bool:
    """Does the judge object to one of the cases with the mutation, and not without?"""
    for seed, case in cases:
        with monkeypatch.context() as mutated:
            mutated.setattr(*mutation)
            found = judge(case, seed)
        if found:
            assert not judge(case, seed)
            return True
    return False


@pytest.mark.slow
def test_mutant_multipliers_of_the_wrong_sign_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = float64_check._multiplier

    def wrong(dual: Dual, number: int, beta: Tensor) -> tuple[Tensor, Tensor]:
        taken, gain = sound(dual, number, beta)
        return -taken, -gain

    assert is_caught(monkeypatch, crossed, some(0, 60), float64_check, "_multiplier", wrong)


def test_mutant_multipliers_without_their_ends_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = float64_check._multiplier

    def wrong(dual: Dual, number: int, beta: Tensor) -> tuple[Tensor, Tensor]:
        taken, gain = sound(dual, number, beta)
        return taken, gain.abs()

    assert is_caught(monkeypatch, crossed, some(0, 60), float64_check, "_multiplier", wrong)


def test_mutant_cuts_on_the_wrong_side_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Dual.cut

    def wrong(self: Dual, number: int, box: Box) -> Box:
        cut = self.cuts.get(number)
        if cut is None:
            return box
        middle = (box.lower + box.upper) / 2
        return Box(
            torch.where(cut.lower.isfinite(), box.lower, middle), sound(self, number, box).upper
        )

    assert is_caught(monkeypatch, crossed, some(0, 60), Dual, "cut", wrong)


def test_mutant_slopes_beyond_one_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = float64_check._lines

    def wrong(dual: Dual, free: Free, k: int, number: int) -> Any:
        lines = sound(dual, free, k, number)
        nonlinear = lines.lower_slope != lines.upper_slope
        return lines._replace(lower_slope=lines.lower_slope + 2.0 * nonlinear)

    assert is_caught(
        monkeypatch, crossed, some(0, 60, "aten.relu.default"), float64_check, "_lines", wrong
    )


def test_mutant_weights_that_are_negative_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = property(
        lambda self: torch.stack([2 * torch.ones(len(self.mix)), -torch.ones(len(self.mix))], 1)
    )
    assert is_caught(monkeypatch, crossed, some(0, 60), Free, "weights", wrong)


def test_mutant_sharpening_that_swaps_the_ends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = intermediate._whole

    def wrong(
        root: Root, number: int, rows: Tensor, places: Tensor, sign: Tensor, shape: Any
    ) -> tuple[Dual, Tensor]:
        return sound(root, number, rows, places, -sign, shape)

    def judge(case: Case, seed: int) -> list[int]:
        return boxes_crossed(case, seed, sharpened(case).boxes)

    assert is_caught(
        monkeypatch, judge, some(0, 40, "aten.relu.default"), intermediate, "_whole", wrong
    )


def test_mutant_forms_that_forget_what_relaxation_loses_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = forward._nonlinear

    def wrong(op: Any, x: forward.Form, box: Box, arithmetic: Any) -> forward.Form:
        return sound(op, x, box, arithmetic)._replace(r=torch.zeros_like(x.r))

    assert is_caught(monkeypatch, forms_crossed, box_cases(0, 60), forward, "_nonlinear", wrong)


def test_mutant_forms_with_signed_remainders_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = forward._affine

    def wrong(op: Any, inputs: list[forward.Form], arithmetic: Any) -> forward.Form:
        form, zero = (
            sound(op, inputs, arithmetic),
            op.value(*(torch.zeros_like(f.c) for f in inputs)),
        )
        return form._replace(r=(op.value(*(f.r for f in inputs)) - zero).abs())

    assert is_caught(monkeypatch, forms_crossed, box_cases(0, 60), forward, "_affine", wrong)
