"""Do one step and many steps do what they promise? Closed forms, the best iterate, and results that
depend on nothing but the point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from calipers.attacks.engine.queue import Queue, SearchOptions
from calipers.attacks.engine.targets import rank_targets
from calipers.attacks.fgsm import FGSM
from calipers.attacks.pgd import PGD, _Ascent
from calipers.errors import BadInput
from calipers.models.classifier import Classifier
from calipers.problem.goals import Targeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.threats.ball import Ball

P = ["linf", "l2", "l1"]
RADIUS = {"linf": 0.1, "l2": 0.4, "l1": 0.8}
F64 = torch.float64


class Fn(nn.Module):
    """A model made of a function; it keeps every batch that it is asked about."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.function = function
        self.anchor = nn.Parameter(torch.ones((), dtype=dtype))
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.function(x)


@dataclass
class Found:
    """What an attack proposed, in the problem's order."""

    candidate: Tensor
    forwards: list[int]
    backwards: list[int]
    margin: Tensor

    @property
    def broken(self) -> list[bool]:
        return is_adversarial(self.margin).tolist()


def run(attack: Attack, problem: Problem, **settings: Any) -> Found:
    """Run an attack to its end; every point is mentioned exactly once, and every candidate is
    admissible, exactly.
    """
    attempts = list(attack(problem, **settings))
    index = torch.cat([a.index for a in attempts])
    assert sorted(index.tolist()) == list(range(len(problem)))
    order = index.argsort()
    candidate, forwards, backwards = (
        torch.cat([getattr(a, name) for a in attempts])[order]
        for name in ("candidate", "forwards", "backwards")
    )
    assert candidate.shape == problem.x.shape and problem.region.contains(candidate).all()
    margin = problem.goal.worst(problem.margins(problem.classifier.logits(candidate)))
    return Found(candidate, forwards.tolist(), backwards.tolist(), margin)


def random(*shape: int, seed: int = 0, normal: bool = False, dtype: torch.dtype = F64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, generator=g, dtype=F64)
        if normal
        else torch.rand(*shape, generator=g, dtype=F64)
    ).to(dtype)


def mlp(inputs: int = 12, classes: int = 4, seed: int = 0, dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(seed)
    return (
        nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, classes))
        .to(dtype)
        .eval()
    )


def rowwise(inputs: int = 12, classes: int = 4, seed: int = 0) -> nn.Module:
    """Return a curved model whose arithmetic in one row is the same whatever the other rows are, so
    that results can be compared bit for bit.
    """
    w = random(classes, inputs, seed=seed, normal=True)
    v = random(classes, inputs, seed=seed + 1, normal=True)
    return Fn(
        lambda x: torch.stack(
            [
                (x.flatten(1) * a).sum(1) + 0.4 * (3 * x.flatten(1) * b).sin().sum(1)
                for a, b in zip(w, v, strict=True)
            ],
            1,
        )
    )


def asking(
    model: nn.Module,
    norm: str,
    n: int = 30,
    radius: float | Tensor | None = None,
    shape: tuple[int, ...] = (1, 3, 4),
    **parts: Any,
) -> Problem:
    """Return a problem whose labels are the model's own answers."""
    x = random(n, *shape, seed=9, dtype=next(model.parameters()).dtype)
    y = Classifier(model).check(x).argmax(1)
    return Problem.pose(
        model,
        x,
        parts.pop("y", y),
        Ball(norm, RADIUS[norm] if radius is None else radius, **parts.pop("ball", {})),
        **parts,
    )


# ---- one step on a linear model
# --------------------------------------------------------------------------------------------------


def linear(d: int, seed: int = 0, offset: float = 1e3) -> tuple[nn.Module, Tensor]:
    """Return a linear model of two classes and its slope; the offset keeps every point unbroken, so
    that no attack stops early.
    """
    w = random(d, seed=seed, normal=True)
    return Fn(
        lambda x: torch.stack(
            [(x.flatten(1) * w).sum(1) + offset, torch.zeros(len(x), dtype=x.dtype)], 1
        )
    ), w


@pytest.mark.parametrize("d", [1, 7, 300])
@pytest.mark.parametrize("norm", P)
def test_one_step_on_a_linear_model_gains_the_dual_norm(norm: str, d: int) -> None:
    model, w = linear(d)
    dual = {"linf": w.abs().sum(), "l2": w.square().sum().sqrt(), "l1": w.abs().max()}[norm]
    problem = asking(model, norm, radius=0.25, shape=(d,), ball={"box": None})
    found = run(FGSM(), problem)
    drop = problem.margins(problem.classifier.logits(problem.x))[:, 0] - found.margin
    assert torch.allclose(drop, 0.25 * dual.expand(30), rtol=1e-6)


@pytest.mark.parametrize("norm", P)
def test_a_box_only_lowers_the_gain(norm: str) -> None:
    model, w = linear(7)
    drops = []
    for box in (None, (0.0, 1.0)):
        problem = asking(model, norm, radius=0.5, shape=(7,), ball={"box": box})
        found = run(FGSM(), problem)
        drops.append(problem.margins(problem.classifier.logits(problem.x))[:, 0] - found.margin)
        best = problem.region.support(-w.expand(30, 7)).value + (w * problem.x).sum(1)
        assert torch.allclose(drops[-1], best, atol=1e-6)
    assert (drops[1] <= drops[0] + 1e-9).all() and (drops[1] < drops[0] - 1e-3).any()


@pytest.mark.parametrize("box", [None, (0.0, 1.0)], ids=["ball", "ball and box"])
@pytest.mark.parametrize("norm", P)
def test_many_steps_on_a_linear_model_reach_what_one_step_reaches(
    norm: str, box: tuple[float, float] | None
) -> None:
    """An l1 attack with a radial projection, or with a step along one feature alone, stays far from
    it.
    """
    problem = asking(linear(7)[0], norm, shape=(7,), ball={"box": box})
    one, many = run(FGSM(), problem), run(PGD(steps=60), problem)
    start = problem.margins(problem.classifier.logits(problem.x))[:, 0]
    share = (start - many.margin) / (start - one.margin)
    assert float(share.max()) <= 1 + 1e-6 and float(share.min()) > 0.999


# ---- two ReLUs by enumeration
# --------------------------------------------------------------------------------------------------


def smallest_margin(
    w: np.ndarray, b: np.ndarray, v: np.ndarray, x: np.ndarray, radius: float
) -> float:
    """Return the smallest v . relu(w x + b) in an linf ball: a linear program for each of the four
    patterns of two ReLUs.
    """
    best = np.inf
    for pattern in itertools.product((0.0, 1.0), repeat=2):
        s = np.array(pattern)
        sign = 1 - 2 * s  # on: w x + b >= 0, off: <= 0
        solved = linprog(
            (v * s) @ w,
            A_ub=sign[:, None] * w,
            b_ub=-sign * b,
            bounds=[(c - radius, c + radius) for c in x],
        )
        if solved.success:
            best = min(best, solved.fun + float((v * s) @ b))
    return best


def test_many_steps_find_the_smallest_margin_of_two_relus() -> None:
    gaps = []
    for seed in range(12):
        w, b, v = (
            random(2, 2, seed=seed, normal=True),
            0.3 * random(2, seed=seed + 50, normal=True),
            random(2, seed=seed + 90, normal=True),
        )
        model = Fn(
            lambda x, w=w, b=b, v=v: torch.stack(
                [(x @ w.T + b).relu() @ v + 100, torch.zeros(len(x), dtype=F64)], 1
            )
        )
        problem = asking(model, "linf", n=4, radius=0.3, shape=(2,))
        problem = Problem.pose(model, problem.x, problem.y, Ball("linf", 0.3, box=None))
        found = run(PGD(steps=40, restarts=150), problem)
        exact = torch.tensor(
            [
                smallest_margin(w.numpy(), b.numpy(), v.numpy(), x, 0.3) + 100
                for x in problem.x.numpy()
            ],
            dtype=F64,
        )
        gaps.append(found.margin - exact)
    gap = torch.cat(gaps)
    assert float(gap.min()) > -1e-9  # below the exact minimum it would have left the ball
    assert float(gap.max()) < 0.005


# ---- where candidates lie
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("norm", P)
def test_no_iterate_and_no_candidate_leaves_ball_box_and_mask(
    norm: str, dtype: torch.dtype
) -> None:
    mask, weights = random(1, 3, 4, seed=4) < 0.8, random(1, 3, 4, seed=5) + 0.5
    inner = mlp(dtype=dtype)
    model = Fn(inner, dtype)
    problem = asking(model, norm, ball={"mask": mask, "weights": weights})
    for attack in (
        FGSM(targets=2),
        PGD(steps=8, restarts=3),
        PGD(steps=3, step=2.0, restarts=2, loss="cross_entropy", targets=2),
    ):
        model.asked.clear()
        run(attack, problem)  # candidates are checked there
        for x in torch.cat(model.asked).split(1):
            near = (
                (x - problem.x).abs().flatten(1)[:, ~mask.flatten()].amax(1) == 0
                if (~mask).any()
                else torch.ones(30, dtype=torch.bool)
            )
            inside = (
                problem.region.distance(x.expand_as(problem.x)) <= RADIUS[norm] * (1 + 1e-5)
            ) & near
            assert inside.any() and float(x.min()) >= -1e-7 and float(x.max()) <= 1 + 1e-7


def test_candidates_are_in_the_models_own_dtype_and_native_units() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    x = random(5, 1, 3, 4, dtype=torch.float32) * 255
    classifier = Classifier(model, mean=127.5, std=60.0)
    problem = Problem.pose(
        classifier, x, classifier.check(x).argmax(1), Ball("linf", 6.0, box=(0, 255))
    )
    found = run(PGD(steps=5), problem)
    assert (
        found.candidate.dtype == torch.float32
        and 1.0 < float((found.candidate - x).abs().max()) <= 6.0
    )


# ---- the best iterate
# --------------------------------------------------------------------------------------------------


def test_the_best_iterate_is_returned_where_the_last_is_worse() -> None:
    """Steps of 0.25 from 0 towards a valley at 0.3 end in 0.25, 0.5, 0.25, 0.5 ...; the fourth and
    last stands at 0.5.
    """
    model = Fn(
        lambda x: torch.stack([(x - 0.3).abs().sum(1) + 1, torch.zeros(len(x), dtype=F64)], 1)
    )
    problem = Problem.pose(model, torch.zeros(1, 1, dtype=F64), [0], Ball("linf", 0.5, box=None))
    model.asked.clear()
    found = run(PGD(steps=4, step=0.5), problem)
    path = [float(x) for x in model.asked[:5]]
    assert path == [0.0, 0.25, 0.5, 0.25, 0.5] and found.candidate.tolist() == [[0.25]]


@pytest.mark.parametrize("batch", [1, 2, 5, 128])
@pytest.mark.parametrize("norm", P)
def test_the_best_of_all_restarts_and_targets_is_returned(norm: str, batch: int) -> None:
    """Restarts that end in the same round must not overwrite each other."""
    inner = mlp()
    # class 0 always wins
    model = Fn(
        lambda x: inner(x) + 50 * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 4)
    )
    for k, attack in enumerate(
        [
            PGD(steps=5, restarts=6),
            PGD(steps=4, restarts=2, targets=3),
            PGD(steps=6, step=1.5, loss="cross_entropy", restarts=3),
        ]
    ):
        problem = asking(model, norm, n=1).take([0])
        model.asked.clear()
        found = run(attack, problem, batch=batch)
        # the last one is our own question about the candidate
        queries = torch.cat(model.asked[:-1])
        logits = inner(queries).detach()
        margins = logits[:, :1] + 50 - logits[:, 1:]
        assert float(found.margin) == pytest.approx(float(margins.min()), abs=1e-7), f"attack {k}"


# ---- nothing but the point decides
# --------------------------------------------------------------------------------------------------

ATTACKS = [
    FGSM(),
    FGSM(targets=2),
    PGD(steps=6),
    PGD(steps=5, restarts=5),
    PGD(steps=5, restarts=3, targets=3, loss="cross_entropy"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize("norm", P)
def test_order_and_shards_do_not_matter_bit_for_bit(norm: str, attack: Attack) -> None:
    problem = asking(rowwise(), norm)
    whole = run(attack, problem, seed=3)
    assert 0 < sum(whole.broken) < 30  # both kinds are there
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(attack, problem.take(order), seed=3).candidate, whole.candidate[order])
    halves = [
        run(attack, problem.take(part), seed=3).candidate
        for part in (torch.arange(13), torch.arange(13, 30))
    ]
    assert torch.equal(torch.cat(halves), whole.candidate)
    alone = run(attack, problem.take([7]), seed=3)
    assert torch.equal(alone.candidate[0], whole.candidate[7])


@pytest.mark.parametrize("attack", [a for a in ATTACKS if isinstance(a, PGD)], ids=repr)
@pytest.mark.parametrize("norm", P)
def test_the_batch_size_does_not_matter_bit_for_bit(norm: str, attack: PGD) -> None:
    """With one job in flight the ranks run one after the other; with many, all at once: the lowest
    successful rank must win all the same.
    """
    problem = asking(rowwise(), norm)
    whole = run(attack, problem)
    for batch in (1, 3, 8):
        assert torch.equal(run(attack, problem, batch=batch).candidate, whole.candidate)


def test_the_batch_size_does_not_matter_for_a_network_in_float32() -> None:
    problem = asking(mlp(dtype=torch.float32), "linf", n=60)
    whole = run(PGD(steps=6, restarts=3, targets=2), problem)
    for batch in (1, 7, 64):
        part = run(PGD(steps=6, restarts=3, targets=2), problem, batch=batch)
        assert part.broken == whole.broken and torch.allclose(part.margin, whole.margin, atol=1e-5)


def test_the_first_successful_rank_wins_though_a_later_one_succeeds_sooner() -> None:
    """Restart 0 needs many steps, a random start fewer; whatever runs beside it, restart 0's
    example is the answer.
    """
    model = Fn(lambda x: torch.stack([0.05 - x[:, 0], torch.zeros(len(x), dtype=F64)], 1))
    problem = Problem.pose(
        model,
        torch.zeros(8, 2, dtype=F64) + torch.arange(8)[:, None] * 1e-3,
        [0] * 8,
        Ball("linf", 0.1, box=None),
    )
    answers = [
        run(PGD(steps=20, restarts=6, step=0.1), problem, batch=batch) for batch in (1, 5, 48)
    ]
    assert all(torch.equal(a.candidate, answers[0].candidate) for a in answers) and all(
        answers[0].broken
    )
    # The way of restart 0: from the point itself in steps of 0.01 until 0.05.
    assert torch.allclose(answers[0].candidate[0], torch.tensor([0.05, 0.0], dtype=F64), atol=1e-9)


def test_the_interval_between_looks_at_the_device_does_not_matter() -> None:
    """On a GPU the queue looks only every few steps; broken and finished slots must wait
    unchanged.
    """
    problem = asking(rowwise(), "l2")
    recipe = _Ascent(steps=5, restarts=4, targets=0, share=0.5, loss_name="alternate")
    whole = run(PGD(steps=5, restarts=4, step=0.5), problem)
    queue = Queue(problem, recipe, SearchOptions(batch=7))
    queue.chunk = 8
    assert torch.equal(run(lambda problem: queue.run(), problem).candidate, whole.candidate)


def test_a_neighbour_with_a_huge_gradient_changes_nothing() -> None:
    """A known bug takes the largest gradient of the whole batch for the l1 step: then only that
    point moves.
    """
    scale = torch.tensor([1.0, 1e6], dtype=F64)
    model = Fn(
        lambda x: torch.stack(
            [
                (x[:, 1:] * torch.arange(1.0, 4.0, dtype=F64)).sum(1) * scale[x[:, 0].long()] + 1e8,
                torch.zeros(len(x), dtype=F64),
            ],
            1,
        )
    )
    x = torch.cat([torch.tensor([[0.0], [1.0]], dtype=F64), random(2, 3)], 1)
    mask = torch.tensor([False, True, True, True])
    for norm in P:
        problem = Problem.pose(model, x, [0, 0], Ball(norm, 0.2, mask=mask))
        both, alone = run(PGD(steps=5), problem), run(PGD(steps=5), problem.take([0]))
        assert torch.equal(both.candidate[:1], alone.candidate) and not torch.equal(
            alone.candidate, x[:1]
        )


def test_seeds_and_restarts_draw_differently() -> None:
    # flat: iterates stay where they start
    model = Fn(
        lambda x: torch.stack([x.flatten(1).sum(1) * 0 + 2, torch.zeros(len(x), dtype=F64)], 1)
    )
    problem = asking(model, "linf", n=3)
    starts = []
    for seed in (0, 1):
        model.asked.clear()
        run(PGD(steps=1, restarts=5), problem, seed=seed)
        starts.append(model.asked[0])
    assert torch.equal(starts[0][:3], problem.x)  # the first start is the point itself
    assert len({tuple(row) for row in torch.cat(starts)[3:].flatten(1).tolist()}) == 12 + 12 + 3


# ---- cost
# --------------------------------------------------------------------------------------------------


def test_broken_points_leave_at_once_and_all_passes_are_counted() -> None:
    model = Fn(lambda x: torch.stack([x[:, 0] - 0.5, torch.zeros(len(x), dtype=F64)], 1))
    # wrong already; broken by one step; by two; never
    x = torch.tensor([[0.4], [0.55], [0.6], [0.9]], dtype=F64)
    problem = Problem.pose(model, x, [0] * 4, Ball("linf", 0.1001, box=None))
    model.asked.clear()
    found = run(PGD(steps=10, step=0.5), problem)
    assert found.broken == [True, True, True, False]
    assert found.forwards == [1, 2, 3, 10 + 1]
    assert found.backwards == found.forwards
    assert sum(found.forwards) == sum(len(batch) for batch in model.asked[:-1])


def test_restarts_that_cannot_matter_any_more_are_stopped() -> None:
    """Only the start at the point itself finds a slope; the other nineteen would wander over a
    plateau to their last step.
    """

    def slope(x: Tensor) -> Tensor:
        return torch.where(x[:, 1] == 0.5, 0.5 - x[:, 0], 1.0 + 0 * x[:, 0])

    model = Fn(lambda x: torch.stack([slope(x), torch.zeros(len(x), dtype=F64)], 1))
    problem = Problem.pose(model, torch.tensor([[0.45, 0.5]], dtype=F64), [0], Ball("linf", 0.1))
    found = run(PGD(steps=100, restarts=20, step=0.2), problem)
    assert found.broken == [True] and found.candidate[0, 1] == 0.5 and found.forwards[0] <= 20 * 4


@pytest.mark.parametrize("targets", [0, 3])
def test_the_cost_of_a_point_that_resists(targets: int) -> None:
    """100 steps and 20 restarts are 2,000 gradients, and one look at each end."""
    model = Fn(lambda x: torch.stack([x[:, 0] + 9, x[:, 0] * 0, x[:, 0] * 0.5, x[:, 0] * 0.25], 1))
    problem = asking(model, "linf", n=1, shape=(2,))
    found = run(PGD(steps=100, restarts=20, targets=targets), problem)
    ranking = (1, 3) if targets else (0, 0)
    jobs = 20 * max(targets, 1)
    assert (
        found.forwards == [jobs * 101 + ranking[0]]
        and jobs * 100 <= found.backwards[0] - ranking[1] <= jobs * 101
    )


def test_the_classifier_counts_every_pass_of_an_attack() -> None:
    problem = asking(mlp(), "linf", n=4)
    with problem.classifier.passes.counting() as spent:
        attempts = list(PGD(steps=2)(problem))
    assert spent.forwards == sum(int(a.forwards.sum()) for a in attempts)
    assert spent.backwards == sum(int(a.backwards.sum()) for a in attempts)


# ---- hard inputs
# --------------------------------------------------------------------------------------------------


def logits_of(first: Callable[[Tensor], Tensor]) -> Fn:
    return Fn(lambda x: torch.stack([first(x.flatten(1)), torch.zeros(len(x), dtype=x.dtype)], 1))


@pytest.mark.parametrize(
    "first",
    [
        lambda x: x.sum(1) * 0 + 2,
        lambda x: (x - x).sqrt().sum(1) + 2,
        lambda x: ((x - x).sqrt() * 0).sum(1) + 2,
        lambda x: 1 / (x - x + 1e-320).sum(1) * 0 + 2,
        lambda x: x.sum(1).detach() * 0 + 2,
        lambda x: (x > 0.5).double().sum(1) + 2,
        lambda x: x.sum(1) + 100,
    ],
    ids=["zero", "infinite", "nan", "overflow", "interrupted", "steps", "shared memory"],
)
@pytest.mark.parametrize("norm", P)
def test_zero_nan_and_missing_gradients_make_no_nan(
    norm: str, first: Callable[[Tensor], Tensor]
) -> None:
    model = logits_of(first)
    problem = Problem.pose(model, random(4, 3), [0] * 4, Ball(norm, 0.2))
    for attack in (
        FGSM(),
        FGSM(targets=1),
        PGD(steps=3, restarts=2),
        PGD(steps=3, restarts=2, targets=1),
    ):
        assert run(attack, problem).candidate.isfinite().all()


@pytest.mark.parametrize("norm", P)
def test_a_point_whose_logits_become_nan_is_proposed(norm: str) -> None:
    """NaN is not robust; the referee has the last word on it."""
    model = logits_of(lambda x: x.sum(1).sub(1.4).sqrt() + 0.1)
    problem = Problem.pose(model, torch.full((2, 3), 0.5, dtype=F64), [0, 0], Ball(norm, 0.3))
    found = run(PGD(steps=5), problem)
    assert found.broken == [True, True] and found.candidate.isfinite().all()


@pytest.mark.parametrize(
    "attack", [FGSM(), PGD(steps=4, restarts=2), PGD(steps=4, targets=2)], ids=repr
)
@pytest.mark.parametrize("norm", P)
def test_shapes_and_sizes_at_the_edge(norm: str, attack: Attack) -> None:
    torch.manual_seed(0)
    conv = (
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 3 * 5, 3))
        .double()
        .eval()
    )
    cases = [
        (asking(mlp(12), norm, n=1), "one point"),
        (asking(mlp(1), norm, shape=(1,)), "one feature"),
        (asking(mlp(9), norm, shape=(9,)), "1-D"),
        (asking(conv, norm, shape=(3, 5, 7)), "non-square images"),
        (asking(mlp(6, classes=2), norm, shape=(6,)), "two classes"),
        (asking(mlp(6, classes=1), norm, shape=(6,)), "a single logit"),
    ]
    for problem, what in cases:
        found = run(attack, problem)
        before = problem.goal.worst(problem.margins(problem.classifier.logits(problem.x)))
        assert (found.margin <= before).all() and (found.margin < before).any(), what


@pytest.mark.parametrize("norm", P)
def test_points_that_are_wrong_already_are_their_own_examples(norm: str) -> None:
    model = mlp()
    y = (asking(model, norm).y + 1) % 4
    problem = asking(model, norm, y=y)
    found = run(PGD(steps=20, restarts=10), problem, batch=30)
    assert (
        all(found.broken) and torch.equal(found.candidate, problem.x) and found.forwards == [1] * 30
    )


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=4, restarts=3)], ids=repr)
@pytest.mark.parametrize("norm", P)
def test_one_radius_for_each_point_also_zero(norm: str, attack: Attack) -> None:
    model = mlp()
    radius = torch.tensor([0.0, RADIUS[norm], 3 * RADIUS[norm]] * 10, dtype=F64)
    problem = asking(model, norm, radius=radius)
    found = run(attack, problem)
    assert torch.equal(found.candidate[::3], problem.x[::3])
    for i in (1, 2):
        single = asking(model, norm, radius=float(radius[i])).take(list(range(i, 30, 3)))
        assert torch.allclose(run(attack, single).candidate, found.candidate[i::3], atol=1e-12)


@pytest.mark.parametrize("norm", P)
def test_a_targeted_goal_is_met_by_its_target_only(norm: str) -> None:
    model = mlp()
    plain = asking(model, norm, radius=3 * RADIUS[norm])
    target = (plain.y + 1) % 4
    found = run(
        PGD(steps=20, restarts=2),
        asking(model, norm, radius=3 * RADIUS[norm], goal=Targeted(target)),
    )
    answers = Classifier(model).logits(found.candidate).argmax(1)
    assert found.broken == (answers == target).tolist() and 5 < sum(found.broken) < 30
    assert sum(found.broken) <= sum(run(PGD(steps=20, restarts=2), plain).broken)


def test_a_search_in_half_precision_proposes_admissible_points() -> None:
    problem = asking(mlp(dtype=torch.float32), "linf")
    rough, fine = run(PGD(steps=6, precision="bfloat16"), problem), run(PGD(steps=6), problem)
    assert abs(sum(rough.broken) - sum(fine.broken)) <= 3 and rough.candidate.dtype == torch.float32


def test_what_only_looks_broken_in_half_precision_is_searched_on() -> None:
    """Both logits are 100 in bfloat16 all the way, so every iterate looks like a tie; only the
    model's own arithmetic tells where the boundary is.
    """
    model = Fn(lambda x: torch.stack([100.05 - x[:, 0], 100 + 0 * x[:, 0]], 1), dtype=torch.float32)
    problem = Problem.pose(
        model,
        torch.zeros(8, 2) + torch.arange(8)[:, None] * 1e-3,
        [0] * 8,
        Ball("linf", 0.1, box=None),
    )
    found = run(PGD(steps=10, precision="bfloat16"), problem)
    assert all(found.broken)
    assert not any(run(PGD(steps=10, precision="bfloat16"), problem.at(0.03)).broken)


# ---- other classes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", P)
def test_targets_are_tried_by_their_distance_on_a_linear_model(norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).double()
    problem = asking(model, norm, n=200, shape=(6,), ball={"box": None})
    w, b = model.weight.detach(), model.bias.detach()
    order = {"linf": 1, "l2": 2, "l1": float("inf")}[norm]
    for i, columns in enumerate(rank_targets(problem, 4).tolist()):
        y = int(problem.y[i])
        rivals = [j for j in range(5) if j != y]
        distance = [
            float(
                ((w[y] - w[j]) @ problem.x[i] + b[y] - b[j])
                / torch.linalg.vector_norm(w[y] - w[j], order)
            )
            for j in rivals
        ]
        assert columns == np.argsort(distance).tolist()


def test_attacking_the_nearest_target_beats_the_worst_margin_on_a_linear_model() -> None:
    """The other class of smallest margin may be far: one step towards the nearest boundary breaks
    what one step towards the smallest margin does not.
    """
    w = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 5.0]], dtype=F64)
    model = Fn(lambda x: x @ w.T + torch.tensor([0.0, -0.05, -0.2], dtype=F64))
    problem = Problem.pose(model, torch.zeros(1, 2, dtype=F64), [0], Ball("linf", 0.1, box=(-1, 1)))
    one, two = (run(FGSM(targets=k), problem) for k in (0, 1))
    assert one.broken == [False] and two.broken == [True]


# ---- left as it was
# --------------------------------------------------------------------------------------------------


class Interrupting(nn.Module):
    """Raises in the middle of an attack, as a user's Ctrl-C does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.left = (
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 3),
            after,
        )

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        z: Tensor = self.last(self.norm(self.first(x)).relu())
        return z


@pytest.mark.parametrize("attack", [PGD(steps=50, restarts=3), PGD(steps=50, targets=2)], ids=repr)
def test_an_interrupted_attack_leaves_modes_flags_and_random_state(attack: PGD) -> None:
    torch.manual_seed(0)
    model = Interrupting(after=0).train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    problem = Problem.pose(model, random(5, 4), [0] * 5, Ball("linf", 1e-4, box=None))
    problem = Problem.pose(
        model, problem.x, problem.classifier.logits(problem.x).argmax(1), problem.threat
    )
    modes, flags, generator = (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
    )
    model.left = 6  # calls of the attack itself
    with pytest.raises(KeyboardInterrupt):
        list(attack(problem))
    assert modes == [m.training for m in model.modules()] == [True, True, False, True]
    assert flags == [p.requires_grad for p in model.parameters()] and not all(flags)
    assert torch.equal(torch.get_rng_state(), generator) and all(
        p.grad is None for p in model.parameters()
    )


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_attacks_leave_the_global_generators_the_model_and_the_data_alone(attack: Attack) -> None:
    model = mlp().train()
    problem = asking(model, "l1", n=5)
    x, weights, states = (
        problem.x.clone(),
        [p.clone() for p in model.parameters()],
        (torch.get_rng_state(), np.random.get_state()[1].tolist()),
    )  # type: ignore[index]
    run(attack, problem)
    assert (
        torch.equal(problem.x, x)
        and not problem.x.requires_grad
        and all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    )
    assert (
        torch.equal(torch.get_rng_state(), states[0])
        and np.random.get_state()[1].tolist() == states[1]
    )  # type: ignore[index]
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_attack_that_is_abandoned_leaves_the_model_usable() -> None:
    model = mlp().train()
    attempts = PGD(steps=3)(asking(model, "linf", n=4))
    next(iter(attempts))
    assert model.training and all(p.requires_grad for p in model.parameters())
    del attempts


# ---- settings
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(steps=0), r"steps >= 1, restarts >= 1 and targets >= 0, got 0, 1, 0"),
        (lambda: PGD(restarts=0), "restarts >= 1"),
        (lambda: PGD(targets=-1), "targets >= 0"),
        (lambda: PGD(step=0.0), r"step is a share of the radius, above 0 and at most 2 .*got 0\.0"),
        (lambda: PGD(step=float("nan")), "step is a share of the radius"),
        (lambda: PGD(precision="float16"), "precision is 'model' or 'bfloat16', got 'float16'"),  # type: ignore[arg-type]
        (lambda: PGD(loss="ce"), "unknown loss 'ce'; choose one of 'alternate', "),  # type: ignore[arg-type]
        (
            lambda: FGSM(targets=-1),
            "targets must be 0 .the worst margin. or the number of target classes to try, got -1",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Attack], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


def test_the_settings_are_the_identity() -> None:
    assert (
        repr(PGD())
        == "PGD(steps=40, restarts=1, step=None, loss='alternate', targets=0, precision='model')"
    )
    assert repr(FGSM()) == "FGSM(targets=0)" and PGD(steps=3) == PGD(steps=3) != PGD(steps=4)
