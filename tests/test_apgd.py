"""Does the step control follow its paper, do other classes and starts reach the jobs they are meant
for, and is a linear model broken exactly at its distance?
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from calipers.attacks.apgd import APGD, Climb, chosen
from calipers.attacks.engine.queue import Queue, SearchOptions, WarmStart
from calipers.attacks.engine.targets import rank_targets
from calipers.attacks.pgd import PGD
from calipers.attacks.warm_start import WarmStarted
from calipers.certificates.attack_starts import RelaxationMinimizers
from calipers.data import build, images
from calipers.errors import BadInput
from calipers.problem.goals import Targeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt
from calipers.threats.ball import Ball

P = ["linf", "l2", "l1"]
F64 = torch.float64
CHECKPOINTS = [22, 41, 57, 70, 80, 87, 93, 99]


def run(attack: Attack, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the candidates and which of them are adversarial; every point is mentioned once, every
    candidate admissible.
    """
    found, seen = problem.x.clone(), []
    for attempt in attack(problem, seed=0):
        found[attempt.index] = attempt.candidate
        seen += attempt.index.tolist()
    assert sorted(seen) == list(range(len(problem))) and bool(problem.region.contains(found).all())
    return found, is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits64(found)))
    )


def linear(
    classes: int, norm: str, box: tuple[float, float] | None, share: float, n: int = 30
) -> Problem:
    """Return points at `share` of the exact distance of a random linear model."""
    torch.manual_seed(classes)
    model = nn.Linear(8, classes if classes > 2 else 1).to(F64).eval()
    x = torch.rand(n, 8, dtype=F64)
    logits = model(x).detach()
    y = logits.argmax(1) if classes > 2 else (logits[:, 0] > 0).long()
    problem = Problem.pose(model, x, y, Ball(norm, 1.0, box=box))
    low, high = torch.zeros(n, dtype=F64), torch.full((n,), 64.0, dtype=F64)
    rows = problem.goal.rows(problem.y, problem.classes).to(F64) @ (
        model.weight.detach()
        if classes > 2
        else torch.cat([0 * model.weight, model.weight]).detach()
    )
    clean = problem.margins(problem.classifier.logits64(x))
    for _ in range(60):  # the least radius at which some margin's fall reaches its value
        middle = (low + high) / 2
        region = problem.region.at(middle)
        fall = torch.stack([region.offset_support(-rows[:, s])[0] for s in range(rows.shape[1])], 1)
        reached = (fall >= clean).any(1)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    assert bool((high < 60).any())
    return problem.take(torch.nonzero(high < 60).flatten()).at(high[high < 60] * share)


def test_the_checkpoints_are_the_papers() -> None:
    intervals = Climb(100, 1, 0, "margin")._intervals
    assert torch.nonzero(intervals).flatten().tolist() == CHECKPOINTS
    assert intervals[torch.tensor(CHECKPOINTS)].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    assert torch.nonzero(Climb(1, 1, 0, "margin")._intervals).flatten().tolist() == [1]


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("norm", P)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_linear_model_is_broken_just_above_its_distance_and_never_below(
    norm: str, classes: int, box: tuple[float, float] | None
) -> None:
    # The worst of several margins has local maxima even on a linear model: there only other classes
    # one by one are sure to find the nearest.
    untargeted = (APGD(steps=60, loss="margin"), APGD(steps=60)) if classes == 2 else ()
    for attack in (
        *untargeted,
        APGD(steps=100, targets=9),
        APGD(steps=100, targets=9, successive_halving=True, restarts=2),
    ):
        above, below = linear(classes, norm, box, 1.01), linear(classes, norm, box, 0.99)
        assert bool(run(attack, above)[1].all()) and not bool(run(attack, below)[1].any())


def test_a_step_that_seldom_rises_is_halved_and_the_best_iterate_is_taken_up_again() -> None:
    """On |x - 0.3| from far away: steps of twice the radius swing from end to end, and only halving
    gets near the breakpoint.
    """

    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(
                [0.01 + (x - 0.3).abs().sum(1, keepdim=True), torch.zeros(len(x), 1, dtype=F64)], 1
            )

    problem = Problem.pose(
        Valley(), torch.zeros(1, 3, dtype=F64), torch.tensor([0]), Ball("linf", 1.0, box=None)
    )
    reached = [
        float(problem.margins(problem.classifier.logits64(run(attack, problem)[0])))
        for attack in (APGD(steps=100), PGD(steps=100, step=2.0))
    ]
    assert reached[0] < 0.08 and reached[1] > 0.5


@pytest.mark.parametrize("norm", P)
@pytest.mark.parametrize(
    "attack",
    [APGD(steps=12, restarts=3), APGD(steps=12, targets=4, successive_halving=True, restarts=2)],
    ids=repr,
)
def test_batch_size_and_order_do_not_matter_bit_for_bit(norm: str, attack: APGD) -> None:
    class Rowwise(nn.Module):
        """Sums over features one row at a time: BLAS may sum in another order for another batch."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.weight = nn.Parameter(torch.randn(6, 10, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None] * self.weight).tanh().sum(2)

    model = Rowwise()
    x = torch.rand(24, 10, dtype=F64, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    problem = Problem.pose(model, x, y, Ball(norm, {"linf": 0.1, "l2": 0.3, "l1": 0.8}[norm]))
    whole, broken = run(attack, problem)
    assert 0 < int(broken.sum()) < 24
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(attack, problem.take(order))[0], whole[order])
    assert torch.equal(run(lambda p, seed: attack(p, seed=seed, batch=5), problem)[0], whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", P)
def test_the_interval_between_looks_at_the_device_does_not_matter(norm: str) -> None:
    """On a GPU the queue looks only every few steps: what a job remembers must wait with it."""
    problem = linear(5, norm, (0.0, 1.0), 0.9)
    found = []
    for chunk in (1, 8):
        queue = Queue(problem, Climb(12, 2, 0, "margin"), SearchOptions(batch=7))
        queue.chunk = chunk
        found.append(run(lambda problem, seed, queue=queue: queue.run(), problem)[0])  # type: ignore[misc]
    assert torch.equal(*found)


def test_without_targets_starts_go_to_the_restarts() -> None:
    problem = linear(3, "linf", None, 1.01)
    starts = problem.region.support(-problem.x).point[:, None, None].expand(-1, 1, 2, -1)
    queue = Queue(
        problem, Climb(1, 2, 0, "margin"), SearchOptions(), WarmStart(starts.flatten(1, 2))
    )
    slots, _ = queue._fill(None)
    assert slots is not None and torch.equal(
        slots.x,
        problem.region.take(slots.job % len(problem)).project(
            starts[slots.job % len(problem), 0, 0]
        ),
    )
    assert len(
        run(lambda p, seed: APGD(steps=3, restarts=2)(p, seed=seed, starts=starts), problem)[0]
    ) == len(problem)  # type: ignore[arg-type]


def test_a_targeted_goal_is_not_attacked_class_by_class() -> None:
    """To beat one other class is not to reach the target: all margins count at once."""
    x, y = images()
    problem = Problem.pose(
        build("mnist-plain"), x[:40], y[:40], Ball("linf", 0.15), Targeted((y[:40] + 1) % 10)
    )
    together = int(run(APGD(steps=30), problem)[1].sum())
    assert (
        int(run(APGD(steps=30, targets=9, successive_halving=True), problem)[1].sum())
        == together
        > 5
    )
    assert (
        int(run(WarmStarted(APGD(steps=30, targets=9), RelaxationMinimizers(1)), problem)[1].sum())
        >= together - 2
    )


def test_starts_go_to_the_jobs_of_their_targets() -> None:
    torch.manual_seed(0)
    problem = linear(5, "linf", None, 0.5, n=4)
    rivals = rank_targets(problem, 3)
    starts = torch.randn(len(problem), 2, 4, 8, dtype=F64)
    picked = chosen(starts, rivals)
    for point in range(len(problem)):
        for restart in range(2):
            for target in range(3):
                assert torch.equal(
                    picked[point, restart * 3 + target],
                    starts[point, restart, rivals[point, target]],
                )
    queue = Queue(
        problem, Climb(1, 2, 3, "margin"), SearchOptions(), WarmStart(picked, rivals), True
    )
    slots, _ = queue._fill(None)
    assert slots is not None
    rank, place = slots.job // len(problem), slots.job % len(problem)
    assert torch.equal(slots.x, problem.region.take(place).project(picked[place, rank]))


def test_the_next_round_goes_on_from_the_best_job_of_each_target() -> None:
    problem = linear(5, "linf", None, 0.5, n=3)
    columns = torch.tensor([[2, 0, 3]] * len(problem))
    queue = Queue(
        problem, Climb(1, 2, 3, "margin"), SearchOptions(), WarmStart(None, columns), True
    )
    assert queue.all_best is not None
    # each job's iterate is its rank
    queue.all_best = torch.arange(6.0, dtype=F64).view(1, 6, 1).expand(len(problem), 6, 8).clone()
    # restart 0, then restart 1, of other classes 2, 0, 3
    queue.all_scores = torch.tensor([[5.0, 4.0, 9.0, 1.0, 6.0, 3.0]] * len(problem), dtype=F64)
    starts, rivals = queue.promising(torch.tensor([0, 1]), 2)
    assert rivals.tolist() == [[2, 3], [2, 3]] and starts[:, :, 0].tolist() == [
        [3.0, 5.0],
        [3.0, 5.0],
    ]


@pytest.mark.parametrize("norm", P)
def test_the_minimiser_of_a_linear_model_is_its_steepest_point(norm: str) -> None:
    problem = linear(4, norm, (0.0, 1.0), 1.001)
    starts = RelaxationMinimizers(slopes=1)(problem)
    values = torch.stack(
        [problem.margins(problem.classifier.logits64(starts[:, 0, s]))[:, s] for s in range(3)], 1
    )
    assert starts.shape == (len(problem), 1, 3, 8)
    assert bool((values.amin(1) <= 1e-6).all()) and bool(
        (problem.region.distance(starts[:, 0, 0]) <= problem.region.radius + 1e-6).all()
    )


def test_guided_starts_are_at_least_as_strong_as_random_ones_on_a_real_network() -> None:
    x, y = images()
    problem = Problem.pose(build("mnist-plain"), x[:60], y[:60], Ball("linf", 0.1))
    attack = APGD(steps=20, targets=9, successive_halving=True)
    assert int(run(WarmStarted(attack, RelaxationMinimizers(1)), problem)[1].sum()) >= int(
        run(attack, problem)[1].sum()
    )


def test_a_model_that_cannot_be_captured_is_attacked_without_a_guide() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).to(F64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.detach().sum()) > -1e9 else self.layer(-x)

    model = Branching()
    x = torch.rand(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    problem = Problem.pose(model, x, model(x).argmax(1), Ball("linf", 0.05))
    attack = APGD(steps=5, targets=2)
    assert torch.equal(
        run(WarmStarted(attack, RelaxationMinimizers()), problem)[0], run(attack, problem)[0]
    )


def test_the_guides_starts_are_asked_for_once() -> None:
    asked: list[int] = []

    def attack(
        problem: Problem, *, seed: int = 0, starts: Tensor | None = None
    ) -> Iterator[Attempt]:
        assert starts is not None and starts.shape[:3] == (len(problem), 2, problem.classes - 1)
        asked.append(len(problem))
        return APGD(steps=1, targets=1)(problem, seed=seed)

    run(WarmStarted(attack, RelaxationMinimizers(2)), linear(3, "l2", None, 0.5))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APGD(steps=0), "APGD takes steps >= 1"),
        (lambda: APGD(loss="dlr2"), "unknown loss 'dlr2'"),  # type: ignore[arg-type]
        (lambda: APGD(precision="half"), "precision is 'model' or 'bfloat16'"),  # type: ignore[arg-type]
        (lambda: RelaxationMinimizers(0), "1 to 5 slopes, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()  # type: ignore[operator]


def test_starts_of_every_choice_of_slopes_do_not_depend_on_the_neighbours() -> None:
    """The random slopes too: drawn for each element, the same for all points, and another choice
    than the fixed ones.
    """
    x, y = (t[:12] for t in images())
    model = build("mnist-robust")
    problem = Problem.pose(model, x, y, Ball("linf", 0.2))
    starts = RelaxationMinimizers(slopes=5)(problem)
    assert torch.equal(starts[3:5], RelaxationMinimizers(slopes=5)(problem.take([3, 4])))
    assert all(not torch.equal(starts[:, 4], starts[:, k]) for k in range(4))
