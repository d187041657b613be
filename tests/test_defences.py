"""Do defences that break gradients, or answer at random, fall to attacks that know about them?"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import arsenal
import pytest
import torch
from torch import Tensor, nn

from calipers import data
from calipers.attacks.defences import BPDA, EOT, Averaged, BPDALayer, replace_layers, staircase
from calipers.attacks.hop_skip_jump import HopSkipJump
from calipers.attacks.pgd import PGD
from calipers.attacks.square import Square
from calipers.errors import BadInput, BadModel
from calipers.models.classifier import Classifier
from calipers.models.stochastic import differ, drawn
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt
from calipers.problem.votes import judged
from calipers.random_streams import key_of
from calipers.threats.ball import Ball

RADIUS = 0.1


class Quantise(nn.Module):
    """Rounds pixels to equally spaced levels."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)


class Shift(nn.Module):
    """Resizes the whole batch to a random size and puts it at a random place."""

    def forward(self, x: Tensor) -> Tensor:
        size = int(torch.randint(24, 33, ()))
        x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        room = 32 - size
        left, top = (int(torch.randint(room + 1, ())) for _ in range(2))
        return nn.functional.pad(x, (left, room - left, top, room - top))[:, :, 2:30, 2:30]


def digits(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    model, (x, y) = data.build("mnist-plain"), data.images()
    keep = torch.nonzero(model(x).max(1).indices == y).flatten()[:n]
    return model, x[keep], y[keep]


def broken(attack: Attack, problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return which points the problem's own model gets wrong at the candidates, and the candidates,
    in order.
    """
    attempts = list(attack(problem, seed=seed))
    index = torch.cat([a.index for a in attempts])
    assert sorted(index.tolist()) == list(range(len(problem)))
    candidate = torch.cat([a.candidate for a in attempts])[index.argsort()]
    assert problem.region.contains(candidate).all()
    return is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits(candidate)))
    ), candidate


# ---- BPDA
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stand_in", ["identity", "smooth"])
def test_a_quantised_net_breaks_like_the_bare_one(stand_in: str) -> None:
    model, x, y = digits(60)
    defended = nn.Sequential(Quantise(8), model)
    clean = defended(x).max(1).indices == y
    bare, quantised = (
        Problem.pose(model, x, y, Ball("linf", RADIUS)),
        Problem.pose(defended, x, y, Ball("linf", RADIUS)),
    )
    attack = PGD(steps=40, restarts=3)
    reference, blind = broken(attack, bare)[0], broken(attack, quantised)[0]
    known = broken(BPDA(attack, (("0", stand_in),), levels=8), quantised)[0]  # type: ignore[arg-type]
    assert blind.sum() < 0.5 * reference.sum() and clean.sum() >= 57
    assert known.sum() >= reference.sum() - 1


def test_a_quantiser_has_no_slope_and_its_stand_in_has() -> None:
    model, x, _ = digits(4)
    x = x.requires_grad_()
    (plain,) = torch.autograd.grad(nn.Sequential(Quantise(8), model)(x).sum(), x)
    (passed,) = torch.autograd.grad(nn.Sequential(BPDALayer(Quantise(8)), model)(x).sum(), x)
    at = Quantise(8)(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(at).sum(), at)
    assert not plain.any() and torch.equal(passed, expected)


def test_the_answer_is_the_layers_own_bit_for_bit() -> None:
    x = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    layer = Quantise(5)
    assert all(
        torch.equal(BPDALayer(layer, s, levels=5)(x), layer(x))
        for s in ("identity", "smooth", torch.sin)
    )
    assert torch.equal(BPDALayer(nn.Identity())(x.requires_grad_()), x)


def test_an_own_stand_in_is_differentiated() -> None:
    x = torch.rand(
        5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    (slope,) = torch.autograd.grad(BPDALayer(torch.sign, torch.tanh)(x).sum(), x)
    assert torch.allclose(slope, 1 - x.tanh().square())


def test_the_staircase_goes_where_the_quantiser_goes() -> None:
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (staircase(x, 8, 1e-4) - Quantise(8)(x)).abs().mean() < 1e-3
    rising = staircase(x, 8, 0.5 / 7)
    assert (rising.diff() > 0).all() and (rising - x).abs().max() < 0.08
    half = torch.tensor([0.5 / 7], dtype=torch.float64)
    assert torch.isclose(staircase(half, 2, 0.1), torch.sigmoid((half - 0.5) / 0.1)).all()


def test_a_stand_in_of_another_shape_says_so() -> None:
    x = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(BadModel, match=r"returns shape \(2, 6\), the layer \(2, 3\)"):
        torch.autograd.grad(BPDALayer(nn.Linear(6, 3))(x).sum(), x)
    with pytest.raises(BadInput, match="unknown backward 'sharp'"):
        BPDALayer(nn.Identity(), "sharp")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="levels >= 2"):
        BPDALayer(nn.Identity(), "smooth", levels=1)


def test_layers_are_replaced_in_a_copy() -> None:
    model = nn.Sequential(nn.Sequential(Quantise(4), nn.Linear(3, 2)), nn.Tanh())
    before, x = (
        copy.deepcopy(model.state_dict()),
        torch.rand(4, 3, generator=torch.Generator().manual_seed(1)),
    )
    replaced = replace_layers(model, {"0.0": "identity", "1": torch.sin})
    assert (
        torch.equal(replaced(x), model(x))
        and type(model[0][0]) is Quantise
        and isinstance(replaced[0][0], BPDALayer)
    )  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(BadInput, match=r"has no layer '0\.7'; it has 0, 0\.0, 0\.1, 1"):
        replace_layers(model, {"0.7": "identity"})


def test_standardised_inputs_stay_in_native_units() -> None:
    model, x, y = digits(20)
    defended = nn.Sequential(Quantise(8), model)
    own = Classifier(defended, mean=[0.0], std=[1.0])
    problem = Problem.pose(own, x, y, Ball("linf", RADIUS))
    with own.passes.counting() as spent:
        assert broken(BPDA(PGD(), (("0", "identity"),)), problem)[0].sum() >= 15
    assert spent.backwards > 0


# ---- EOT
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [arsenal.Noise(0.25), Shift()], ids=["noise", "resize and shift"])
def test_random_defences_fall_on_fresh_draws(layer: nn.Module) -> None:
    model, x, y = digits(30)
    defended = nn.Sequential(layer, model).eval()
    resists = judged(defended, x, y, 40, seed=77)
    problem = Problem.pose(Classifier(defended, samples=40), x, y, Ball("linf", RADIUS))
    _, plain = broken(PGD(steps=20), problem)
    _, candidate = broken(EOT(PGD(steps=20), samples=10, success_rate=0.5, rounds=2), problem)
    before, once, averaged = (
        resists,
        judged(defended, plain, y, 40, seed=78),
        judged(defended, candidate, y, 40, seed=78),
    )
    assert (averaged >= 0.5).sum() >= (once >= 0.5).sum() + 5
    assert averaged.mean() > once.mean() and averaged.mean() > before.mean() + 0.3


def test_more_votes_are_won_by_a_lead() -> None:
    model, x, y = digits(20)
    defended = nn.Sequential(arsenal.Noise(0.25), model).eval()
    problem = Problem.pose(Classifier(defended, samples=40), x, y, Ball("linf", 0.2))
    shares = [
        judged(
            defended,
            broken(EOT(PGD(steps=15), samples=5, success_rate=votes), problem)[1],
            y,
            60,
            seed=5,
        )
        for votes in (0.3, 0.9)
    ]
    assert shares[1].mean() > shares[0].mean()


def test_each_round_asks_for_a_larger_lead_and_the_best_candidate_is_kept() -> None:
    seen: list[float] = []
    offsets = [0.0, 0.5, 0.2, 0.1]

    def proposes(problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        index = torch.arange(len(problem))
        seen.append(float(problem.goal.margins(torch.zeros(len(problem), 2), problem.y).max()))
        yield Attempt(
            index,
            problem.x + offsets[len(seen) - 1],
            torch.ones_like(index),
            torch.ones_like(index),
        )

    model = nn.Sequential(arsenal.Noise(0.5), nn.Linear(1, 2, bias=False)).eval()
    model[1].weight.data = torch.tensor([[-1.0], [1.0]])
    problem = Problem.pose(
        Classifier(model, samples=1),
        torch.full((6, 1), -0.5),
        torch.zeros(6, dtype=torch.long),
        Ball("linf", 1.0, box=None),
    )
    (attempt,) = EOT(proposes, samples=2, success_rate=1.0)(problem)
    assert seen == [0, 1, 2, 4] and (attempt.candidate == 0).all()


def test_the_average_is_the_average_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(arsenal.Noise(1.0), nn.Linear(6, 3)), torch.rand(5, 6)
    before = torch.get_rng_state()
    answers = torch.stack(list(drawn(model, x, 4, 9)))
    assert len(answers.unique(dim=0)) == 4 and torch.equal(
        answers, torch.stack(list(drawn(model, x, 4, 9)))
    )
    first, second = (
        Averaged(model, 4, seed=1),
        Averaged(model, 4, seed=1, fresh=False, average="logits"),
    )
    assert not torch.equal(first(x), first(x)) and torch.equal(second(x), second(x))
    assert torch.equal(Averaged(model, 4, seed=1)(x), Averaged(model, 4, seed=1)(x))
    averages = {
        of: Averaged(model, 4, seed=1, average=of)
        for of in ("logits", "log_probabilities", "probabilities")
    }  # type: ignore[arg-type]
    answers = torch.stack(list(drawn(model, x, 4, key_of(1, 0))))
    assert torch.allclose(averages["logits"](x), answers.mean(0), atol=1e-6)
    assert torch.allclose(
        averages["log_probabilities"](x), answers.log_softmax(2).mean(0), atol=1e-6
    )
    assert torch.allclose(averages["probabilities"](x), answers.softmax(2).mean(0).log(), atol=1e-6)
    assert torch.allclose(Averaged(model, 4000, seed=1, average="logits")(x), model[1](x), atol=0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_without_chance_is_its_own_average() -> None:
    model, x, y = digits(12)
    assert torch.allclose(Averaged(model, 3)(x), model(x).log_softmax(1), atol=1e-5)
    problem = Problem.pose(model, x, y, Ball("linf", RADIUS))
    assert set(judged(model, x, y, 3, 0).tolist()) == {0.0}
    attack = PGD(steps=20)
    assert (
        broken(EOT(attack, samples=2, rounds=1), problem)[0].sum()
        >= broken(attack, problem)[0].sum() - 1
    )


def test_chance_is_noticed() -> None:
    model, x, _ = digits(3)
    assert not differ(*drawn(model, x, 2, 0))
    assert all(
        differ(*drawn(nn.Sequential(layer, model), x, 2, 0))
        for layer in (arsenal.Noise(1e-3), Shift())
    )


def test_results_repeat_and_passes_are_counted() -> None:
    model, x, y = digits(8)
    defended = nn.Sequential(arsenal.Noise(0.2), model).eval()
    runs = []
    for _ in range(2):
        problem = Problem.pose(Classifier(defended, samples=9), x, y, Ball("linf", RADIUS))
        with problem.classifier.passes.counting() as spent:
            (attempt,) = EOT(PGD(steps=5), samples=3, eval_samples=7, rounds=1)(problem, seed=4)
        runs.append(attempt)
        assert spent.forwards == int(attempt.forwards.sum())
    assert torch.equal(runs[0].candidate, runs[1].candidate) and torch.equal(
        runs[0].forwards, runs[1].forwards
    )


def test_settings_that_make_no_sense_say_so() -> None:
    with pytest.raises(BadInput, match="samples, eval_samples, rounds >= 1"):
        EOT(PGD(), samples=0)
    with pytest.raises(BadInput, match="success_rate in"):
        EOT(PGD(), success_rate=0.0)
    with pytest.raises(BadInput, match="samples >= 1 and average"):
        Averaged(nn.Identity(), 1, average="odds")  # type: ignore[arg-type]


# ---- gradients cut off
# --------------------------------------------------------------------------------------------------


class Stopped(nn.Module):
    """A copy of a net that passes no gradient on, and hands out scores or, as +1 and -1, labels
    alone.
    """

    def __init__(self, net: nn.Module, labels: bool) -> None:
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.net(x.detach())
        return 2.0 * nn.functional.one_hot(z.max(1).indices, z.shape[1]) - 1 if self.labels else z


@pytest.mark.slow
def test_scores_break_a_net_without_gradients_nearly_as_often_as_gradients_do() -> None:
    """Measured: 84 of 100 digits at 3000 queries under each of three seeds, 83 at 5000 under the
    first; 87 by gradients of the net itself.
    """
    model, x, y = digits(100)
    threat = Ball("linf", RADIUS)
    open_, stopped = (
        Problem.pose(model, x, y, threat),
        Problem.pose(Stopped(model, labels=False), x, y, threat),
    )
    reference, blind = (
        broken(PGD(steps=40, restarts=2), open_)[0],
        broken(PGD(steps=40), stopped)[0],
    )
    assert not blind.any() and broken(Square(queries=3000), stopped)[0].sum() >= reference.sum() - 5


def test_labels_alone_break_what_gradients_cannot() -> None:
    """Weaker than gradients by far at this budget: at 3000 queries 49 of 100 digits at an l2 radius
    of 1.5, against 84.
    """
    model, x, y = digits(16)
    stopped = Problem.pose(Stopped(model, labels=True), x, y, Ball("l2", 1.5))
    attempts = list(HopSkipJump(queries=2000)(stopped))
    index, candidate = (
        torch.cat([a.index for a in attempts]),
        torch.cat([a.candidate for a in attempts]),
    )
    part = stopped.take(index)
    wrong = is_adversarial(part.goal.worst(part.margins(part.classifier.logits(candidate))))
    assert (
        not broken(PGD(steps=20), stopped)[0].any()
        and (wrong & part.region.contains(candidate)).sum() >= 3
    )
