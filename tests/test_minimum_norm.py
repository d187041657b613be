"""Do the attacks that seek the nearest example reach exact distances where they are known, never
fall below, and depend on nothing but the point?
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import arsenal
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from calipers.attacks import fmn
from calipers.attacks.carlini_wagner import CarliniWagner
from calipers.attacks.ddn import DDN
from calipers.attacks.deepfool import DeepFool
from calipers.attacks.engine.queue import Queue
from calipers.attacks.fab import FAB
from calipers.attacks.fmn import FMN
from calipers.attacks.iterative_tightening import IterativeTightening
from calipers.attacks.pgd import PGD
from calipers.attacks.radius_bisection import RadiusBisection
from calipers.attacks.sigma_zero import SigmaZero
from calipers.data import build, images
from calipers.errors import BadInput
from calipers.models.classifier import Classifier
from calipers.problem.goals import Targeted, Untargeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt
from calipers.threats.ball import Ball
from calipers.threats.norms import norm_named

F64 = torch.float64
CONVEX = ["linf", "l2", "l1"]
ALL = [*CONVEX, "l0"]
PAIRS = [(norm, tool) for norm in CONVEX for tool in (FMN(targets=3), DeepFool(), FAB())] + [
    ("l2", DDN()),
    ("l2", CarliniWagner(steps=150, rounds=3, targets=3)),
]
COUNTS = [("l0", FMN(targets=3)), ("l0", DeepFool()), ("l0", SigmaZero(targets=3))]


class Fn(nn.Module):
    """A model made of a function; it keeps every batch that it is asked about."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.function, self.anchor = function, nn.Parameter(torch.ones((), dtype=dtype))
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.function(x)

    def __deepcopy__(self, memo: object) -> Fn:
        return self  # every copy writes to the same list


def drawn(*shape: int, seed: int = 0, normal: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, generator=g, dtype=F64)
        if normal
        else torch.rand(*shape, generator=g, dtype=F64)
    )


def run(attack: Attack, problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return candidates and distances, infinite where the candidate is not adversarial; each point
    once, in the box and under the mask, exactly.
    """
    attempts = list(attack(problem, seed=seed))
    index = torch.cat([a.index for a in attempts])
    assert sorted(index.tolist()) == list(range(len(problem)))
    candidate = torch.cat([a.candidate for a in attempts])[index.argsort()]
    assert candidate.dtype == problem.x.dtype and all(
        (a.forwards >= 1).all() and (a.backwards >= 0).all() for a in attempts
    )
    assert problem.at(1e30).region.contains(candidate).all()
    broken = is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits(candidate)))
    )
    return candidate, torch.where(broken, problem.region.distance(candidate), torch.inf)


def posed(model: nn.Module, x: Tensor, norm: str, **ball: Any) -> Problem:
    return Problem.pose(
        model,
        x,
        Classifier(model).check(x).argmax(1),
        Ball(norm, 0.1 if norm != "l0" else 1, **ball),
    )


def linear(d: int = 8, classes: int = 4, seed: int = 0) -> nn.Linear:
    """Return a linear model whose logits differ by tens, so that a smooth loss sees one other class
    at a time.
    """
    torch.manual_seed(seed)
    model = nn.Linear(d, classes, dtype=F64)
    model.load_state_dict({name: 30 * value for name, value in model.state_dict().items()})
    return model


def rowwise(d: int = 12, classes: int = 4) -> nn.Module:
    """Return a curved model whose arithmetic in one row is the same whatever the other rows are, so
    that results can be compared bit for bit.
    """
    w, v = drawn(classes, d, normal=True), drawn(classes, d, seed=1, normal=True)
    return Fn(
        lambda x: torch.stack(
            [
                (x.flatten(1) * a).sum(1) + 0.4 * (3 * x.flatten(1) * b).sin().sum(1)
                for a, b in zip(w, v, strict=True)
            ],
            1,
        )
    )


# ---- linear models
# --------------------------------------------------------------------------------------------------


def exact_linear(model: nn.Linear, problem: Problem, i: int) -> float:
    """Return the distance of point i to the nearest other class: linear programs (linf, l1),
    bisection of the support (l2), or the largest gains first (l0).
    """
    w, b, x, y = (
        model.weight.detach().numpy(),
        model.bias.detach().numpy(),
        problem.x[i].numpy(),
        int(problem.y[i]),
    )
    region = problem.take([i]).region
    low, high = region.low[0].numpy(), region.high[0].numpy()
    v = np.ones(len(x)) if region.weight is None else region.weight.numpy()
    best = np.inf
    for j in (j for j in range(len(b)) if j != y):
        g, gain = w[j] - w[y], (w[y] - w[j]) @ x + b[y] - b[j]
        d = len(x)
        if problem.threat.norm == "linf":  # minimise t over (delta, t)
            rows = np.vstack(
                [
                    np.append(-g, 0),
                    *[np.append(s * v[k] * np.eye(d)[k], -1) for k in range(d) for s in (1, -1)],
                ]
            )
            solved = linprog(
                np.append(np.zeros(d), 1),
                A_ub=rows,
                b_ub=np.append(-gain, np.zeros(2 * d)),
                bounds=[*zip(low, high, strict=True), (0, None)],
            )
            best = min(best, solved.fun if solved.success else np.inf)
        elif problem.threat.norm == "l1":  # delta = p - q
            bounds = [(0, h) for h in high] + [(0, -a) for a in low]
            solved = linprog(
                np.concatenate([v, v]), A_ub=[np.concatenate([-g, g])], b_ub=[-gain], bounds=bounds
            )
            best = min(best, solved.fun if solved.success else np.inf)
        elif problem.threat.norm == "l0":
            gains = np.sort(np.maximum(g * low, g * high))[::-1].cumsum()
            best = min(best, float((gains < gain).sum() + 1) if gains[-1] >= gain else np.inf)
        else:
            near, far = 0.0, 100.0
            for _ in range(80):
                middle = (near + far) / 2
                enough = (
                    float(
                        region.at(torch.tensor([middle], dtype=F64)).offset_support(
                            torch.tensor(g)[None]
                        )[0]
                    )
                    >= gain
                )
                near, far = (near, middle) if enough else (middle, far)
            best = min(best, far if far < 99 else np.inf)
    return best


def ratio_on_linear(norm: str, attack: Attack, seed: int = 0, **ball: Any) -> Tensor:
    """Return found over exact distance; points that no admissible perturbation breaks are left out,
    and must stay unbroken.
    """
    model = linear(seed=seed)
    problem = posed(model, drawn(12, 8, seed=seed + 1), norm, **ball)
    exact = torch.tensor([exact_linear(model, problem, i) for i in range(12)], dtype=F64)
    distance = run(attack, problem)[1]
    assert torch.equal(distance.isinf(), exact.isinf())
    return (distance / exact)[exact.isfinite()]


@pytest.mark.parametrize(("norm", "attack"), PAIRS, ids=repr)
def test_without_a_box_a_linear_model_is_at_margin_over_dual_norm(
    norm: str, attack: Attack
) -> None:
    model = linear()
    problem = posed(model, drawn(12, 8, seed=1), norm, box=None)
    margins, slopes = (
        problem.margins(problem.classifier.logits(problem.x)),
        model.weight[problem.y][:, None] - model.weight[problem.goal.margin_classes(problem.y, 4)],
    )
    exact = (margins / norm_named(norm).dual(slopes)).amin(1).detach()
    ratio = run(attack, problem)[1] / exact
    assert float(ratio.min()) >= 1 - 1e-7 and float(ratio.max()) <= 1.01


@pytest.mark.parametrize(("norm", "attack"), COUNTS, ids=repr)
def test_the_fewest_features_of_a_linear_model(norm: str, attack: Attack) -> None:
    ratio = torch.cat([ratio_on_linear(norm, attack, seed) for seed in (0, 5)])
    assert float(ratio.min()) >= 1 and float(ratio.mean()) <= 1.1


# ---- nothing but the point decides
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("norm", "attack"), PAIRS + COUNTS, ids=repr)
def test_order_shards_and_batch_size_do_not_matter_bit_for_bit(
    norm: str, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = dataclasses.replace(attack, steps=12)  # type: ignore[type-var]
    problem = posed(rowwise(), drawn(14, 3, 4, seed=9), norm)
    whole = run(attack, problem)[0]
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(attack, problem.take(order))[0], whole[order])
    assert torch.equal(
        torch.cat([run(attack, problem.take(part))[0] for part in (range(5), range(5, 14))]), whole
    )
    assert torch.equal(run(attack, problem.take([7]))[0][0], whole[7])
    monkeypatch.setattr("calipers.attacks.engine.queue.BATCH", 3)
    assert torch.equal(run(attack, problem)[0], whole)


@pytest.mark.parametrize(("norm", "attack"), PAIRS, ids=repr)
def test_the_data_units_do_not_matter(norm: str, attack: Attack) -> None:
    """The same network on grey levels finds the same examples, 255 times as far."""
    model, x = linear(seed=3), drawn(8, 8, seed=2)
    grey = posed(nn.Sequential(Fn(lambda z: z / 255), model), x * 255, norm, box=(0.0, 255.0))
    assert torch.allclose(
        run(attack, grey)[1], 255 * run(attack, posed(model, x, norm))[1], rtol=1e-2
    )


# ---- known bugs
# --------------------------------------------------------------------------------------------------


def noticed(check: Callable[[], None]) -> None:
    """Raise unless the check fails: the planted bug has to show."""
    with pytest.raises(AssertionError):
        check()


def test_the_projection_honours_the_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known bug projects onto norm / norm instead of radius / norm: the search then never comes
    near.
    """

    def check() -> None:
        assert (
            float(ratio_on_linear("linf", FMN()).max()) <= 1.01
            and float(ratio_on_linear("l2", FMN()).max()) <= 1.01
        )

    def check_path() -> None:
        model = rowwise()
        problem = posed(model, drawn(1, 12, seed=3), "linf")
        model.asked.clear()  # type: ignore[operator]
        distance = run(FMN(steps=60), problem)[1]
        last = problem.region.distance(torch.cat(model.asked[50:60]).reshape(-1, 12)[-5:])  # type: ignore[index]
        assert float(last.max()) <= 1.2 * float(distance)

    check()
    check_path()
    monkeypatch.setattr(
        "calipers.threats.ball.Region.project",
        lambda self, points: self.center + (points - self.center).clamp(-1, 1),
    )
    noticed(check_path)


def test_any_wrong_class_counts_not_only_the_one_aimed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 1 looks nearest but is never reached; class 2 wins on the way to it. A known bug counts
    the class aimed at only.
    """

    def function(x: Tensor) -> Tensor:
        return torch.stack(
            [torch.zeros_like(x[:, 0]), -0.02 - 0.1 * (-8 * x[:, 0]).exp(), x[:, 0] - 0.5], 1
        )

    problem = Problem.pose(Fn(function), torch.zeros(1, 2, dtype=F64), [0], Ball("linf", 0.1))

    def check() -> None:
        for attack in (
            DeepFool(targets=1, steps=60, overshoot=0.5),
            FAB(targets=2),
            DeepFool(targets=2),
        ):
            assert float(run(attack, problem)[1]) == pytest.approx(0.5, rel=1e-2)

    check()
    monkeypatch.setattr(Untargeted, "worst", lambda self, margins: margins[:, 0])
    noticed(check)


def test_a_neighbour_with_a_huge_gradient_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known bug takes the largest gradient of the whole batch: then only that point moves as it
    should.
    """
    scale = torch.tensor([1.0, 1e6], dtype=F64)
    model = Fn(
        lambda x: torch.stack(
            [
                torch.zeros(len(x), dtype=F64),
                ((x[:, 1:] * torch.arange(1.0, 4.0, dtype=F64)).sum(1) - 4) * scale[x[:, 0].long()],
            ],
            1,
        )
    )
    x = torch.cat([torch.tensor([[0.0], [1.0]], dtype=F64), 0.3 * drawn(2, 3)], 1)
    mask = torch.tensor([False, True, True, True])

    def check() -> None:
        for norm in ALL:
            problem = Problem.pose(
                model, x, [0, 0], Ball(norm, 0.2 if norm != "l0" else 1, mask=mask)
            )
            assert torch.equal(
                run(FMN(steps=30), problem)[0][:1], run(FMN(steps=30), problem.take([0]))[0]
            )

    check()
    true = fmn.slope
    monkeypatch.setattr(fmn, "slope", lambda region, g: true(region, g).amax().expand(len(g)))
    noticed(check)


def test_the_nearest_of_all_iterates_is_returned_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = rowwise()
    problem = posed(model, drawn(1, 12, seed=3), "l2", box=None)

    def check() -> None:
        for attack in (
            FMN(steps=17),
            DDN(steps=17),
            CarliniWagner(steps=60, rounds=2, step=0.1),
            FAB(steps=9),
            DeepFool(steps=7),
        ):
            model.asked.clear()  # type: ignore[operator]
            distance = run(attack, problem)[1]
            asked = torch.cat(model.asked)  # type: ignore[arg-type]
            worst = (lambda z: z.gather(1, problem.y.expand(len(z), 1)) - z)(model(asked))
            wrong = (worst.scatter(1, problem.y.expand(len(asked), 1), torch.inf) <= 0).any(1)
            assert (
                float(distance)
                <= float((asked - problem.x).flatten(1).square().sum(1).sqrt()[wrong].min()) + 1e-9
            )

    check()
    monkeypatch.setattr(Queue, "_keep", arsenal.keep_last)
    noticed(check)


# ---- unusual problems
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("norm", "attack"), PAIRS + COUNTS, ids=repr)
def test_unusual_problems(norm: str, attack: Attack) -> None:
    attack = dataclasses.replace(attack, steps=100 if isinstance(attack, CarliniWagner) else 40)  # type: ignore[type-var]
    radius = 1 if norm == "l0" else 0.1
    flat = Problem.pose(
        Fn(lambda x: torch.stack([x.sum(1) * 0 + 3, x.sum(1) * 0], 1)),
        drawn(3, 4),
        [0] * 3,
        Ball(norm, radius),
    )
    candidate, distance = run(attack, flat)  # no gradient: the points stay where they are, finite
    assert torch.equal(candidate, flat.x) and distance.isinf().all()
    cut = Problem.pose(
        Fn(lambda x: torch.stack([x.sum(1).detach() * 0 + 3, x.sum(1).detach() * 0], 1)),
        drawn(3, 4),
        [0] * 3,
        Ball(norm, radius),
    )
    assert run(attack, cut)[1].isinf().all()
    wrong = Problem.pose(
        linear(), drawn(6, 8), (linear()(drawn(6, 8)).argmax(1) + 1) % 4, Ball(norm, radius)
    )
    candidate, distance = run(attack, wrong)
    # wrong already: the point itself
    assert torch.equal(candidate, wrong.x) and (distance == 0).all()
    single = Fn(lambda x: x[:, 0] - 0.25)  # one logit, one feature: class 1 above 0.25
    candidate, distance = run(
        attack, Problem.pose(single, torch.tensor([[0.75]], dtype=F64), [1], Ball(norm, radius))
    )
    assert (
        float(distance) == pytest.approx(1 if norm == "l0" else 0.5, rel=0.01)
        and float(candidate) <= 0.25
    )
    goal = posed(linear(), drawn(5, 8), norm)
    aimed = Problem.pose(linear(), goal.x, goal.y, Ball(norm, radius), Targeted((goal.y + 1) % 4))
    near, far = run(attack, goal)[1], run(attack, aimed)[1]
    # one class is never nearer than any class, up to what the search misses
    assert (
        near.isfinite().any()
        and (far >= near * 0.95)[near.isfinite()].all()
        and far.isfinite().any()
    )


def test_frozen_points_stay() -> None:
    problem = posed(linear(), drawn(3, 8), "linf", mask=torch.zeros(8, dtype=torch.bool))
    for attack in (FMN(), DeepFool(), FAB()):
        assert torch.equal(run(attack, problem)[0], problem.x)


def test_the_problems_radius_plays_no_part() -> None:
    problem = posed(rowwise(), drawn(6, 12, seed=9), "l2")
    for attack in (FMN(steps=10), DDN(steps=10), DeepFool(), FAB(steps=5)):
        assert torch.equal(
            run(attack, problem.at(0.0))[0], run(attack, problem.at(torch.arange(6) * 0.3))[0]
        )


def test_a_net_in_float32_gives_candidates_that_stay_adversarial() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    problem = posed(model, drawn(20, 1, 3, 4, seed=9).float(), "l2")
    for attack in (FMN(), DDN(), DeepFool(), FAB()):
        assert run(attack, problem)[1].isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FMN(steps=0), "FMN takes steps from 1"),
        (lambda: FMN(gamma=1.0), "FMN takes gamma"),
        (lambda: FMN(step=0.1, last_step=0.2), "FMN takes last_step from 0 to 0.1"),
        (lambda: DDN(gamma=0.0), "DDN takes gamma"),
        (lambda: DeepFool(overshoot=-1), "DeepFool takes overshoot"),
        (lambda: FAB(beta=1.5), "FAB takes beta"),
        (lambda: CarliniWagner(rounds=0), "CarliniWagner takes rounds"),
        (lambda: SigmaZero(sigma=0), "SigmaZero takes sigma"),
        (
            lambda: run(DDN(), posed(linear(), drawn(2, 8), "linf")),
            "DDN is made for l2, but the threat is in linf",
        ),
        (
            lambda: run(CarliniWagner(), posed(linear(), drawn(2, 8), "l1")),
            "CarliniWagner is made for l2",
        ),
        (lambda: run(SigmaZero(), posed(linear(), drawn(2, 8), "l2")), "SigmaZero is made for l0"),
        (
            lambda: run(FAB(), posed(linear(), drawn(2, 8), "l0")),
            "FAB is made for linf, l2, l1, but",
        ),
        (lambda: Ball("l0", 3, box=None), "counts changed features .* give a box"),
        (lambda: Ball("l0", 3, box=(0, float("inf"))), "counts changed features"),
    ],
)
def test_settings_and_norms_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


def two_valleys() -> Problem:
    """Return a point whose gradient leads to a far boundary, 0.4 above, while a nearer one lies 0.1
    below, behind a hump.
    """
    knots = torch.tensor([0.0, 0.4, 0.44, 0.5, 0.9, 1.0], dtype=F64)
    heights = torch.tensor([-1.0, -0.1, 0.6, 0.4, 0.0, -0.1], dtype=F64)
    slopes = heights.diff() / knots.diff()

    def margin(x: Tensor) -> Tensor:
        unstable = torch.cat([slopes[:1], slopes.diff()])
        height = heights[0] + ((x[:, :1] - knots[:-1]).clamp_min(0) * unstable).sum(1)
        return torch.stack([height, torch.zeros_like(height)], 1)

    x = torch.full((1, 1), 0.5, dtype=F64)
    return Problem.pose(Fn(margin), x, torch.tensor([0]), Ball("linf", 0.3))


def test_asking_below_the_nearest_leaves_the_valley_of_the_descent() -> None:
    problem, first = two_valleys(), DeepFool(steps=10)
    assert float(run(first, problem)[1]) == pytest.approx(0.4, rel=0.01)
    assert float(
        run(IterativeTightening(first, PGD(steps=20, restarts=10)), problem)[1]
    ) == pytest.approx(0.0943, rel=0.01)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"fraction": 1.0}, {"fraction": 0.0}])
def test_closer_checks_its_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="IterativeTightening takes"):
        IterativeTightening(DeepFool(), PGD(), **settings)


# ---- geometry
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbounded", [False, True], ids=["box", "some sides open"])
@pytest.mark.parametrize("norm", ALL)
def test_the_shortest_way_to_a_plane_is_where_the_support_gets_there(
    norm: str, unbounded: bool
) -> None:
    g, low, high = drawn(60, 6, normal=True), -drawn(60, 6, seed=1), drawn(60, 6, seed=2)
    g[:9, 0] = 0.0
    if unbounded and norm != "l0":
        high[:, 2:], low[:, 4:] = torch.inf, -torch.inf
    corner = torch.where(g > 0, high, low).clamp(-5, 5)
    gain = (g * corner).sum(1) * drawn(60, seed=3)
    way, kind = norm_named(norm).reach(g, gain, low, high), norm_named(norm)
    assert torch.allclose((g * way).sum(1), gain) and ((way >= low) & (way <= high)).all()
    shorter = kind.of(way) * (1 - 1e-6) if norm != "l0" else kind.of(way) - 1
    assert (kind.support(g, shorter, low, high).value < gain).all()
    assert torch.equal(kind.reach(g, -gain, low, high), torch.zeros_like(g)) and torch.equal(
        kind.reach(0 * g, gain, low, high), 0 * g
    )
    assert torch.allclose(
        kind.reach(g, gain * 0 + 1e9, -corner.abs(), corner.abs()), corner.abs() * g.sign()
    )


@pytest.mark.parametrize("count", [0, 1, 2.7, 4, 9])
def test_l0_support_and_projection_by_enumeration(count: float) -> None:
    kind, g, low, high = (
        norm_named("l0"),
        drawn(20, 4, normal=True),
        -drawn(20, 4, seed=1),
        drawn(20, 4, seed=2),
    )
    radius = torch.full((20,), float(count), dtype=F64)
    subsets = [
        torch.tensor(s, dtype=F64) for s in itertools.product((0, 1), repeat=4) if sum(s) <= count
    ]
    best = torch.stack([(torch.where(g > 0, high, low) * g * s).sum(1) for s in subsets]).amax(0)
    value, delta = kind.support(g, radius, low, high)
    assert (
        torch.allclose(value, best)
        and torch.allclose((g * delta).sum(1), best)
        and (kind.of(delta) <= count).all()
    )
    moved = kind.project(g, radius, low, high, None)
    nearest = torch.stack([((g.clamp(low, high) * s - g) ** 2).sum(1) for s in subsets]).amin(0)
    assert (
        torch.allclose(((moved - g) ** 2).sum(1), nearest)
        and (kind.of(moved) <= count).all()
        and ((moved >= low) & (moved <= high)).all()
    )


# ---- a trained network
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("norm", "attack"), [("linf", FMN()), ("l2", FMN()), ("l2", DDN())], ids=repr
)
def test_on_a_trained_net_no_worse_than_bisected_pgd(norm: str, attack: Attack) -> None:
    x, y = images()
    problem = Problem.pose(
        build("mnist-plain"), x[:30], y[:30], Ball(norm, {"linf": 0.1, "l2": 1.0}[norm])
    )
    assert float(run(attack, problem)[1].median()) <= 1.02 * float(
        run(RadiusBisection(PGD(steps=20)), problem)[1].median()
    )


def test_bisection_hands_its_last_example_to_attacks_that_take_a_warm_start() -> None:
    """The next round begins where the last one ended: nearer examples for the same steps; a search
    that forgets them is the mutant.
    """
    x, y = (t[:60] for t in images())
    model = build("mnist-robust")
    kept = model(x).argmax(1) == y
    problem = Problem.pose(model, x[kept], y[kept], Ball("l2", 1.5))

    @dataclass(frozen=True)
    class Forgetful:
        def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
            return PGD(steps=20)(problem, seed=seed)

    warm, cold = (
        next(iter(RadiusBisection(attack, rounds=6)(problem)))
        for attack in (PGD(steps=20), Forgetful())
    )
    near, far = (problem.region.distance(attempt.candidate).mean() for attempt in (warm, cold))
    assert float(near) < 0.98 * float(far)
