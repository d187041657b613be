"""Are both ends of a distance read off the affine map where the network is one, in every norm, box,
mask, with weights, constraints and any goal?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from clocks import AMPLE
from scipy.optimize import linprog
from test_minimum_norm import drawn, exact_linear, linear
from torch import Tensor, nn

import calipers
from calipers import Ball
from calipers.certificates import linear_region, polyhedra
from calipers.certificates.crown import CROWN
from calipers.certificates.joint import Joint
from calipers.certificates.linear_region import LinearRegion
from calipers.certificates.milp import MILP
from calipers.certificates.polyhedra import Weighed
from calipers.measurement import run as run_module
from calipers.measurement.gaps import met
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import Referee
from calipers.problem.goals import Goal, Targeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.problem.specification import Specification
from calipers.threats.norms import norm_named
from calipers.threats.region import distance_to
from calipers.threats.threat import Threat

pytestmark = pytest.mark.one_in(1)

F64 = torch.float64
NORMS = ("linf", "l2", "l1")
CLOSED = 1e-5
STRAIGHT = [
    "aten.relu.default",
    "aten.leaky_relu.default",
    "aten.abs.default",
    "aten.hardtanh.default",
    "aten.relu6.default",
    "aten.clamp.default",
]
ALONE = Plan("linear regions", (Stage(LinearRegion(CROWN()), "certifier", "distance"),))
MASK, WEIGHTS = torch.arange(8) != 3, torch.linspace(0.5, 2.0, 8)
SETTINGS: dict[str, dict[str, Any]] = {
    "box": {},
    "no box": {"box": None},
    "mask": {"mask": MASK},
    "no box, mask": {"box": None, "mask": MASK},
    "weights": {"weights": WEIGHTS},
    "no box, mask, weights": {"box": None, "mask": MASK, "weights": WEIGHTS},
}


def bracket(
    model: nn.Module,
    x: Tensor,
    threat: Threat,
    goal: Goal | None = None,
    y: Tensor | None = None,
    plan: Plan = ALONE,
) -> calipers.Bracket:
    """Measure by linear regions alone; the labels are the model's own."""
    y = model(x).argmax(1) if y is None else y
    return calipers.measure(model, x, y, threat, goal=goal, plan=plan).bracket


def closed(found: calipers.Bracket, gap: float = CLOSED) -> np.ndarray[Any, Any]:
    """Assert that every bracket is closed, but where nothing can be broken in the whole box; return
    which are broken somewhere.
    """
    reached = np.isfinite(found.upper)
    assert (found.upper[reached] - found.lower[reached] <= gap * found.upper[reached]).all(), (
        found.lower,
        found.upper,
    )
    assert (found.lower[~reached] > 0).all()
    return reached


# ---- affine models: the textbook
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Linear, Tensor, Tensor]:
    """Multinomial logistic regression of 64 features and 10 classes, float64, and 100 images it was
    not fitted to.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    fitted = LogisticRegression(max_iter=2000, C=1.0).fit(images[100:], labels[100:])
    model = nn.Linear(64, 10, dtype=F64)
    model.load_state_dict(
        {"weight": torch.tensor(fitted.coef_), "bias": torch.tensor(fitted.intercept_)}
    )
    return (
        model.requires_grad_(False).eval(),
        torch.tensor(images[:100]),
        torch.tensor(labels[:100]),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", NORMS)
def test_logistic_regression_needs_no_search(
    digits: tuple[nn.Linear, Tensor, Tensor], norm: str, dtype: torch.dtype
) -> None:
    """The plan `distance` closes every bracket by linear regions alone: no attack and no other
    certifier is asked about any point.
    """
    model, x, y = digits
    model, x = nn.Sequential(model).to(dtype), x.to(dtype)
    for box in (None, (0.0, 1.0)):
        for mask in (None, torch.arange(64) % 3 != 0):
            ledger = calipers.Record(None)
            found = calipers.distance(model, x, y, Ball(norm, 0.1, box, mask), record=ledger)
            # In float32 a coordinate near 1 can only be moved by multiples of 6e-8.
            wrong, gap = (
                found.upper == 0,
                np.maximum(CLOSED, 0 if dtype == F64 else 1.2e-7 / found.upper.clip(1e-30)),
            )
            assert (
                wrong | (found.upper - found.lower <= gap * found.upper)
            ).all() and wrong.sum() < 20
            tools = {e.tool for q in ledger.questions() for e in ledger.evidence(q.fingerprint)}
            assert tools == {"clean prediction", "LinearRegion(certifier=CROWN())"}
            if box is None:
                _at_margin_over_dual_norm(model, x, y, norm, mask, found)
    model.to(F64)


def _at_margin_over_dual_norm(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, mask: Tensor | None, found: calipers.Bracket
) -> None:
    weight, z = next(model.parameters()).double(), model(x).double()
    rows = (weight[y][:, None] - weight) * (1.0 if mask is None else mask.double())
    gap = z.gather(1, y[:, None]) - z
    each = (gap / norm_named(norm).dual(rows)).masked_fill(
        torch.arange(10) == y[:, None], torch.inf
    )
    exact = each.amin(1).clamp_min(0).numpy()
    slack = 1e-12 if x.dtype == F64 else 1e-4  # float32 logits are rounded themselves
    assert (found.lower <= exact * (1 + slack)).all() and (found.upper >= exact * (1 - slack)).all()


def on_linear(norm: str, setting: dict[str, Any], seeds: tuple[int, ...] = (0, 1)) -> None:
    """Assert that brackets are closed around what linear programs, or for l2 a bisection, find."""
    for seed in seeds:
        model, x = linear(seed=seed), drawn(8, 8, seed=seed + 1)
        problem = Problem.pose(model, x, model(x).argmax(1), Ball(norm, 0.1, **setting))
        exact = np.array([exact_linear(model, problem, i) for i in range(8)])
        found = bracket(model, x, problem.threat)
        assert (closed(found) == np.isfinite(exact)).all()
        reached = np.isfinite(exact)
        assert (found.lower[reached] <= exact[reached] * (1 + 1e-7)).all(), (
            "a certificate above the program's optimum"
        )
        assert (found.upper[reached] >= exact[reached] * (1 - 1e-7)).all(), (
            "an example below the program's optimum"
        )


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_linear_models_stand_where_programs_say(norm: str, setting: dict[str, Any]) -> None:
    on_linear(norm, setting)


def test_the_fewest_features_and_pixels() -> None:
    for norm, shape in (("l0", (8,)), ("pixels", (2, 2, 2))):
        for mask in (None, MASK.view(shape)):
            model, x = nn.Sequential(nn.Flatten(), linear(seed=3)), drawn(12, *shape, seed=4)
            found = bracket(model, x, Ball(norm, 1, mask=mask))
            reached = np.isfinite(found.upper)
            assert reached.sum() > 5 and (found.lower[reached] == found.upper[reached] - 1).all()
            if norm == "l0":
                problem = Problem.pose(model, x, model(x).argmax(1), Ball(norm, 1, mask=mask))
                exact = [exact_linear(model[1], problem, i) for i in range(12)]
                assert found.upper.tolist() == exact


def affine_models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks that are one affine map in different ways, in evaluation mode, with the shape of a
    point.
    """
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm(torch.rand(64, 3, 4, 4))
    made = {
        "several layers": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)), (6,)),
        "convolutions and batch norm": (
            nn.Sequential(
                nn.Conv2d(1, 3, 3, padding=1),
                norm,
                nn.AvgPool2d(2),
                nn.Conv2d(3, 4, 2),
                nn.Flatten(),
            ),
            (1, 4, 4),
        ),
        "one logit": (nn.Sequential(nn.Linear(6, 1)), (6,)),
    }
    single = made["one logit"][0][0]
    single.bias.data.copy_(-single.weight.detach().sum() / 2)  # 0 in the middle of the box
    return {
        name: (model.requires_grad_(False).eval(), shape) for name, (model, shape) in made.items()
    }


@pytest.mark.parametrize("name", affine_models())
def test_networks_without_kinks_are_closed(name: str) -> None:
    model, shape = affine_models()[name]
    for dtype in (torch.float32, F64):
        model, x = model.to(dtype), drawn(10, *shape, seed=1).to(dtype)
        z = model(x)
        y = (z[:, 0] > 0).long() if z.shape[1] == 1 else z.argmax(1)
        radii = torch.linspace(0.01, 0.5, 10)
        for norm in NORMS:
            assert (
                closed(
                    bracket(model, x, Ball(norm, radii), y=y),
                    1e-4 if dtype == torch.float32 else CLOSED,
                ).sum()
                > 5
            )


@pytest.mark.parametrize("norm", NORMS)
def test_verdicts_on_affine_models_leave_nothing_unknown(
    digits: tuple[nn.Linear, Tensor, Tensor], norm: str
) -> None:
    """The plan `standard`, asked each point a little below and above its own distance: CROWN is
    exact there, and attacks reach what it does not prove.
    """
    model, x, y = (digits[0], digits[1][:20], digits[2][:20])
    exact = bracket(model, x, Ball(norm, 0.1), y=y).upper
    for share, verdict in ((1 - 1e-5, "robust"), (1 + 1e-4, "broken")):
        radii = np.where(exact > 0, exact, 0.1) * share
        found = calipers.measure(model, x, y, Ball(norm, torch.from_numpy(radii))).bracket.verdicts(
            radii
        )
        assert found == [verdict if distance > 0 else "broken" for distance in exact]


# ---- several margins at once, and constraints
# --------------------------------------------------------------------------------------------------


def program(rows: np.ndarray[Any, Any], ends: np.ndarray[Any, Any], x: Tensor, norm: str) -> float:
    """Return the distance of the nearest point of the box [0, 1] with rows @ delta <= ends, in linf
    or l1, by a linear program; infinite if there is none.
    """
    d, low, high = len(x), -x.numpy(), 1 - x.numpy()
    if norm == "linf":
        a = np.vstack(
            [
                np.c_[rows, np.zeros(len(rows))],
                np.c_[np.eye(d), -np.ones(d)],
                np.c_[-np.eye(d), -np.ones(d)],
            ]
        )
        solved = linprog(
            np.append(np.zeros(d), 1),
            a,
            np.append(ends, np.zeros(2 * d)),
            bounds=[*zip(low, high, strict=True), (0, None)],
        )
    else:
        solved = linprog(
            np.ones(2 * d),
            np.c_[rows, -rows],
            ends,
            bounds=[*((0, h) for h in high), *((0, -v) for v in low)],
        )
    return float(solved.fun) if solved.success else np.inf


def joint_questions(norm: str) -> dict[str, tuple[nn.Linear, Tensor, Ball, Goal | None]]:
    """Questions where several margins must fall at once, or constraints cut the ball."""
    model, x = linear(seed=5).requires_grad_(False), drawn(10, 8, seed=6)
    y = model(x).argmax(1)
    sums = torch.stack([torch.ones(8), -torch.eye(8)[0] - torch.eye(8)[1]]).double()
    limits = (sums, (x @ sums.T).amax(0) + 0.02)
    pairs = Specification(
        torch.eye(4)[[0, 1, 2, 3]] - torch.eye(4)[[1, 2, 3, 0]],
        torch.tensor([2.0, 1.5, 2.0, 1.8]),
        torch.tensor([0, 0, 1, 1]),
    )
    return {
        "one target": (model, x[y != 1], Ball(norm, 0.1), Targeted(1)),
        "a target each": (model, x, Ball(norm, 0.1), Targeted((y + 1) % 4)),
        "cases of two": (model, x, Ball(norm, 0.1), pairs),
        "constraints": (model, x, Ball(norm, 0.1, constraints=limits), None),
        "constraints, mask, weights": (
            model,
            x,
            Ball(norm, 0.1, None, MASK, WEIGHTS, limits),
            None,
        ),
        "a target under constraints": (
            model,
            x,
            Ball(norm, 0.1, constraints=limits),
            Targeted((y + 1) % 4),
        ),
    }


@pytest.mark.parametrize("name", joint_questions("linf"))
@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_several_half_spaces(norm: str, name: str) -> None:
    model, x, threat, goal = joint_questions(norm)[name]
    found = bracket(model, x, threat, goal)
    reached = np.isfinite(found.upper) & (found.upper > 0)
    assert reached.sum() >= 4 and (1 - found.lower[reached] / found.upper[reached] <= CLOSED).all()
    if norm == "l2" or threat.mask is not None:
        return
    problem = Problem.pose(model, x, model(x).argmax(1), threat, goal)
    rows, ends = (t.double() for t in (problem.goal.rows(problem.y, 4), problem.margins(model(x))))
    cases = problem.goal.cases(4)
    for i in np.flatnonzero(reached):
        a, b = (
            (np.zeros((0, 8)), np.zeros(0))
            if threat.constraints is None
            else (t.numpy() for t in threat.constraints)
        )
        each = []
        for case in range(int(cases.max()) + 1):
            mine = cases == case
            g = np.r_[(rows[i][mine] @ model.weight).numpy(), a]
            each.append(program(g, np.r_[-ends[i][mine].numpy(), b - a @ x[i].numpy()], x[i], norm))
        assert found.lower[i] <= min(each) * (1 + 1e-7) and found.upper[i] >= min(each) * (1 - 1e-7)


def test_what_no_point_of_the_box_reaches_is_proved_up_to_its_corners() -> None:
    model, x = linear(seed=5), drawn(6, 8, seed=6)
    never = Specification(torch.eye(4)[:2], torch.tensor([100.0, 100.0]), torch.tensor([0, 0]))
    for norm in NORMS:
        for goal in (never, Specification(never.matrix, never.offset, torch.tensor([0, 1]))):
            found = bracket(model, x, Ball(norm, 0.1), goal)
            widest = Ball(norm, 0.1).widest(x).numpy()
            assert (
                np.isinf(found.upper).all()
                and np.allclose(found.lower, widest, rtol=1e-8)
                and (found.lower <= widest).all()
            )
            assert met(found, Ball(norm, 0.1), widest).all()


# ---- kinks
# --------------------------------------------------------------------------------------------------


def small_net(seed: int, shift: float = 0.0) -> nn.Module:
    """A ReLU network of 6 inputs, 10 neurons and 3 classes, all of them `shift` away from their
    kinks.
    """
    torch.manual_seed(seed)
    net = (
        nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
        .double()
        .requires_grad_(False)
        .eval()
    )
    net[0].bias += shift * torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0)
    net[2].bias -= net(torch.full((1, 6), 0.5, dtype=F64))[0]  # the middle of the box is a tie
    return net


@pytest.mark.parametrize("norm", NORMS)
def test_a_net_whose_kinks_are_far_is_closed(norm: str) -> None:
    net, x = small_net(0, shift=5.0), drawn(10, 6, seed=1)
    assert closed(bracket(net, x, Ball(norm, 0.1))).all()


@pytest.mark.parametrize("norm", NORMS)
def test_beyond_kinks_nothing_wrong_is_claimed(norm: str) -> None:
    """Against the exact distances of mixed-integer programs; a share of the points is closed, of
    the others nothing is said or less.
    """
    shut = 0
    for seed in range(3):
        net, x = small_net(seed), drawn(12, 6, seed=seed + 10)
        found = bracket(net, x, Ball(norm, 0.1, None))
        problem = Problem.pose(net, x, net(x).argmax(1), Ball(norm, 20.0, None))
        exact = calipers.measure(
            net,
            x,
            problem.y,
            problem.threat,
            plan=Plan(
                "exact",
                (
                    Stage(LinearRegion(CROWN()), "certifier", "distance"),
                    Stage(MILP(seconds=AMPLE), "certifier"),
                ),
            ),
        ).bracket
        assert (found.lower <= exact.upper).all() and (found.upper >= exact.lower).all()
        shut += int(
            (found.upper - found.lower <= CLOSED * found.upper)[np.isfinite(found.upper)].sum()
        )
    assert 0 < shut < 36


def fuzzed(seeds: range) -> tuple[int, int]:
    """Assert of random networks, balls and goals that no attack breaks what is claimed and that the
    referee admits what is found; return how many points were proved, and how many closed.
    """
    proved = shut = 0
    for seed in seeds:
        # the radius plays no part
        case = nets.random_case(seed, STRAIGHT[seed % len(STRAIGHT)]).at(1e-3)
        problem = Problem.pose(nets.Carrier(case).eval(), case.x, case.y, case.ball, case.goal)
        found = dict.fromkeys(range(len(problem)), np.inf)
        radius = torch.zeros(len(problem), dtype=F64)
        for answer in LinearRegion(CROWN())(problem):
            if isinstance(answer, Claim):
                radius[answer.index] = answer.radius
                continue
            for fact in (
                Referee(problem).attempt(answer, torch.arange(len(problem)), "t", 0.0).evidence
            ):
                found[problem.names.index(fact.point)] = fact.radius
        claimed = case.at(torch.where(radius > 0, radius, 0.0))
        points = nets.attacked(claimed, seed, steps=4)
        broken = (
            case.worst(case.graph.values(points.flatten(0, 1))[-1], len(points)).view(
                len(points), -1
            )
            <= 0
        ).any(0)
        assert not bool((broken & (radius > 0)).any()), f"seed {seed}: a point is broken and proved"
        nearest = torch.tensor(list(found.values()), dtype=F64)
        assert bool((radius < nearest).all()), f"seed {seed}: a certificate above an example"
        proved, shut = (
            proved + int((radius > 0).sum()),
            shut + int((nearest - radius <= CLOSED * nearest)[nearest.isfinite()].sum()),
        )
    return proved, shut


def test_no_attack_breaks_what_is_claimed_of_random_networks() -> None:
    proved, shut = fuzzed(range(150))
    assert proved > 40 and shut > 25, (proved, shut)


@pytest.mark.slow
def test_no_attack_breaks_what_is_claimed_of_many_random_networks() -> None:
    proved, shut = fuzzed(range(150, 3000))
    assert proved > 900 and shut > 600, (proved, shut)


def test_a_bounder_that_believes_every_guess_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CROWN.bound

    def believing(self: CROWN, *asked: Any) -> Any:
        bound = real(self, *asked)
        return bound._replace(worst=bound.worst.abs() + 1)

    monkeypatch.setattr(CROWN, "bound", believing)
    monkeypatch.setattr(linear_region, "_BELOW", 1.05)
    with pytest.raises(AssertionError, match="seed"):
        fuzzed(range(30))


def test_smooth_networks_are_left_to_searches() -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval(),
        drawn(6, 6, seed=1).float(),
    )
    result = calipers.measure(net, x, net(x).argmax(1), Ball("linf", 0.1), plan="distance")
    assert not any(
        "LinearRegion" in tool for tool in (*result.bracket.lower_tool, *result.bracket.upper_tool)
    )
    assert (result.bracket.lower > 0).all() and np.isfinite(result.bracket.upper).any()


# ---- in a measurement
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [None, Targeted(1)], ids=["any class", "a target"])
def test_a_record_is_proved_again(tmp_path: Path, goal: Goal | None) -> None:
    model, x = linear(seed=5).eval(), drawn(8, 8, seed=6)
    y = model(x).argmax(1)
    x, y = x[y != 1], y[y != 1]
    calipers.measure(
        model,
        x,
        y,
        Ball("l2", 0.1),
        goal=goal,
        plan=dataclasses.replace(ALONE, proofs=True),
        record=tmp_path / "r.calipers",
    )
    (checked,) = calipers.check(tmp_path / "r.calipers", model, goal=goal)
    assert checked.sound and checked.certificates == len(x) and checked.witnesses >= len(x)
    assert len(checked.proofs) == len(x) if goal is None else len(checked.proofs) <= len(x)


def test_the_executed_network_is_certified_a_little_less_far() -> None:
    model, x = linear(seed=5).float().eval(), drawn(8, 8, seed=6).float()
    real = bracket(model, x, Ball("linf", 0.1))
    plan = dataclasses.replace(ALONE, guarantee="float32-executed")
    executed = bracket(model, x, Ball("linf", 0.1), plan=plan)
    assert (executed.lower < real.lower).all() and (executed.lower > real.lower * (1 - 1e-3)).all()


def test_points_whose_ends_have_met_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(seed=5), drawn(4, 8, seed=6)
    plan = Plan("then fail", (*ALONE.stages, Stage(Refusing(), "attack", "distance")))
    calipers.measure(model, x, model(x).argmax(1), Ball("linf", 0.1), plan=plan)
    monkeypatch.setattr(
        run_module, "met", lambda bracket, threat, widest: np.zeros(len(bracket.lower), dtype=bool)
    )
    with pytest.raises(AssertionError, match="asked about 4 points"):
        calipers.measure(model, x, model(x).argmax(1), Ball("linf", 0.1), plan=plan)


class Refusing:
    """An attack that nobody should ask."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Any:
        raise AssertionError(f"asked about {len(problem)} points")

    def __repr__(self) -> str:
        return "Refusing()"


# ---- mutants
# --------------------------------------------------------------------------------------------------


def wrong_norm(region: Any, g: Tensor, gap: Tensor) -> Any:
    other = norm_named({"linf": "l2", "l2": "l1", "l1": "linf"}[region.norm.name])
    return distance_to(
        calipers.threats.region.Region(
            region.ball,
            other,
            *(getattr(region, k) for k in ("center", "radius", "low", "high", "weight")),
        ),
        g,
        gap,
    )


def no_box(region: Any, g: Tensor, gap: Tensor) -> Any:
    still = (region.low == 0) & (region.high == 0)
    low, high = (
        torch.where(still, 0.0, torch.full_like(end, sign))
        for end, sign in ((region.low, -torch.inf), (region.high, torch.inf))
    )
    return distance_to(
        calipers.threats.region.Region(
            region.ball, region.norm, region.center, region.radius, low, high, region.weight
        ),
        g,
        gap,
    )


def no_mask(region: Any, g: Tensor, gap: Tensor) -> Any:
    free = Ball(region.ball.norm, 1.0, region.ball.box, None, region.ball.weights).region(
        region.center
    )
    return distance_to(free, g, gap)


@pytest.mark.parametrize(
    ("mutant", "norm", "setting"),
    [
        (wrong_norm, "linf", "box"),
        (wrong_norm, "l2", "box"),
        (wrong_norm, "l1", "box"),
        (no_box, "linf", "box"),
        (no_box, "l1", "box"),
        (no_mask, "l2", "mask"),
    ],
)
def test_a_wrong_root_is_caught(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., Any], norm: str, setting: str
) -> None:
    """Whatever the guess, nothing wrong is claimed: brackets stay open, or the guess is refused."""
    monkeypatch.setattr(linear_region, "distance_to", mutant)
    with pytest.raises(AssertionError) as caught:
        on_linear(norm, SETTINGS[setting])
    assert "optimum" not in str(caught.value)


def test_wrong_multipliers_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, threat, goal = joint_questions("l1")["constraints, mask, weights"]
    right = bracket(model, x, threat, goal)
    monkeypatch.setattr(
        Weighed,
        "_multipliers",
        lambda self, a, points: 0 * self.multipliers[points][:, None].expand(-1, a.shape[1], -1),
    )
    wrong = bracket(model, x, threat, goal)
    assert (wrong.lower <= right.upper).all() and (wrong.lower < right.lower * (1 - 1e-3)).any()


def test_a_bound_that_is_too_high_contradicts_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Joint.worst
    monkeypatch.setattr(
        Joint,
        "worst",
        lambda self, problem, places, arithmetic: real(self, problem, places, arithmetic) + 1.0,
    )
    monkeypatch.setattr(linear_region, "_BELOW", 1.01)
    with pytest.raises(calipers.Contradiction):
        bracket(*joint_questions("linf")["a target each"])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_multipliers_below_zero_count_for_nothing(
    monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """A solver's multiplier may be below 0 by its tolerance; times a row it would add an inequality
    that nobody stated.
    """
    region = Ball(norm, 1.0, None).region(torch.zeros(1, 2, dtype=F64))
    rows, ends = torch.eye(2, dtype=F64), torch.tensor([-0.2, -0.3], dtype=F64)
    for name in ("projected", "_programmed"):
        monkeypatch.setattr(
            polyhedra, name, lambda *_, **__: (np.array([-0.2, -0.3]), np.array([1.0, -1e-9]))
        )
    found = polyhedra.nearest(region, rows, ends)
    assert found is not None and found.multipliers.tolist() == [1.0, 0.0]
