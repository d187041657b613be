"""Do momentum and transfer keep their promises: what is returned is judged as it is, by the model
that is asked, and hangs on nothing but the point?
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calipers.api.ask import attack
from calipers.attacks.engine.queue import Look
from calipers.attacks.mi_fgsm import MIFGSM, _Rolling, resized
from calipers.attacks.pgd import PGD
from calipers.attacks.surrogate import QuerySchedule, Student, distilled
from calipers.attacks.transfer import MeanLogits, Transfer
from calipers.data import build, images
from calipers.errors import BadInput
from calipers.models.classifier import Classifier
from calipers.models.wrappers import BlackBox
from calipers.problem.goals import Targeted, Untargeted, endless
from calipers.problem.problem import Problem
from calipers.random_streams import Streams
from calipers.threats.ball import Ball

ROLLING = [
    MIFGSM(steps=6),
    MIFGSM(steps=6, nesterov=True),
    MIFGSM(steps=6, nesterov=True, diversity=0.7),
]


def digits(n: int, name: str = "mnist-plain", norm: str = "linf", radius: float = 0.08) -> Problem:
    x, y = (part[:n] for part in images())
    return Problem.pose(build(name), x, y, Ball(norm, radius))


def run(tool: Any, problem: Problem, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return the candidates and the worst margins of the model there."""
    points = problem.x.clone()
    for attempt in tool(problem, **settings):
        points[attempt.index] = attempt.candidate
    return points, problem.goal.worst(problem.margins(problem.classifier.logits(points)))


def labels_only(net: nn.Module) -> BlackBox:
    """A model of which nothing but labels can be had."""
    return BlackBox(
        lambda x: net(torch.as_tensor(x).float()).argmax(1).numpy(),
        "labels",
        classes=10,
        name="digits",
    )


# ---- momentum
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("tool", ROLLING, ids=repr)
def test_candidates_are_admissible_and_break_most_of_what_plain_steps_break(
    tool: MIFGSM, norm: str
) -> None:
    problem = digits(60, norm=norm, radius={"linf": 0.08, "l2": 1.5, "l1": 8.0}[norm])
    points, worst = run(tool, problem)
    assert bool(problem.region.contains(points).all())
    _, plain = run(PGD(steps=6), problem)
    broken, usual = int((worst <= 0).sum()), int((plain <= 0).sum())
    assert broken >= 0.7 * usual > 5, (broken, usual)


@pytest.mark.parametrize("tool", ROLLING, ids=repr)
def test_results_hang_on_the_point_alone(tool: MIFGSM) -> None:
    problem = digits(20, radius=0.05)
    whole, _ = run(tool, problem)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    small, _ = run(tool, problem.take(order), batch=3)
    assert torch.allclose(small, whole[order], atol=1e-6)


class Watched(nn.Module):
    """A model of two classes that keeps what it is asked."""

    def __init__(self, slopes: list[float]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slopes))
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        z = (x.flatten(1) * self.slope).sum(1) + 100.0
        return torch.stack([z, 0 * z], 1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_look_ahead_asks_ahead_and_ends_at_the_iterate(nesterov: bool) -> None:
    model = Watched([1.0, -2.0])
    problem = Problem.pose(model, torch.full((1, 2), 0.5), torch.tensor([0]), Ball("linf", 0.4))
    model.asked.clear()
    run(MIFGSM(steps=4, step=0.1, nesterov=nesterov), problem)
    moved = [float(x[0, 0] - 0.5) for x in model.asked[:5]]
    expected = [0, -0.08, -0.12, -0.16, -0.16] if nesterov else [0, -0.04, -0.08, -0.12, -0.16]
    assert np.allclose(moved, expected, atol=1e-6)


def test_the_velocity_is_the_sum_of_gradients_of_mean_size_one() -> None:
    problem = digits(4)
    recipe = _Rolling(3, 0.5, 0.8, False, "cross_entropy")
    memory = recipe.memory(problem.region, problem.x)
    gradients = [
        torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(k)) * 10.0**k
        for k in (0, 5)
    ]
    zero = torch.zeros(4)
    for k, g in enumerate(gradients):
        _, memory = recipe.move(
            Look(problem.region, problem.x, g, zero, zero, torch.full((4,), k), problem.x, zero),
            memory,
        )
    units = [g / g.abs().mean((1, 2, 3), keepdim=True) for g in gradients]
    assert torch.allclose(memory["velocity"], 0.8 * units[0] + units[1], atol=1e-5)


def test_diversity_refuses_vectors_and_says_what_to_do() -> None:
    problem = Problem.pose(
        Watched([1.0, -2.0]), torch.full((1, 2), 0.5), torch.tensor([0]), Ball("linf", 0.4)
    )
    with pytest.raises(BadInput, match="diversity=0"):
        list(MIFGSM(diversity=0.5)(problem))
    with pytest.raises(BadInput, match="probability"):
        MIFGSM(diversity=1.5)


def test_resized_images_keep_their_size_and_draw_for_themselves() -> None:
    streams = Streams.of(0, ["a", "b", "c", "d"], torch.device("cpu"))
    x = torch.ones(4, 3, 12, 9)
    drawn = resized(x, streams, 1.0)
    assert drawn.shape == x.shape and torch.equal(resized(x, streams, 0.0), x)
    mass = drawn[:, 0].sum((1, 2)) / 108
    assert bool(((mass > 0.75) & (mass < 1)).all()) and len(mass.unique()) == 4
    some = resized(x[[2]], streams.take(torch.tensor([2])), 1.0)
    assert torch.equal(some[0], drawn[2])


def test_the_transform_is_never_what_is_judged() -> None:
    """A model that answers wrong wherever the frame is black: were the transformed image judged,
    every point would count as broken.
    """

    class Framed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            border = torch.minimum(x[:, :, 0].amin((1, 2)), x[:, :, -1].amin((1, 2)))
            z = (border - 0.3) * self.weight
            return torch.stack([z, -z], 1)

    problem = Problem.pose(
        Framed(), torch.full((5, 1, 8, 8), 0.9), torch.zeros(5, dtype=torch.long), Ball("linf", 0.1)
    )
    attempts = list(MIFGSM(steps=5, diversity=1.0)(problem))
    # six looks, each beside its transformed one; nothing ended early
    assert all(int(a.forwards.min()) == 12 for a in attempts)
    found = attack(Framed(), problem.x, problem.y, problem.threat, MIFGSM(steps=5, diversity=1.0))
    assert not found.success.any()


# ---- transfer
# --------------------------------------------------------------------------------------------------


def test_a_surrogate_that_is_the_target_breaks_what_the_attack_breaks() -> None:
    problem = digits(60)
    points, worst = run(Transfer(PGD(steps=6), (build("mnist-plain"),)), problem)
    _, plain = run(PGD(steps=6), problem)
    assert bool((worst[plain <= 0] <= 0).all()) and bool(problem.region.contains(points).all())


def test_the_attack_goes_on_beyond_the_surrogates_boundary() -> None:
    """Ended where the surrogate falls, the examples would hardly be wrong there; they must lie as
    deep as the steps allow.
    """
    problem = digits(60, radius=0.15)
    _, ended = run(PGD(steps=10), problem)
    _, deep = run(Transfer(PGD(steps=10), (build("mnist-plain"),)), problem)
    clean = problem.goal.worst(problem.margins(problem.classifier.logits(problem.x))) > 0
    both = clean & (ended <= 0)
    assert int(both.sum()) > 30 and float((deep[both] < ended[both] - 1).double().mean()) > 0.9


def test_more_surrogates_never_break_less() -> None:
    target, x, y = build("mnist-plain"), *(part[:60] for part in images())
    threat, tool = Ball("linf", 0.12), PGD(steps=6)
    other = Student(784, 16, 10)
    counts = [
        int(attack(target, x, y, threat, Transfer(tool, s)).success.sum())
        for s in ((build("mnist-robust"),), (build("mnist-robust"), other))
    ]
    assert counts[1] >= counts[0] > 3, counts


def test_the_best_candidate_of_each_point_is_returned() -> None:
    problem = digits(40, radius=0.1)
    surrogates = (build("mnist-robust"), Student(784, 16, 10, seed=3))
    _, joined = run(Transfer(PGD(steps=5), surrogates), problem)
    ends = [
        run(Transfer(PGD(steps=5), (s,)), problem)[1]
        for s in (MeanLogits(tuple(map(Classifier, surrogates))).eval(), *surrogates)
    ]
    lowest = torch.stack(ends).amin(0)
    standing = lowest > 0
    assert int(standing.sum()) > 10 and torch.allclose(
        joined[standing], lowest[standing], atol=1e-5
    )
    assert bool((joined[~standing] <= 0).all())


def test_the_target_is_asked_once_a_candidate_and_never_for_a_slope() -> None:
    target = labels_only(build("mnist-plain"))
    x, y = (part[:30] for part in images())
    problem = Problem.pose(target, x, y, Ball("linf", 0.05))
    with problem.classifier.passes.counting() as asked:
        (attempt,) = Transfer(PGD(steps=3), (build("mnist-robust"), Student(784, 8, 10)))(problem)
    assert (
        asked.forwards == int(attempt.forwards.sum())
        and int(attempt.forwards.max()) == 3
        and int(attempt.backwards.sum()) == 0
    )


def test_a_target_class_is_sought_on_the_surrogate_too() -> None:
    x, y = (part[:40] for part in images())
    goal = Targeted((y + 1) % 10)
    found = attack(
        build("mnist-plain"),
        x,
        y,
        Ball("linf", 0.25),
        Transfer(PGD(steps=20), (build("mnist-plain"),)),
        goal=goal,
    )
    answers = build("mnist-plain")(found.candidates).argmax(1)
    assert int(found.success.sum()) > 25 and bool(
        (answers[found.success] == goal.target[found.success]).all()
    )


def test_the_name_follows_the_surrogates_weights() -> None:
    one, same, other = (Transfer(PGD(), (Student(4, 3, 2, seed=seed),)) for seed in (0, 0, 1))
    assert repr(one) == repr(same) != repr(other)
    assert repr(one).startswith("Transfer(attack=PGD(") and "object at" not in repr(one)


def test_wrong_surrogates_are_refused() -> None:
    with pytest.raises(BadInput, match="by value"):
        Transfer(PGD(), ("mnist-plain",))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="got none"):
        Transfer(PGD(), ())
    with pytest.raises(BadInput, match="3 classes apart, the target 10"):
        list(Transfer(PGD(), (Student(784, 4, 3),))(digits(3)))


# ---- students
# --------------------------------------------------------------------------------------------------


def test_a_student_of_labels_alone_breaks_more_than_noise() -> None:
    net, (x, y) = build("mnist-plain"), images()
    target, threat = labels_only(net), Ball("linf", 0.25)
    student = distilled(target, x[100:300], QuerySchedule(400, rounds=2), hidden=64)
    shown, labels = x[:100], y[:100]
    found = attack(
        target, shown, labels, threat, Transfer(MIFGSM(steps=10, diversity=0.5), (student,))
    )
    generator = torch.Generator().manual_seed(0)
    noisy = [
        (shown + 0.25 * torch.randn(shown.shape, generator=generator).sign()).clamp(0, 1)
        for _ in range(3)
    ]
    by_noise = [int((net(points).argmax(1) != labels).sum()) for points in noisy]
    assert int(found.success.sum()) >= 25 > 2 * max(by_noise), (int(found.success.sum()), by_noise)


@pytest.mark.parametrize("queries", [40, 50, 200])
def test_the_budget_of_questions_holds(queries: int) -> None:
    asked: list[int] = []
    net = build("mnist-plain")
    target = BlackBox(
        lambda x: (asked.append(len(x)), net(torch.as_tensor(x).float()).numpy())[1],
        "scores",
        name="counted",
    )  # type: ignore[func-returns-value]
    classifier = Classifier(target)
    distilled(classifier, images()[0][:40], QuerySchedule(queries, rounds=3), hidden=8)
    assert sum(asked) <= queries, (sum(asked), queries)


def test_a_student_is_reproduced_by_its_seed_and_leaves_the_shared_generator_alone() -> None:
    x, net = images()[0][:40], build("mnist-plain")
    state = torch.random.get_rng_state()
    digests = [
        Classifier(distilled(net, x, QuerySchedule(60, rounds=2), hidden=8, seed=seed)).digest()
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_target_of_one_score_has_two_classes() -> None:
    x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    made = distilled(
        BlackBox(lambda rows: rows.sum(1) - 2.0, flat=True), x, QuerySchedule(100), hidden=16
    )
    assert (
        made(x).shape == (30, 2)
        and float((made(x).argmax(1) == (x.sum(1) > 2).long()).double().mean()) > 0.8
    )


def test_a_given_student_is_copied() -> None:
    own = Student(784, 8, 10)
    before = Classifier(own).digest()
    made = distilled(
        build("mnist-plain"), images()[0][:40], QuerySchedule(40, rounds=1), student=own
    )
    assert Classifier(own).digest() == before != Classifier(made).digest()
    assert not any(p.requires_grad for p in made.parameters())


def test_the_goal_of_a_surrogate_is_never_reached_but_falls_with_its_own() -> None:
    margins = torch.tensor([[-50.0], [-1.0], [0.0], [1e-3], [7.0]], dtype=torch.float64)
    worst = endless(Untargeted()).worst(margins)
    assert bool((worst > 0).all()) and bool((worst.diff() > 0).all())
