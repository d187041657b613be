"""How near do attacks without gradients come to those with gradients? Measured on a net that passes
no gradient on, and on planes whose answer is known.
"""

from __future__ import annotations

import pytest
import torch
from test_attacks import F64, Fn, asking, mlp, random, rowwise, run
from test_black_box import exact, in_order, nearest, plane
from torch import Tensor, nn

from calipers.attacks.engine.query_loop import Memory, run_queries
from calipers.attacks.finite_differences import FiniteDifferences, _Slopes
from calipers.attacks.hop_skip_jump import HopSkipJump
from calipers.attacks.pgd import PGD
from calipers.attacks.rays import RayS
from calipers.attacks.square import Square, windowed
from calipers.data import build, images
from calipers.errors import BadInput
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.random_streams import Streams
from calipers.threats.ball import Ball, Region

GRADIENTS = PGD(steps=100, restarts=5)


def digits(norm: str, radius: float, count: int = 100) -> tuple[Problem, Problem]:
    """Return the question with gradients and the same without."""
    x, y = (part[:count] for part in images())
    net = build("mnist-plain")
    stopped = Fn(lambda x: net(x.detach()), torch.float32)
    return Problem.pose(net, x, y, Ball(norm, radius)), Problem.pose(
        stopped, x, y, Ball(norm, radius)
    )


# ---- scores
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.1), ("l2", 1.5)])
def test_scores_break_as_many_digits_as_gradients_within_three(norm: str, radius: float) -> None:
    """Measured: 88 by gradients and 85 by 5000 scores in linf, 85 and 86 in l2; features drawn anew
    every round instead of in turn: 84 and 78.
    """
    problem, stopped = digits(norm, radius)
    gradients, found = sum(run(GRADIENTS, problem).broken), run(FiniteDifferences(), stopped)
    assert max(found.forwards) <= 5000 and not any(found.backwards)
    assert sum(found.broken) >= gradients - 3, (sum(found.broken), gradients)


@pytest.mark.slow
def test_random_search_alone_comes_near() -> None:
    """Measured: 85 by gradients, 82 by random search; without its small moves 74."""
    problem, stopped = digits("l2", 1.5)
    assert sum(run(Square(), stopped).broken) >= sum(run(GRADIENTS, problem).broken) - 6


class _Anew(_Slopes):
    """A bug that was made here: every round draws its features afresh, so some are asked about
    again and again and others never.
    """

    def _moves(self, region: Region, streams: Streams, memory: Memory) -> tuple[Tensor, Tensor]:
        return super()._moves(
            region,
            streams.fork(memory["round"]),
            memory | {"round": torch.zeros_like(memory["round"])},
        )


def test_every_feature_has_its_turn() -> None:
    """After one sweep the slope of a plane is known in every feature, up to the momentum of its
    round.
    """
    model, w = plane(12)
    problem = asking(model, "l2", n=6, radius=1e-3)
    for play, complete in ((_Slopes, True), (_Anew, False)):
        slopes: list[Tensor] = []

        class Listening(play):  # type: ignore[misc, valid-type]
            def _ascend(self, *args: object) -> None:
                super()._ascend(*args)
                slopes.append(args[1]["slope"].clone())  # type: ignore[index]  # noqa: B023

        list(run_queries(problem, Listening(19, 1, 4, windowed(problem, 1)), seed=0))
        assert len(slopes) == 3
        signs = torch.where(problem.y[:, None] == 0, 1.0, -1.0) * w.sign()
        assert bool((slopes[-1].sign() == signs).all()) == complete, play


def test_every_question_of_the_ascent_is_admissible() -> None:
    mask, weights = random(1, 3, 4, seed=4) < 0.6, random(1, 3, 4, seed=5) + 0.5
    for norm in ("linf", "l2", "l1"):
        for ball in ({}, {"mask": mask}, {"weights": weights}):
            model = mlp(12, classes=3)
            asked = Fn(lambda x, model=model: model(x) + torch.tensor([50.0, 0, 0], dtype=F64))
            problem = asking(
                asked, norm, n=1, shape=(1, 3, 4), y=torch.tensor([0]), ball=dict(ball)
            )
            asked.asked.clear()
            attempts = list(FiniteDifferences(queries=120, search=10, features=5)(problem))
            questions = torch.cat(asked.asked)
            assert len(questions) == 120 == int(attempts[0].forwards)
            assert problem.take([0] * 120).region.contains(questions).all(), (norm, ball)


# ---- labels
# --------------------------------------------------------------------------------------------------


def test_rays_find_the_distance_of_a_plane_inside_the_box() -> None:
    model, w = plane(12)
    mask, weights = random(1, 3, 4, seed=4) < 0.8, random(1, 3, 4, seed=5) + 0.5
    for ball in ({}, {"box": None}, {"mask": mask, "weights": weights}):
        problem = asking(model, "linf", n=12, ball=dict(ball))
        got = nearest(RayS(queries=600), problem)
        ratio = (got.distance / exact(problem, w))[got.broken]
        assert len(ratio) >= 8 and float(ratio.min()) > 1 - 1e-6 and float(ratio.max()) < 1.005, (
            ball,
            ratio,
        )


def test_rays_depend_on_the_point_alone_and_keep_the_budget() -> None:
    model = rowwise()
    problem, attack = asking(model, "linf", n=12), RayS(queries=120)
    model.asked.clear()
    whole = in_order(attack, problem, seed=3)
    count = sum(len(batch) for batch in model.asked)
    assert count <= 120 * 12 and count == sum(
        int(a.forwards.sum()) for a in attack(problem, seed=3)
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(in_order(attack, problem.take(order), seed=3), whole[order])
    assert torch.equal(in_order(attack, problem, seed=3, batch=5), whole)
    assert torch.equal(in_order(attack, problem.take([7]), seed=3)[0], whole[7])


def test_rays_break_far_more_digits_than_walks_of_labels() -> None:
    """Measured on 30 digits with 1000 queries: 21 by rays, 4 by walks."""
    _, stopped = digits("linf", 0.1, 30)
    rays, walks = (
        int((nearest(attack, stopped).distance <= 0.1).sum())
        for attack in (RayS(1000, starts=1), HopSkipJump(1000))
    )
    assert rays >= walks + 10, (rays, walks)


@pytest.mark.slow
def test_rays_come_within_eight_digits_of_gradients() -> None:
    """Measured: 88 of 100 by gradients, 82 by 10,000 labels."""
    problem, stopped = digits("linf", 0.1)
    rays = int((nearest(RayS(), stopped).distance <= 0.1).sum())
    assert rays >= sum(run(GRADIENTS, problem).broken) - 8, rays


def test_rays_start_over_where_a_search_is_exhausted() -> None:
    """On a plane a pass that saves nothing proves that no flip helps: the starts end long before
    the budget, each in the same corner.
    """
    model, _ = plane(6)
    problem = asking(model, "linf", n=5, shape=(6,))
    once, thrice = (nearest(RayS(5000, starts=starts), problem) for starts in (1, 3))
    assert max(once.forwards) < max(thrice.forwards) < 1000
    assert torch.allclose(once.distance, thrice.distance, rtol=5e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RayS(queries=0),
        lambda: RayS(starts=0),
        lambda: list(RayS()(asking(mlp(), "l2"))),
    ],
)
def test_settings_of_rays_are_checked(wrong: object) -> None:
    with pytest.raises(BadInput):
        wrong()  # type: ignore[operator]


@pytest.mark.parametrize("features", [1, 5])
def test_rays_and_differences_at_the_edge(features: int) -> None:
    problem = asking(mlp(features), "linf", n=3, shape=(features,))
    assert nearest(RayS(queries=100), problem).candidate.isfinite().all()
    assert not any(run(FiniteDifferences(queries=40, search=0), problem).backwards)
    stuck = asking(mlp(), "linf", n=2, radius=0.0)
    assert run(FiniteDifferences(queries=40, search=5), stuck).forwards == [1, 1]


def test_a_ray_is_given_up_only_when_no_flip_of_a_block_would_save_anything() -> None:
    """With questions to spare the one start ends at a local optimum: every block of every size,
    flipped one per cent nearer, is answered rightly.
    """
    d = 24
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()
        with torch.no_grad():
            model[0].weight.mul_(4)
        x = torch.randn(6, d, dtype=torch.float64)
        problem = Problem.pose(model, x, model(x).argmax(1), Ball("linf", 0.1, box=(-50, 50)))
        for attempt in RayS(queries=20_000, starts=1)(problem):
            part = problem.take(attempt.index)
            delta = attempt.candidate - part.x
            reach, ray = delta.abs().amax(1, keepdim=True), delta.sign()
            assert int(attempt.forwards.max()) < 20_000
            for size in {-(-d // 2**level) for level in range(6)}:
                for first in range(0, d, size):
                    flipped = ray.clone()
                    flipped[:, first : first + size] *= -1
                    assert not is_adversarial(
                        part.goal.worst(part.margins(model(part.x + 0.99 * reach * flipped)))
                    ).any()
