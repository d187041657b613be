"""Are inequalities between features kept by both jaws? Bounds against linear programs, points
against exact arithmetic, and the record.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from test_substitutions import UNEVEN, words, written
from torch import Tensor, nn

import calipers
from calipers.attacks.apgd import APGD
from calipers.attacks.fmn import FMN
from calipers.attacks.pgd import PGD
from calipers.attacks.square import Square
from calipers.bounds.rounding import CHECKED
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.input_split import InputSplit
from calipers.certificates.radius import CertifiedRadius
from calipers.errors import BadInput
from calipers.measurement.referee import Referee
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.problem.recorded import recorded_threat
from calipers.random_streams import Streams
from calipers.record.record import Record
from calipers.report.render import page
from calipers.report.report import summaries
from calipers.threats import constraints
from calipers.threats.ball import Ball
from calipers.threats.constraints import ConstrainedRegion
from calipers.threats.substitutions import Substitutions

F64 = torch.float64
D = 5


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ordered(total: float = 2.5) -> tuple[Tensor, Tensor]:
    """Return x_1 <= x_2 <= ... <= x_D, and a sum of at most `total`."""
    a = torch.cat(
        [torch.eye(D, dtype=F64)[:-1] - torch.eye(D, dtype=F64)[1:], torch.ones(1, D, dtype=F64)]
    )
    return a, torch.cat([torch.zeros(D - 1, dtype=F64), torch.tensor([total], dtype=F64)])


def rows(n: int, seed: int = 0) -> Tensor:
    """Return points that satisfy the constraints, some of them with equality."""
    x = torch.rand(4 * n, D, generator=drawn(seed), dtype=F64).sort(1).values
    x[::3, 1] = x[::3, 0]
    return x[x.sum(1) <= 2.4][:n]


def linear(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(D, 2)).double().requires_grad_(False)
    model[0].weight.copy_(torch.randn(2, D, generator=drawn(seed), dtype=F64))
    model[0].bias.copy_(-(model[0].weight @ rows(50, seed).mean(0)))
    return model


def two_layers(seed: int, hidden: int = 4) -> nn.Sequential:
    model = (
        nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        .double()
        .requires_grad_(False)
    )
    for layer in (model[0], model[2]):
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=drawn(seed), dtype=F64))
        layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=drawn(seed + 1), dtype=F64))
    model[0].bias -= model[0].weight @ rows(50, seed).mean(0)
    model[2].bias -= model(rows(50, seed)).mean(0)
    return model


def program(
    slope: np.ndarray,
    x: np.ndarray,
    norm: str,
    radius: float,
    more: list[tuple[np.ndarray, float]] | None = None,
    *,
    cut: bool = True,
) -> float:
    """Return the exact minimum of <slope, x'> over the ball, the box [0, 1] and the constraints;
    infinite where nothing is left.
    """
    a, b = (t.numpy() for t in ordered())
    both = [(row, limit) for row, limit in zip(a, b, strict=True) if cut] + (more or [])
    if norm == "linf":
        bounds = [(max(0, v - radius), min(1, v + radius)) for v in x]
        solved = linprog(
            slope,
            A_ub=np.array([r for r, _ in both]) if both else None,
            b_ub=[t for _, t in both] or None,
            bounds=bounds,
        )
        return float(solved.fun) if solved.success else np.inf
    split = [np.concatenate([r, -r]) for r, _ in both] + [np.ones(2 * len(x))]  # l1: x' = x + p - q
    limits = [t - float(r @ x) for r, t in both] + [radius]
    solved = linprog(
        np.concatenate([slope, -slope]),
        A_ub=np.array(split),
        b_ub=limits,
        bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x],
    )
    return float(solved.fun + slope @ x) if solved.success else np.inf


def lowest(
    model: nn.Sequential, x: Tensor, y: Tensor, norm: str, radius: float, *, cut: bool = True
) -> Tensor:
    """Return the exact minima of the margin, (N,): a linear program for each pattern of the
    units.
    """
    found = []
    for point, label in zip(x.numpy(), y.tolist(), strict=True):
        if len(model) == 1:
            w, b = (t.numpy() for t in (model[0].weight, model[0].bias))
            found.append(
                program(w[label] - w[1 - label], point, norm, radius, cut=cut)
                + b[label]
                - b[1 - label]
            )
            continue
        w, b, v, c = (
            t.numpy() for t in (model[0].weight, model[0].bias, model[2].weight, model[2].bias)
        )
        out, least = v[label] - v[1 - label], np.inf
        for pattern in itertools.product((0.0, 1.0), repeat=len(b)):
            on = np.array(pattern)
            sides = [
                ((1 - 2 * s) * row, (2 * s - 1) * t) for s, row, t in zip(on, w, b, strict=True)
            ]
            least = min(
                least,
                program((out * on) @ w, point, norm, radius, sides, cut=cut)
                + float((out * on) @ b)
                + c[label]
                - c[1 - label],
            )
        found.append(least)
    return torch.tensor(found, dtype=F64)


def threat(norm: str, radius: float) -> Ball:
    return Ball(norm, radius, constraints=ordered())


def evened(model: nn.Sequential, x: Tensor, norm: str, radius: float) -> Tensor:
    """Shift the first logit so that class 0 wins for half of the points whatever the adversary
    does; return that class for each.
    """
    y = torch.zeros(len(x), dtype=torch.long)
    levels = lowest(model, x, y, norm, radius).round(decimals=6).unique()
    assert len(levels) > 1, "a network that says the same everywhere asks nothing"
    model[-1].bias[0] -= levels[
        len(levels) // 2 - 1 : len(levels) // 2 + 1
    ].mean()  # between two levels, so that nothing is a tie
    return y


# ---- bounds
# --------------------------------------------------------------------------------------------------


def shares(norm: str, radius: float) -> Tensor:
    """Return which share of what constraints can gain on linear models a bound does not gain;
    assert that none gains too much.
    """
    left = []
    for seed in range(4):
        model, x = linear(seed), rows(12, seed)
        y = model(x).argmax(1)
        # before any referee has looked
        bound = CROWN().bound(Problem.pose(model, x, y, threat(norm, radius)), CHECKED).worst
        truth, free = (lowest(model, x, y, norm, radius, cut=cut) for cut in (True, False))
        assert (bound <= truth + 1e-9).all(), "a bound crosses the linear program"
        left.append(((truth - bound) / (truth - free))[truth - free > 1e-3])
    return torch.cat(left)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.1), ("linf", 0.4), ("l1", 0.3)])
def test_on_linear_models_the_bound_comes_near_the_linear_program(norm: str, radius: float) -> None:
    left = shares(norm, radius)
    assert len(left) >= 12
    assert float((left <= 0.02).double().mean()) >= 0.75
    assert float(left.median()) <= 0.01


def test_the_euclidean_bound_is_near_the_convex_program() -> None:
    model, x = linear(0), rows(12)
    y = model(x).argmax(1)
    bound = calipers.certify(model, x, y, threat("l2", 0.3), CROWN()).margin
    a, b = (t.numpy() for t in ordered())
    for i in range(len(x)):
        w = (model[0].weight[y[i]] - model[0].weight[1 - y[i]]).numpy()
        shift, here = float(model[0].bias[y[i]] - model[0].bias[1 - y[i]]), x[i].numpy()
        limits = [
            {"type": "ineq", "fun": lambda z: b - a @ z, "jac": lambda z: -a},
            {
                "type": "ineq",
                "fun": lambda z, here=here: 0.09 - ((z - here) ** 2).sum(),
                "jac": lambda z, here=here: -2 * (z - here),
            },
        ]
        solved = minimize(
            lambda z, w=w: w @ z,
            here,
            jac=lambda z, w=w: w,
            bounds=[(0, 1)] * D,
            constraints=limits,
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        assert bound[i] <= solved.fun + shift + 1e-6
        assert (
            bound[i]
            >= solved.fun + shift - 0.03 * abs(solved.fun + shift - float(w @ here + shift)) - 1e-6
        )


TOOLS = [IBP(), CROWN(), AlphaCROWN(), BranchAndBound(seconds=2)]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: type(tool).__name__)
def test_no_certificate_crosses_the_exact_minimum(tool: Any, norm: str) -> None:
    """The margins, and what complete tools say; most questions that a box decides are decided."""
    radius = {"linf": 0.06, "l1": 0.15}[norm]
    certified = open_ = 0
    for seed in (0, 2, 3):
        model, x = two_layers(seed), rows(6, seed)
        problem = Problem.pose(model, x, evened(model, x, norm, radius), threat(norm, radius))
        truth = lowest(model, x, problem.y, norm, radius)
        shown = torch.zeros(len(x), dtype=torch.bool)
        for answer in tool(problem):
            if isinstance(answer, Attempt):
                assert problem.take(answer.index).region.contains(answer.candidate).all()
                shown[answer.index] = True
                continue
            proved = answer.margin > 0
            assert (truth[answer.index][proved] > 0).all()
            assert (answer.margin <= truth[answer.index] + 1e-9)[answer.margin > 1e-300].all()
            certified += int(proved.sum())
            open_ += int(
                (~proved & ~shown[answer.index] & (truth[answer.index].abs() > 0.02)).sum()
            )
        assert (truth[shown] <= 1e-9).all()
    assert certified or isinstance(tool, IBP)
    assert open_ <= 1 or not isinstance(tool, BranchAndBound)


@pytest.mark.slow
def test_constraints_make_more_points_certifiable() -> None:
    cut = free = 0
    for seed in (0, 2, 3, 4):
        model, x = two_layers(seed), rows(20, seed)
        y = evened(model, x, "linf", 0.12)
        tight, loose = (
            calipers.certify(model, x, y, t, CROWN())
            for t in (threat("linf", 0.12), Ball("linf", 0.12))
        )
        # tighter boxes may turn a slope, which now and then costs more than they gain
        assert float((tight.margin >= loose.margin - 1e-9).double().mean()) >= 0.85
        cut, free = cut + int(tight.certified.sum()), free + int(loose.certified.sum())
        radii = [
            calipers.certify(model, x, y, t, CertifiedRadius(CROWN())).radius.sum()
            for t in (threat("linf", 0.12), Ball("linf", 0.12))
        ]
        assert radii[0] > radii[1]
    assert cut > free


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_direction_falls_farther_than_without_constraints(norm: str) -> None:
    """Multipliers of 0 are among the choices."""
    a, points = torch.randn(20, 7, D, generator=drawn(5), dtype=F64), torch.arange(20)
    tight, loose = (
        t.region(rows(20)).fall(a, points).value for t in (threat(norm, 0.2), Ball(norm, 0.2))
    )
    assert (tight <= loose * (1 + 1e-12)).all()
    assert float((tight < 0.99 * loose).double().mean()) > 0.3


def test_the_sharper_bound_of_the_boxes_is_kept_in_single_precision_too() -> None:
    model, x = two_layers(1).float(), rows(20, 1).float().sort(1).values
    y = model(x).argmax(1)
    truth = lowest(two_layers(1), x.double(), y, "linf", 0.12)
    for tool in (CROWN(), AlphaCROWN(), CROWN(guarantee="float32-executed")):
        assert (
            calipers.certify(model, x, y, threat("linf", 0.12), tool).margin <= truth + 1e-5
        ).all()


def test_rounding_is_allowed_for() -> None:
    """Large terms that cancel: what is added up for a bound is counted, multipliers and limits
    included.
    """
    region = threat("linf", 0.2).region(rows(8))
    assert isinstance(region, ConstrainedRegion)
    a, points = torch.randn(8, 3, D, generator=drawn(2), dtype=F64), torch.arange(8)
    multipliers = region._multipliers(a, points)
    found = region.fall(a, points)
    matrix, limit = ordered()
    size = (multipliers * (limit.abs() + rows(8).abs() @ matrix.abs().T)[:, None]).sum(2)
    assert (found.terms >= size).all()
    large = Ball("linf", 0.2, box=None, constraints=(1e12 * matrix, 1e12 * limit)).region(rows(8))
    assert torch.allclose(
        large.fall(a, points).value,
        Ball("linf", 0.2, box=None, constraints=ordered()).region(rows(8)).fall(a, points).value,
        rtol=1e-6,
    )


def test_numbers_beside_symbols_may_be_constrained() -> None:
    limits = (torch.tensor([[1.0, 1.0]]), torch.tensor([1.0]))
    x = torch.cat(
        [written(words(6, UNEVEN), UNEVEN), 0.45 * torch.rand(6, 2, generator=drawn(1), dtype=F64)],
        1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(14, 2)).double().requires_grad_(False)
    model[0].weight[:, 12:] = torch.tensor([[-5.0, -4.0], [4.0, 5.0]], dtype=F64)
    y = torch.zeros(6, dtype=torch.long)
    tight, loose = (
        calipers.certify(
            model,
            x,
            y,
            Substitutions(UNEVEN, 1, continuous=Ball("linf", 0.5, constraints=c)),
            CROWN(),
        ).margin
        for c in (limits, None)
    )
    assert (tight >= loose - 1e-9).all()
    assert (tight > loose + 1e-3).any()
    problem = Problem.pose(
        model, x, y, Substitutions(UNEVEN, 1, continuous=Ball("linf", 0.5, constraints=limits))
    )
    for i in range(6):
        every = torch.cat(list(problem.region.neighbours(i)))  # type: ignore[attr-defined]
        steps = torch.linspace(-0.5, 0.5, 21, dtype=F64)
        moves = torch.cartesian_prod(steps, steps)
        moved = every.repeat_interleave(len(moves), 0)
        moved[:, 12:] = (moved[:, 12:] + moves.repeat(len(every), 1)).clamp(0, 1)
        moved = moved[moved[:, 12:].sum(1) <= 1]
        assert (
            tight[i]
            <= problem.goal.worst(problem.goal.margins(model(moved), y[i].expand(len(moved)))).min()
            + 1e-9
        )


# ---- points
# --------------------------------------------------------------------------------------------------


def test_membership_is_exact() -> None:
    """Where a rounded sum of products says 0, the numbers themselves decide."""
    ball = Ball("linf", 10.0, box=None, constraints=([[1.0, 1.0, -1.0]], [0.0]))
    region = ball.region(torch.tensor([[-1.0, 0.0, 0.0]], dtype=F64).expand(4, -1))
    points = torch.tensor(
        [[1.0, 1e-17, 1.0], [1.0, -1e-17, 1.0], [1.0, 0.0, 1.0], [0.1, 0.2, 0.1 + 0.2]], dtype=F64
    )
    # 0.1 + 0.2 in floats is more than the two floats' sum
    assert region.contains(points).tolist() == [False, True, True, True]
    assert not region.contains(torch.full((4, 3), torch.nan, dtype=F64)).any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("norm", "radius"), [("linf", 0.2), ("linf", 0.6), ("l2", 0.4), ("l1", 0.6)]
)
def test_projected_and_snapped_points_are_inside(
    norm: str, radius: float, dtype: torch.dtype
) -> None:
    x = rows(40).to(dtype)
    region = threat(norm, radius).region(x)
    wanted = x + torch.randn(x.shape, generator=drawn(3), dtype=F64).to(dtype)
    projected = region.project(wanted)
    snapped = region.snap(projected)
    assert region.contains(snapped).all()
    assert float((snapped - projected).abs().median()) < 1e-4
    assert float((snapped != x).any(1).double().mean()) > 0.95, (
        "hardly any point falls back on its center"
    )
    assert region.contains(region.snap(wanted)).all()
    drawn_ = region.snap(region.sample(Streams.of(0, [str(i) for i in range(40)], x.device)))
    assert region.contains(drawn_).all()
    assert torch.equal(region.snap(x), x)


def test_the_projection_is_the_nearest_point() -> None:
    x = rows(15)
    region = threat("linf", 0.4).region(x)
    wanted = x + 0.5 * torch.randn(x.shape, generator=drawn(4), dtype=F64)
    found = region.snap(region.project(wanted))
    a, b = (t.numpy() for t in ordered())
    for i in range(len(x)):
        bounds = [(max(0, v - 0.4), min(1, v + 0.4)) for v in x[i].tolist()]
        goal = wanted[i].numpy()
        limit = {"type": "ineq", "fun": lambda z: b - a @ z, "jac": lambda z: -a}
        best = minimize(
            lambda z, goal=goal: ((z - goal) ** 2).sum(),
            x[i].numpy(),
            bounds=bounds,
            constraints=[limit],
            options={"ftol": 1e-14},
        )
        assert float((found[i] - wanted[i]).square().sum()) <= best.fun + 1e-4


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "attack",
    [PGD(steps=40, restarts=2), APGD(steps=40), Square(queries=60), FMN(steps=40)],
    ids=lambda a: type(a).__name__,
)
def test_attacks_stay_inside_and_find_what_exists(attack: Any) -> None:
    breakable = found = 0
    for seed in range(4):
        model, x = linear(seed), rows(15, seed)
        y = evened(model, x, "linf", 0.15)
        truth = lowest(model, x, y, "linf", 0.15)
        result = calipers.attack(model, x, y, threat("linf", 0.15), attack)
        assert (truth[result.success] <= 1e-9).all()
        assert threat("linf", 0.15).region(x).contains(result.candidates)[result.success].all()
        breakable, found = (
            breakable + int((truth < -0.01).sum()),
            found + int((result.success & (truth < -0.01)).sum()),
        )
    assert breakable >= 8
    assert found >= {Square: 0.25}.get(type(attack), 0.9) * breakable, (found, breakable)


# ---- the question
# --------------------------------------------------------------------------------------------------


def test_constraints_are_part_of_the_question_and_of_its_record(tmp_path: Path) -> None:
    model, x = two_layers(0), rows(12)
    y = evened(model, x, "linf", 0.12)
    result = calipers.measure(
        model, x, y, threat("linf", 0.12), plan="quick", record=tmp_path / "run.calipers"
    )
    truth = lowest(model, x, y, "linf", 0.12)
    assert (
        result.robust_accuracy.certified.count
        <= int((truth > 0).sum())
        <= result.robust_accuracy.attacked.count
    )
    held = Record(tmp_path / "run.calipers", read_only=True)
    assert f"linf under {D} linear constraints" in page(summaries(held))
    data = held.questions()[0].data
    assert data is not None
    back = recorded_threat(data["threat"], torch.full((12,), 0.12, dtype=F64))
    assert back.identity() == threat("linf", 0.5).identity() != Ball("linf", 0.12).identity()
    (checked,) = calipers.check(tmp_path / "run.calipers", model)
    assert checked.sound


def test_pictures_are_drawn_in_a_box_that_is_given_by_feature(tmp_path: Path) -> None:
    model, low = two_layers(0), torch.linspace(-1, 0, D)
    ball = Ball("linf", 0.4, box=(low, torch.ones(D)))
    x = rows(12)
    y = model(x).argmax(1)
    calipers.measure(model, x, y, ball, plan="quick", record=tmp_path / "run.calipers")
    (summary,) = summaries(Record(tmp_path / "run.calipers", read_only=True))
    assert summary.gallery and {shown.span for shown in summary.gallery} == {(-1.0, 1.0)}


def test_a_box_that_is_cut_is_not_halved() -> None:
    """Plans go on to the next tool."""
    model, x = linear(0), rows(12)
    assert not calipers.certify(
        model, x, model(x).argmax(1), threat("linf", 0.001), InputSplit()
    ).certified.any()


@pytest.mark.slow
def test_distances_are_bracketed_inside_the_constraints() -> None:
    model, x = linear(2), rows(6, 2)
    y = evened(model, x, "linf", 0.15)
    y = torch.where(model(x).argmax(1) == y, y, 1 - y)
    bracket = calipers.distance(model, x, y, threat("linf", 0.15))
    for place, (a, b) in enumerate(zip(bracket.lower, bracket.upper, strict=True)):
        assert lowest(model, x[place : place + 1], y[place : place + 1], "linf", float(a)) > -1e-9
        assert (
            np.isinf(b)
            or lowest(model, x[place : place + 1], y[place : place + 1], "linf", float(b)) <= 1e-9
        )
    assert float(np.mean(bracket.upper < 1.1 * bracket.lower)) > 0.5, (bracket.lower, bracket.upper)


def test_constraints_that_make_no_sense_say_so() -> None:
    a, b = ordered()
    for given, words_ in (
        ((a, b[:2]), "got shapes"),
        ((a[0], b[0]), "got shapes"),
        ((a, b * torch.inf), "finite numbers"),
    ):
        with pytest.raises(BadInput, match=words_):
            Ball("linf", 0.1, constraints=given)
    with pytest.raises(BadInput, match="counts: take 'linf'"):
        Ball("l0", 1, constraints=(a, b))
    y = torch.zeros(12, dtype=torch.long)
    with pytest.raises(BadInput, match="about 3 features, but inputs"):
        Problem.pose(linear(0), rows(12), y, Ball("linf", 0.1, constraints=(a[:, :3], b)))
    wrong = rows(12)
    wrong[4] = wrong[4].flip(0)
    with pytest.raises(BadInput, match=r"1 of 12 points break the constraints .*point 4, row 0"):
        Problem.pose(linear(0), wrong, y, threat("linf", 0.1))
    with pytest.raises(BadInput, match="no constraints"):
        calipers.certify(linear(0), rows(12), y, threat("linf", 0.1), CROWN(proofs=True))


# ---- mutants
# --------------------------------------------------------------------------------------------------


def test_multipliers_of_the_wrong_sign_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as they get: chosen for the opposite inequalities, and turned round."""
    chosen, (a, b) = ConstrainedRegion._multipliers, ordered()
    opposite = Ball("linf", 0.4, constraints=(-a, -b))
    monkeypatch.setattr(
        ConstrainedRegion,
        "_multipliers",
        lambda self, spec, points: -chosen(dataclasses.replace(self, ball=opposite), spec, points),
    )
    with pytest.raises(AssertionError, match="crosses the linear program"):
        shares("linf", 0.4)


def test_forgotten_limits_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = ConstrainedRegion.cut.func
    monkeypatch.setattr(
        ConstrainedRegion,
        "cut",
        property(lambda self: (cut(self)[0], torch.zeros_like(cut(self)[1]))),
    )
    with pytest.raises(AssertionError, match="crosses the linear program"):
        shares("linf", 0.4)


def test_a_referee_that_overlooks_constraints_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point outside the half-spaces is no witness, however wrong the model is there."""
    model, x = linear(1), rows(20, 1)
    y = evened(model, x, "linf", 0.3)
    free, cut = lowest(model, x, y, "linf", 0.3, cut=False), lowest(model, x, y, "linf", 0.3)
    place = int(torch.nonzero((free < -0.05) & (cut > 0.01))[0])
    problem = Problem.pose(model, x, y, threat("linf", 0.3)).take([place])
    outside = calipers.attack(
        model, problem.x, problem.y, Ball("linf", 0.3), PGD(steps=40)
    ).candidates
    none = torch.zeros(1, dtype=torch.long)

    def admitted() -> int:
        return len(
            Referee(problem).attempt(Attempt(none, outside, none, none), none, "test", 0.0).evidence
        )

    assert admitted() == 0
    monkeypatch.setattr(
        constraints,
        "satisfied",
        lambda points, constraints: torch.ones(len(points), dtype=torch.bool),
    )
    assert admitted() == 1


def far(wide: float) -> calipers.threats.ball.Fall:
    """Return how far three functions fall where the first feature can move by `wide`."""
    ball = Ball("l1", 1.0, box=None, weights=torch.tensor([1 / wide, 1.0, 1.0], dtype=F64))
    a, b = torch.tensor([[0.0, 1.0, 1.0]], dtype=F64), torch.tensor([0.5], dtype=F64)
    region = dataclasses.replace(ball, constraints=(a, b)).region(torch.zeros(1, 3, dtype=F64))
    if wide == 2.0**1000:
        region.__dict__["_farthest"] = torch.tensor([[torch.inf, 1.0, 1.0]], dtype=F64)
    rows = torch.tensor([[[0.0, -1.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]], dtype=F64)
    return region.fall(rows, torch.tensor([0]))


def test_a_feature_without_bounds_moves_only_what_depends_on_it() -> None:
    near, endless = far(2.0), far(2.0**1000)
    assert torch.allclose(endless.value[0, :2], near.value[0, :2], atol=1e-9)
    assert torch.allclose(endless.terms[0, :2], near.terms[0, :2], atol=1e-9)
    assert endless.terms[0, 2] == torch.inf


def test_infinity_times_zero_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "_products", lambda a, b: (a @ b[:, :, None])[:, :, 0])
    with pytest.raises(AssertionError):
        test_a_feature_without_bounds_moves_only_what_depends_on_it()


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 1e-37, 1.0])])
def test_a_ball_beyond_all_numbers_is_refused(weights: Tensor | None) -> None:
    model, x = nn.Linear(3, 2).eval(), torch.zeros(1, 3)
    radius = 1e37 if weights is None else 1.0
    Problem.pose(model, x, torch.tensor([0]), Ball("l2", radius / 1e6, box=None, weights=weights))
    with pytest.raises(BadInput, match=r"beyond what numbers of torch.float32 can hold"):
        Problem.pose(model, x, torch.tensor([0]), Ball("l2", radius, box=None, weights=weights))
