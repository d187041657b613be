"""Does every attack answer unusual questions rightly, or say what is wrong with them; in whatever
company; and is what it found kept when it is stopped?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import arsenal
import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers.attacks.pgd import PGD
from calipers.attacks.substitution_search import SubstitutionSearch
from calipers.errors import BadInput, BadModel, CaptureError, UnsupportedOp
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import Referee
from calipers.models.classifier import Classifier
from calipers.models.stochastic import differ
from calipers.models.wrappers import BlackBox
from calipers.presets import ATTACKS, stage_of
from calipers.problem.goals import Targeted, Untargeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.problem.votes import median_worst
from calipers.threats.ball import Ball
from calipers.threats.substitutions import Substitutions, one_hot_groups

F64 = torch.float64
NAMES = sorted(arsenal.arsenal())
ON_BALLS = [name for name in NAMES if arsenal.arsenal()[name][1] != "letters"]
WITHOUT_GRADIENTS = {"Square", "SPSA", "HopSkipJump", "BoundaryAttack"}
ONLY_LABELS = {"HopSkipJump", "BoundaryAttack"}


class Fn(nn.Module):
    """A model made of a function, in float64 or another type."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.function, self.anchor = function, nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def ball(name: str, size: float = 0.2, **settings: Any) -> Ball:
    """Return a ball in the norm that an attack is made for."""
    norm = arsenal.arsenal()[name][1]
    return Ball(norm, 1.0 if norm == "l0" else size, **{"box": (0, 1), **settings})


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(3))


def run(name: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return an attack's candidates, finite and inside box and mask, and which of them the model
    gets wrong.
    """
    candidate, attempts = arsenal.collected(arsenal.arsenal()[name][0], problem)
    region = problem.region
    assert candidate.isfinite().all() and candidate.dtype == problem.x.dtype
    assert region.at(region.distance(candidate)).contains(candidate).all()
    assert all(bool((a.forwards >= 0).all() and (a.backwards >= 0).all()) for a in attempts)
    return candidate, is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits(candidate)))
    )


def first_gradient(unstable: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a model that fools nobody, whose slope in the first feature is that of `unstable`."""
    return Fn(lambda x: torch.stack([5 + 0 * x[:, 0] + unstable(x[:, 0]), x.sum(1)], 1))


# ---- gradients
# --------------------------------------------------------------------------------------------------

BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda z: z * 0,
    # the root's slope at 0 is infinite, and infinity times 0 is NaN
    "NaN": lambda z: (z * 0).abs().sqrt() * 0,
    "infinite": lambda z: (z * 0 + z - z.detach()).clamp_min(0).sqrt(),
    "huge": lambda z: 1e300 * (z - z.detach()),
    "tiny": lambda z: 1e-310 * z,
    "cut": lambda z: z.detach(),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("unstable", BENDS)
@pytest.mark.parametrize("name", ON_BALLS)
def test_no_gradient_spoils_a_candidate(name: str, unstable: str) -> None:
    _, broken = run(
        name,
        Problem.pose(
            first_gradient(BENDS[unstable]), uniform(3, 4) * 0.5 + 0.2, [0] * 3, ball(name, 0.1)
        ),
    )
    assert not broken.any()


@pytest.mark.parametrize("name", ON_BALLS)
def test_a_model_without_any_gradient_is_attacked_by_its_answers(name: str) -> None:
    """Class 1 wins on one side of the middle; nothing tells gradients where that is."""
    model = Fn(
        lambda x: torch.stack([(x.detach().sum(1) - 2) * 3, torch.zeros(len(x), dtype=F64)], 1)
    )
    x = torch.full((3, 4), 0.53, dtype=F64)
    _, broken = run(name, Problem.pose(model, x, [0] * 3, ball(name, 0.2)))
    assert bool(broken.all()) or name not in WITHOUT_GRADIENTS


# ---- sizes and shapes
# --------------------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, *front: nn.Module) -> nn.Module:
    torch.manual_seed(inputs + outputs)
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(inputs, outputs)).double().eval()


SHAPES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "one point": (linear(6, 3), (1, 6)),
    "one feature": (linear(1, 3), (4, 1)),
    "one channel": (linear(1 * 3 * 3, 3, nn.Conv2d(1, 1, 3, padding=1)), (3, 1, 3, 3)),
    "non-square images": (linear(2 * 3 * 5, 3, nn.Conv2d(3, 2, 3)), (3, 3, 5, 7)),
    "a signal": (linear(10, 3), (3, 2, 5)),
    "a volume": (linear(24, 3), (3, 2, 2, 3, 2)),
    "two classes": (linear(6, 2), (4, 6)),
    "three classes": (linear(6, 3), (4, 6)),
    "a single logit": (linear(6, 1), (4, 6)),
    "a single logit without an axis": (Fn(lambda x: x.sum(1) - 3), (4, 6)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ON_BALLS)
def test_shapes_and_sizes_at_the_edge(name: str, shape: str) -> None:
    model, size = SHAPES[shape]
    x = uniform(*size)
    y = Classifier(model).check(x).argmax(1)
    # An attack of few questions need not find the way out; one with gradients moves where there is
    # one.
    problem = Problem.pose(model, x, y, ball(name, 0.9))
    candidate, broken = run(name, problem)
    assert candidate.shape == x.shape and (
        bool(broken.any())
        or name in WITHOUT_GRADIENTS | {"SigmaZero", "FGSM"}
        or not reachable(problem)
    )


def reachable(problem: Problem) -> bool:
    """Does a corner of the box change the answer of any point?"""
    corners = [
        problem.x * 0,
        problem.x * 0 + 1,
        (problem.x > 0.5).to(F64),
        (problem.x < 0.5).to(F64),
    ]
    return any(
        bool((problem.goal.worst(problem.margins(problem.classifier.logits(c))) <= 0).any())
        for c in corners
    )


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 0, 2)])
def test_nothing_to_measure_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="at least one point of at least one feature"):
        Problem.pose(
            linear(4, 3),
            torch.zeros(shape),
            torch.zeros(shape[0], dtype=torch.long),
            Ball("linf", 0.1),
        )


# ---- points
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_points_that_are_wrong_already_are_their_own_examples(name: str) -> None:
    attack, threat = arsenal.arsenal()[name]
    right = arsenal.pose(arsenal.net(threat), threat, n=6)
    wrong = Problem.pose(right.classifier, right.x, (right.y + 1) % 4, right.threat)
    candidate, _ = arsenal.collected(attack, wrong)
    found = calipers.attack(wrong.classifier, wrong.x, wrong.y, wrong.threat, attack)
    assert bool(
        is_adversarial(wrong.goal.worst(wrong.margins(wrong.classifier.logits(candidate)))).all()
    )
    assert bool(found.success.all()) and bool((found.distance <= right.threat.radii(6)).all())


@pytest.mark.parametrize("name", NAMES)
def test_some_wrong_points_change_nothing_for_the_others(name: str) -> None:
    attack, threat = arsenal.arsenal()[name]
    right = arsenal.pose(arsenal.net(threat), threat, n=6)
    mixed = Problem.pose(
        right.classifier,
        right.x,
        torch.where(torch.arange(6) % 2 == 0, right.y, (right.y + 1) % 4),
        right.threat,
    )
    assert torch.equal(
        arsenal.collected(attack, mixed)[0][::2],
        arsenal.collected(attack, right.take([0, 2, 4]))[0],
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_radius_of_zero_among_others(name: str) -> None:
    """A point with no room is never broken at its radius, and the others do not notice."""
    attack, threat = arsenal.arsenal()[name]
    problem = arsenal.pose(arsenal.net(threat), threat, n=6)
    radius = problem.threat.radii(6) * (torch.arange(6) % 2)
    some = problem.at(radius)
    found = calipers.attack(some.classifier, some.x, some.y, some.threat, attack)
    assert not found.success[::2].any() and found.candidates.isfinite().all()
    alone = problem.take([1, 3, 5])
    assert torch.equal(found.candidates[1::2], arsenal.collected(attack, alone)[0])


@pytest.mark.parametrize("name", ON_BALLS)
def test_a_target_is_met_by_its_own_class_and_never_the_label(name: str) -> None:
    _, threat = arsenal.arsenal()[name]
    right = arsenal.pose(arsenal.net(threat), threat, n=6, size=3)
    target = (right.y + 1) % 4
    aimed = Problem.pose(right.classifier, right.x, right.y, right.threat, Targeted(target))
    candidate, broken = run(name, aimed)
    logits = right.classifier.logits(candidate)
    # a tie is met
    assert torch.equal(broken, logits.gather(1, target[:, None])[:, 0] == logits.amax(1))
    target[2] = right.y[2]
    with pytest.raises(
        BadInput, match=r"the target equals the label at 1 points \(first: point 2\)"
    ):
        Problem.pose(right.classifier, right.x, right.y, right.threat, Targeted(target))


# ---- models that change their minds
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_BALLS)
def test_a_model_that_answers_in_turns_ends_and_nothing_false_is_admitted(name: str) -> None:
    """Labels that flip between calls, whatever the point: an attack must end, and a referee that
    asks three times hears no agreement.
    """
    calls, moods = list[int](), list[str]()

    def moody(x: Any) -> Any:
        calls.append(len(x))
        return [len(calls) % 2 if moods else 0] * len(x)

    problem = Problem.pose(
        BlackBox(moody, "labels", classes=2, dtype=F64), uniform(4, 6), [0] * 4, ball(name)
    )
    moods.append("after the door")
    attempts = list(arsenal.arsenal()[name][0](problem))
    ruling = Referee(problem).attempt(attempts[0], torch.arange(4), "moody", 0.0)
    assert not ruling.evidence


def noisy(size: float = 0.3) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a random model of one feature: class 1 above 0.5, seen through noise; and points of
    class 0 at 0.1, 0.3, 0.45.
    """
    model = nn.Sequential(
        arsenal.Noise(size), Fn(lambda x: torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], 1))
    )
    return model, torch.tensor([[0.1], [0.3], [0.45]], dtype=F64), torch.zeros(3, dtype=torch.long)


def test_an_undeclared_random_model_is_refused_in_words() -> None:
    model, x, y = noisy()
    with pytest.raises(
        BadModel,
        match=r"answers differently when it is asked twice.*Classifier\(model, samples=100\)",
    ):
        Problem.pose(model, x, y, Ball("linf", 0.1))
    with pytest.raises(BadModel, match="samples is the number of draws"):
        Classifier(model, samples=-1)
    assert len(Problem.pose(Classifier(model, samples=5), x, y, Ball("linf", 0.1))) == 3


def test_answers_of_another_order_of_summation_are_no_chance() -> None:
    z = torch.tensor([[100.0, 1e-6, -3.0]])
    assert (
        not differ(z, z + 1e-5)
        and differ(z, z + 1e-2)
        and differ(z, z.flip(1))
        and not differ(z * torch.nan, z * torch.nan)
    )


def test_a_witness_against_a_random_model_fools_at_least_half_of_fresh_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 0.46 under noise of 0.3 four draws in nine are fooled, at 0.2 one in six: one lucky pass
    would admit them, the draws do not.
    """
    model, x, y = noisy()
    problem = Problem.pose(Classifier(model, samples=400), x, y, Ball("linf", 0.45))

    def admitted(points: list[float]) -> list[bool]:
        attempt = calipers.problem.protocols.Attempt(
            torch.arange(3),
            torch.tensor(points, dtype=F64)[:, None],
            *(torch.zeros(3, dtype=torch.long),) * 2,
        )
        witnesses = {
            e.point
            for e in Referee(problem).attempt(attempt, torch.arange(3), "by hand", 0.0).evidence
        }
        return [name in witnesses for name in problem.names]

    assert admitted([0.2, 0.35, 0.46]) == [False] * 3
    assert admitted([0.54, 0.55, 0.6]) == [True] * 3
    monkeypatch.setattr(
        "calipers.measurement.referee.median_worst",
        lambda answers, y, goal: median_worst(answers[:1], y, goal),
    )
    lucky = [admitted([0.2 + 0.01 * k, 0.35 + 0.005 * k, 0.46]) for k in range(8)]
    assert any(map(any, lucky))  # where one pass decides, some of these points get in


def test_the_median_of_the_draws_decides_ties_against_the_model() -> None:
    def worst(*margins: float) -> float:
        answers = torch.tensor(margins, dtype=F64)[:, None, None] * torch.tensor(
            [1.0, 0.0], dtype=F64
        )
        return float(median_worst(answers, torch.tensor([0]), Untargeted()))

    assert (
        worst(1, -1) == -1
        and worst(1, 2, -1) == 1
        and worst(1, 2, -1, -3) == -1
        and worst(3, 2, 1, -1) == 1
    )
    assert worst(1, 2, float("nan")) != worst(1, 2, float("nan"))


def test_a_declared_random_model_is_measured_alike_whatever_was_drawn_before() -> None:
    model, x, y = noisy()
    plan = Plan(
        "both",
        (
            Stage(PGD(steps=5), "attack"),
            Stage(calipers.attacks.EOT(PGD(steps=10), samples=8), "attack"),
            Stage(calipers.certificates.CROWN(), "certifier"),
        ),
    )
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(
            calipers.measure(
                Classifier(model, samples=200), x, y, Ball("linf", 0.25, box=None), plan=plan
            )
        )
    assert [row.verdict for row in results[0].points] == ["unknown", "broken", "broken"]
    assert [row.upper for row in results[0].points] == [row.upper for row in results[1].points]
    assert all(row.lower == 0 for row in results[0].points)
    assert all(
        checked.sound
        for checked in calipers.check(results[0].ledger, Classifier(model, samples=200))
    )


def test_nothing_is_certified_about_a_random_model() -> None:
    model, x, y = noisy()
    with pytest.raises((UnsupportedOp, CaptureError)):
        calipers.certify(
            Classifier(model, samples=5), x, y, Ball("linf", 0.1), calipers.certificates.CROWN()
        )
    still = Problem.pose(
        Classifier(linear(6, 3), samples=5), uniform(2, 6), [0, 0], Ball("linf", 0.1)
    )
    none = torch.zeros(2, dtype=torch.long)
    claim = calipers.problem.protocols.Claim(
        torch.arange(2), torch.full((2,), 0.1), torch.ones(2), "real", none, none
    )
    with pytest.raises(UnsupportedOp, match="answers at random"):
        Referee(still).claim(claim, torch.arange(2), "by hand", 0.0, 0)


def test_the_number_of_draws_is_part_of_the_models_identity() -> None:
    model = linear(6, 3)
    assert len({Classifier(model, samples=n).digest() for n in (0, 5, 50)}) == 3


# ---- company
# --------------------------------------------------------------------------------------------------


def within(monkeypatch: pytest.MonkeyPatch, batch: int, attack: Attack, problem: Problem) -> Tensor:
    """Return the candidates found with so many points in flight."""
    with monkeypatch.context() as patch:
        for place in (
            "engine.queue.BATCH",
            "engine.query_loop.BATCH",
            "apgd.BATCH",
            "substitution_search._POINTS",
        ):
            patch.setattr(f"calipers.attacks.{place}", batch)
        return arsenal.collected(attack, problem, seed=4)[0]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NAMES)
def test_batch_size_order_and_shards_do_not_matter_bit_for_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, threat = arsenal.arsenal()[name]
    problem = arsenal.pose(arsenal.net(threat), threat, n=19)
    whole = within(monkeypatch, 256, attack, problem)
    assert torch.equal(within(monkeypatch, 7, attack, problem), whole)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(8))
    assert torch.equal(within(monkeypatch, 7, attack, problem.take(order)), whole[order])
    # Devices and machines each take a shard: what they find together is what one finds.
    shards = [problem.take(range(k, 19, 3)) for k in range(3)]
    joined = torch.empty_like(whole)
    for k, shard in enumerate(shards):
        joined[k::3] = within(monkeypatch, 256, attack, shard)
    assert torch.equal(joined, whole)


def test_a_draw_that_hangs_on_the_place_in_the_batch_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_place(self: Problem, seed: int) -> Any:
        return calipers.random_streams.Streams.of(
            seed, [str(i) for i in range(len(self))], self.x.device
        )

    monkeypatch.setattr(Problem, "streams", by_place)
    with pytest.raises(AssertionError):
        test_batch_size_order_and_shards_do_not_matter_bit_for_bit("APGD", monkeypatch)


# ---- interrupts
# --------------------------------------------------------------------------------------------------


class Fuse(arsenal.RowWise):
    """Raises KeyboardInterrupt once, after so many calls: of the class, as some attacks work on
    copies.
    """

    left = 0

    def forward(self, x: Tensor) -> Tensor:
        Fuse.left -= 1
        if Fuse.left == 0:
            raise KeyboardInterrupt
        return super().forward(x)


def calls_of(attack: Attack, problem: Problem) -> int:
    """Return how many calls of the model a whole run takes."""
    Fuse.left = 0
    list(attack(problem))
    return -Fuse.left


def listen(attack: Attack, problem: Problem, found: set[str]) -> None:
    """Run an attack, and note the points of its witnesses as they come."""
    for attempt in attack(problem):
        found |= {
            e.point
            for e in Referee(problem)
            .attempt(attempt, torch.arange(len(problem)), repr(attack), 0.0)
            .evidence
        }


LAST_CALL = {"SubstitutionSearch", "FGSM"}  # they find what they find there


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LAST_CALL])
def test_an_interrupt_keeps_what_was_found(name: str) -> None:
    """On the way some points are broken and some are not: the attack hands over the former, and
    then passes the interrupt on.
    """
    attack, threat = arsenal.arsenal()[name]
    problem = arsenal.pose(Fuse().eval(), threat, n=16)
    whole = calls_of(attack, problem)
    most: set[str] = set()
    for share in torch.linspace(0.1, 0.95, 10).tolist():
        Fuse.left = max(2, int(share * whole))
        found: set[str] = set()
        with pytest.raises(KeyboardInterrupt):
            listen(attack, problem, found)
        most = max(most, found, key=len)
    assert most, f"{whole} calls"


@pytest.mark.parametrize(
    "attack", [SubstitutionSearch(search="greedy"), SubstitutionSearch(nearest=True)], ids=repr
)
def test_an_interrupt_among_the_symbols_keeps_what_was_found(attack: SubstitutionSearch) -> None:
    model = Fuse(inputs=30).eval()
    x = (
        nn.functional.one_hot(
            torch.randint(3, (16, 10), generator=torch.Generator().manual_seed(1)), 3
        )
        .flatten(1)
        .to(arsenal.F64)
    )
    problem = Problem.pose(model, x, model(x).argmax(1), Substitutions(one_hot_groups(10, 3), k=4))
    kept = []
    for left in range(2, calls_of(attack, problem)):
        Fuse.left = left
        found: set[str] = set()
        with pytest.raises(KeyboardInterrupt):
            listen(attack, problem, found)
        kept.append(len(found))
    assert kept[0] < kept[-1] and kept == sorted(kept)


@pytest.mark.parametrize(
    ("name", "share"), [("PGD", 0.9), ("APGD, targets", 0.9), ("Square", 0.9), ("FMN", 0.2)]
)
def test_an_interrupted_measurement_holds_its_witnesses(name: str, share: float) -> None:
    attack, threat = arsenal.arsenal()[name]
    model = Fuse().eval()
    problem = arsenal.pose(model, threat, n=16)
    whole = calls_of(attack, problem)
    plan = Plan("one", (stage_of(attack),))
    Fuse.left = 12 + 3 + int(share * whole)  # the door's and the opening's calls come first
    result = calipers.measure(model, problem.x, problem.y, problem.threat, plan=plan)
    assert not result.finished and sum(row.verdict == "broken" for row in result.points) > 0
    again = calipers.measure(
        model, problem.x, problem.y, problem.threat, plan=plan, record=result.ledger
    )
    fresh = calipers.measure(model, problem.x, problem.y, problem.threat, plan=plan)
    assert again.finished and [r.verdict for r in again.points] == [r.verdict for r in fresh.points]


def test_every_attack_of_the_table_is_tried_here() -> None:
    assert set(ATTACKS) - set(NAMES) <= {"Transfer"}
