"""Would a mistake that published attack code has made be noticed here? Each one is planted, and the
check that passes without it has to fail with it.

Further ones stand beside what they are about: a projection that forgets the radius, estimates and
gradients normalised over the whole batch (test_minimum_norm.py, test_black_box.py,
test_attacks.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arsenal
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers.attacks.apgd import APGD, Climb
from calipers.attacks.engine.queue import Look, Queue
from calipers.attacks.fab import FAB
from calipers.attacks.pgd import PGD
from calipers.attacks.square import Square
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import CLEAN, Referee
from calipers.models.classifier import Classifier
from calipers.presets import ATTACKS, PLANS
from calipers.problem.goals import Untargeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.record.record import Record
from calipers.report.distances import Curve, curve_of
from calipers.threats import norms
from calipers.threats.ball import Ball

F64 = torch.float64
ONE = Plan("one", (Stage(PGD(steps=10, restarts=2), "attack"),))


def noticed(check: Callable[[], None]) -> None:
    """Raise unless the check fails: the planted bug has to show."""
    with pytest.raises(AssertionError):
        check()


class Fn(nn.Module):
    """A model made of a function, in float64."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.anchor = function, nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# ---- a well-known name for another set of attacks
# --------------------------------------------------------------------------------------------------


def resisting(classes: int = 10) -> Problem:
    """Return a point that no attack breaks, so that each spends its whole budget."""
    model = Fn(
        lambda x: torch.cat([x.sum(1, keepdim=True) + 100, x.repeat(1, 3)[:, : classes - 1]], 1)
    )
    return Problem.pose(
        model, torch.full((1, 4), 0.5, dtype=F64), [0], Ball("linf", 0.1, box=(0, 1))
    )


def test_autoattack_is_the_four_attacks_of_its_paper_at_full_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library's attack of this name runs 10 iterations instead of 100, and rescales the square
    search; another's replaces two of the four.
    """

    def check() -> None:
        tools = [stage.tool for stage in PLANS["autoattack"].stages]
        assert [type(tool) for tool in tools] == [APGD, APGD, FAB, Square]
        entropy, rivals, boundary, squares = tools
        assert (entropy.loss, entropy.targets, rivals.targets, boundary.targets) == (
            "cross_entropy",
            0,
            9,
            9,
        )  # type: ignore[union-attr]
        assert (squares.queries, squares.p, squares.rescale) == (5000, 0.8, False)  # type: ignore[union-attr]
        problem = resisting()
        spent = [int(next(iter(tool(problem))).backwards) for tool in (entropy, rivals)]  # type: ignore[call-arg, arg-type, union-attr]
        # a ranking of nine other classes, and for each 100 moves and a last look
        assert spent == [101, 9 + 9 * 101]
        assert int(next(iter(boundary(problem))).backwards) >= 900  # type: ignore[call-arg, arg-type, union-attr]

    def planted(**changes: dict[str, Any]) -> Plan:
        stages = [
            dataclasses.replace(
                s, tool=dataclasses.replace(s.tool, **changes.get(type(s.tool).__name__, {}))
            )
            for s in true.stages
        ]  # type: ignore[type-var]
        return dataclasses.replace(true, stages=tuple(stages))

    true = PLANS["autoattack"]
    check()
    for bug in (
        planted(APGD={"steps": 10}),
        planted(FAB={"steps": 10}),
        planted(Square={"queries": 500}),
        planted(Square={"rescale": True}),
        dataclasses.replace(true, stages=(true.stages[0], true.stages[0], *true.stages[2:])),
    ):
        monkeypatch.setitem(PLANS, "autoattack", bug)
        noticed(check)


def test_a_step_is_halved_by_falls_from_the_last_loss_not_from_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After one bad start the loss climbs at every step, but stays below the start: that is
    progress. A known bug counts new records only.
    """
    region = Ball("linf", 1.0, box=None).region(torch.zeros(1, 3, dtype=F64))

    def share_at_the_first_checkpoint() -> float:
        x, recipe = region.center, Climb(100, 1, 0, "margin")
        memory = recipe.memory(region, x)
        for step in range(23):
            loss = torch.tensor([10.0 if step == 0 else 0.1 * step], dtype=F64)
            none = torch.zeros(1, dtype=F64)
            look = Look(region, x, torch.ones_like(x), loss, none, torch.tensor([step]), x, none)
            x, memory = recipe.move(look, memory)
        return float(memory["share"])

    def check() -> None:
        # the first step is twice the radius, and stays
        assert share_at_the_first_checkpoint() == 2.0

    check()
    true = Climb._control

    def records_only(self: Climb, look: Look, m: dict[str, Tensor]) -> Tensor:
        m["rises"] = torch.where(look.loss >= m["peak"], m["rises"], (m["rises"] - 1).clamp_min(0))
        return true(self, look, m)

    with monkeypatch.context() as bug:
        bug.setattr(Climb, "_control", records_only)
        noticed(check)
    # another known bug: a first step of one radius, not two
    monkeypatch.setattr(Climb.__init__, "__defaults__", (1.0, False))
    noticed(check)


# ---- what counts, and what comes back
# --------------------------------------------------------------------------------------------------


def test_a_targeted_search_takes_any_wrong_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way to class 1, which is never reached, class 2 wins. A known bug throws that point
    away.
    """
    model = Fn(
        lambda x: torch.stack(
            [torch.zeros_like(x[:, 0]), -0.02 - 0.1 * (-8 * x[:, 0]).exp(), x[:, 0] - 0.5], 1
        )
    )
    problem = Problem.pose(model, torch.zeros(1, 2, dtype=F64), [0], Ball("linf", 0.8))

    def check() -> None:
        for attack in (APGD(steps=20, targets=1), PGD(steps=20, targets=1)):
            candidate, attempts = arsenal.collected(attack, problem)
            # a success ends the search
            assert float(candidate[0, 0]) >= 0.5 and int(attempts[0].forwards) <= 20

    check()
    monkeypatch.setattr(Untargeted, "worst", lambda self, margins: margins[:, 0])
    noticed(check)


def test_the_best_iterate_comes_back_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps overshoot a narrow valley, so the last iterate is worse than the best."""
    asked: list[Tensor] = []

    def valley(x: Tensor) -> Tensor:
        asked.append(x.detach())
        return torch.stack([1 + (x[:, 0] - 0.3).abs(), 0 * x[:, 0]], 1)

    problem = Problem.pose(
        Fn(valley), torch.zeros(1, 2, dtype=F64), [0], Ball("linf", 1.0, box=None)
    )

    def check() -> None:
        for attack in (PGD(steps=7, step=0.4), APGD(steps=7)):
            asked.clear()
            candidate, _ = arsenal.collected(attack, problem)
            assert (
                float((candidate[0, 0] - 0.3).abs())
                <= float((torch.cat(asked)[:, 0] - 0.3).abs().min()) + 1e-9
            )

    check()
    monkeypatch.setattr(Queue, "_keep", arsenal.keep_last)
    noticed(check)


def test_the_l1_projection_is_the_nearest_point_of_ball_and_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The nearest point p to y is the one where no admissible point lies further along y - p. A
    known bug scales y into the ball and cuts it to the box.
    """
    region = Ball("l1", 1.3, box=(0, 1)).region(
        torch.rand(40, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    )
    y = region.center + torch.randn(40, 9, dtype=F64, generator=torch.Generator().manual_seed(1))

    def check() -> None:
        p = region.project(y)
        assert bool((region.distance(p) <= 1.3 + 1e-12).all()) and bool(((p >= 0) & (p <= 1)).all())
        gained = region.offset_support(y - p)[0] - ((y - p) * (p - region.center)).sum(1)
        assert float(gained.max()) <= 1e-9

    def radial(
        self: Any, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Tensor:
        scaled = delta * (radius / delta.abs().sum(1)).clamp(max=1)[:, None]
        return torch.minimum(torch.maximum(scaled, low), high)

    check()
    monkeypatch.setattr(norms.L1, "project", radial)
    noticed(check)


def images(n: int = 30) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small trained-looking net in float32 and points it gets right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4)).eval()
    x = torch.rand(n, 16, generator=torch.Generator().manual_seed(2))
    return model, x, model(x).argmax(1)


def test_a_witness_is_recorded_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known bug stores examples as bytes by truncation, which moves each value by up to 1/255 and
    loses some of them.
    """
    model, x, y = images()
    problem = Problem.pose(model, x, y, Ball("linf", 0.05))
    candidate, _ = arsenal.collected(ONE.stages[0].tool, problem)  # type: ignore[arg-type]
    broken = is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits(candidate)))
    )
    assert 5 < int(broken.sum()) < len(x)

    def check() -> None:
        result = calipers.measure(model, x, y, Ball("linf", 0.05), plan=ONE)
        name = result.summary.question.fingerprint
        stored = {
            e.point: result.ledger.witness(name, e)
            for e in result.ledger.evidence(name)
            if e.kind == "witness"
        }
        assert set(stored) == {problem.names[i] for i in torch.nonzero(broken).flatten().tolist()}
        assert all(
            np.array_equal(stored[problem.names[i]], candidate[i].numpy())
            for i in torch.nonzero(broken).flatten().tolist()
        )  # type: ignore[arg-type]

    def in_bytes(self: Referee, attempt: Attempt, *rest: Any) -> Any:
        return true(
            self,
            dataclasses.replace(attempt, candidate=(attempt.candidate * 255).to(torch.uint8) / 255),
            *rest,
        )

    check()
    true = Referee.attempt
    monkeypatch.setattr(Referee, "attempt", in_bytes)
    noticed(check)


def test_a_resumed_run_still_holds_the_examples_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A known bug keeps only flags: after resuming, the "examples" of points broken earlier are the
    clean inputs.
    """
    model, x, y = images()
    threat = Ball("linf", 0.05)

    def check() -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.calipers"
        calipers.measure(model, x, y, threat, plan=ONE, record=path)
        resumed = calipers.measure(
            model, x, y, threat, plan=dataclasses.replace(ONE, name="again"), record=path
        )
        assert 5 < sum(row.verdict == "broken" for row in resumed.points) < len(x)
        name, ledger = resumed.summary.question.fingerprint, Record(path, read_only=True)
        clean = {p.name: p for p in ledger.points(name)}
        for fact in ledger.evidence(name):
            if fact.kind == "witness" and fact.tool != CLEAN:
                array = ledger.witness(name, fact)
                assert array is not None and not np.array_equal(array, clean[fact.point].array)
                assert int(model(torch.as_tensor(array)[None]).argmax()) != clean[fact.point].label

    def flags_only(self: Record, name: str, facts: Any, *, run: int = 0) -> None:
        true(self, name, [dataclasses.replace(f, array=None) for f in facts], run=run)

    check()
    true = Record.append
    monkeypatch.setattr(Record, "append", flags_only)
    noticed(check)


def test_robust_accuracy_over_the_radius_is_a_step_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two distances nothing changes. A known metric joins the steps by slanted lines, and
    gives credit to an attack that found nothing.
    """
    upper = np.array([0.1, 0.3, np.inf, np.inf])
    seen = np.ones(4, dtype=bool)

    def check() -> None:
        curve = curve_of(np.zeros(4), upper, seen, 1.0, 0.95)
        assert [curve.at(r)[1] for r in (0.0, 0.0999, 0.1, 0.2, 0.2999, 0.3, 0.9)] == [
            1,
            1,
            0.75,
            0.75,
            0.75,
            0.5,
            0.5,
        ]
        # one clean error, nothing found
        failed = curve_of(np.zeros(4), np.array([0.0, np.inf, np.inf, np.inf]), seen, 1.0, 0.95)
        assert [failed.at(r)[1] for r in (0.0, 0.3, 0.7, 1.0)] == [0.75] * 4

    check()
    monkeypatch.setattr(
        Curve, "at", lambda self, r: (0.0, float(np.interp(r, self.radii, self.attacked)))
    )
    noticed(check)


# ---- left as it was: by every attack, to its end and interrupted
# -----------------------------------------------------------------------------------


def footprint(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model and the process that an attack has no business to change."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
    )
    return {
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "weights": [t.clone().tolist() for t in model.state_dict().values()],
        "hooks": [sorted(getattr(m, kind)) for m in model.modules() for kind in hooks],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "tracer": sys.gettrace(),
        "profiler": sys.getprofile(),
        "dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


class Fuse(arsenal.RowWise):
    """Raises once, in the middle of an attack, as a user's Ctrl-C or a failing allocation does."""

    left = 0  # calls; of the class, as some attacks work on copies
    error: type[BaseException] = KeyboardInterrupt

    def forward(self, x: Tensor) -> Tensor:
        Fuse.left -= 1
        if Fuse.left == 0:
            raise Fuse.error
        return super().forward(x)


def used(threat: str) -> Fuse:
    """Return a model as a fine-tuning user has it: parts in different modes, some weights frozen, a
    hook of the user's own.
    """
    model = Fuse().eval()
    model.training = True
    torch.manual_seed(77)
    model.first.requires_grad_(False)
    model.register_forward_hook(lambda module, inputs, output: None)
    return model


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Run under a tracer, as under a debugger or a coverage tool; theirs is put back."""
    before = sys.gettrace()
    sys.settrace(lambda *event: None)
    try:
        yield
    finally:
        sys.settrace(before)


def assert_nothing_left_behind(
    name: str, after: int = 0, error: type[BaseException] = KeyboardInterrupt
) -> None:
    """Run an attack, cut short after so many calls of the model, and compare."""
    attack, threat = arsenal.arsenal()[name]
    model = used(threat)
    with traced():
        before = footprint(model)
        problem = arsenal.pose(model, threat, n=4, size=0.1)
        Fuse.left, Fuse.error = after, error
        stopped = contextlib.suppress(error) if after else contextlib.nullcontext()
        with stopped:
            list(attack(problem))
        assert not after or Fuse.left <= 0, "the attack ended before it was interrupted"
        found = footprint(model)
    different = [key for key in before if before[key] != found[key]]
    assert not different, different


NAMES = sorted(arsenal.arsenal())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(name: str) -> None:
    assert_nothing_left_behind(name)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind_after_an_exception(name: str, error: type[BaseException]) -> None:
    assert_nothing_left_behind(name, after=2, error=error)


@contextlib.contextmanager
def _root_to_train(self: Classifier) -> Iterator[None]:
    self.module.eval()
    yield
    self.module.train()


@contextlib.contextmanager
def _tracer_cleared(self: Classifier) -> Iterator[None]:
    with _TRUE(self):
        sys.settrace(None)
        yield


@contextlib.contextmanager
def _hooks_left(self: Classifier) -> Iterator[None]:
    with _TRUE(self):
        self.module.register_forward_hook(lambda module, inputs, output: None)
        yield


@contextlib.contextmanager
def _seeds_everybody(self: Classifier) -> Iterator[None]:
    torch.manual_seed(0)
    with _TRUE(self):
        yield


@contextlib.contextmanager
def _forgets_on_errors(self: Classifier) -> Iterator[None]:
    modes = [(m, m.training) for m in self.module.modules()]
    self.module.eval()
    yield
    for module, mode in modes:
        module.training = mode


_TRUE = Classifier.frozen


@pytest.mark.parametrize("bug", [_root_to_train, _tracer_cleared, _hooks_left, _seeds_everybody])
def test_mutants_that_leave_something_behind_are_caught(
    bug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known bugs: training mode for the whole model at the end, a debugger's tracer cleared, hooks
    that stay, everybody's generator seeded.
    """
    arsenal.arsenal()
    monkeypatch.setattr(Classifier, "frozen", bug)
    noticed(lambda: assert_nothing_left_behind("PGD"))


def test_mutant_that_restores_only_where_all_goes_well_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arsenal.arsenal()
    assert_nothing_left_behind("PGD", after=3)
    monkeypatch.setattr(Classifier, "frozen", _forgets_on_errors)
    noticed(lambda: assert_nothing_left_behind("PGD", after=3))


def test_a_whole_measurement_leaves_no_hooks_and_keeps_the_tracer() -> None:
    model = used("linf")
    x = arsenal.points()
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    with traced():
        before = footprint(model)
        calipers.measure(model, x, y, Ball("linf", 0.05), plan="quick")
        found = footprint(model)
    assert [key for key in before if before[key] != found[key]] == []


def test_the_arsenal_is_the_whole_table() -> None:
    """What cannot be made small here would escape every test above."""
    assert set(ATTACKS) - set(arsenal.arsenal()) <= {"Transfer"}
