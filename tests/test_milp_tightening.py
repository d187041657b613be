"""Do values lie between tightened ends wherever the network fails, and are distances exact that are
searched case by case? Against samples and enumeration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from test_milp import (
    ACTIVATIONS,
    against_enumeration,
    asked,
    by_enumeration,
    exact,
    perceptron,
    wrong_somewhere,
)
from test_milp_trust import LIES

from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import CHECKED
from calipers.certificates import milp as milp_module
from calipers.certificates.alpha_crown import Start
from calipers.certificates.exact import bound_tightening, lp
from calipers.certificates.exact.bound_tightening import tightened
from calipers.certificates.exact.encoding import encoded
from calipers.certificates.exact.tree import MultiplierBound, Tree
from calipers.certificates.milp import MILP

WIDTHS = (3, 4, 3, 3)


@pytest.fixture
def by_case(monkeypatch: pytest.MonkeyPatch) -> list[Relaxed | None]:
    """Every case that one program does not settle is tightened; returns what came of it."""
    made = list[Relaxed | None]()

    def noted(*args: object) -> Relaxed | None:
        made.append(tightened(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(milp_module, "tightened", noted)
    monkeypatch.setattr(milp_module, "_TIGHTENED", 0)
    monkeypatch.setattr(milp_module, "_MANY", 10**6)
    monkeypatch.setattr(milp_module, "_FEWER", np.inf)
    monkeypatch.setattr(Tree, "wide", property(lambda _: False))
    monkeypatch.setattr(
        MILP.__init__,
        "__defaults__",
        tuple(1 if d == 600 else d for d in MILP.__init__.__defaults__ or ()),
    )
    assert MILP().lp_budget == 1
    return made


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name not in ("relu", "clip") else [])
        for name in ACTIVATIONS
    ],
)
def test_enumeration_case_by_case(norm: str, name: str, by_case: list[Relaxed | None]) -> None:
    for seed in (6, 8, 9):
        against_enumeration(norm, name, seed, widths=(3, 3, 3) if name == "clip" else (3, 3, 2, 3))
    assert by_case


def cases_of(
    seed: int, norm: str, name: str = "relu"
) -> list[tuple[Relaxed, Relaxed | None, torch.Tensor]]:
    """Return for each open case of a small network: the relaxation, the tightened one, and sampled
    points at which it fails.
    """
    problem = asked(perceptron(seed, ACTIVATIONS[name][0], WIDTHS), seed, 3, norm)
    radius, found = 0.6 if norm == "linf" else 0.9, []
    with torch.no_grad():
        part = problem.at(radius)
        start = Start.tightened(part, CHECKED, steps=2, intermediate=0)
        if start.root is None:
            return []
        points = samples(part, 4000, seed)
        margins = problem.goal.margins(
            problem.classifier.logits64(points), problem.y.expand(len(points))
        )
        for case in torch.nonzero(~(start.case_bounds[0] > 0)).flatten().tolist():
            rows = encoded(start.root.state, start.spec[0], start.offsets[0], {case: [case]})
            state = tightened(start.root.state, rows, radius, np.inf)
            found.append((start.root.state, state, points[margins[:, case] <= 0]))
    return found


def samples(problem: object, count: int, seed: int) -> torch.Tensor:
    """Return points of the ball: its inside, and its corners."""
    draw = torch.Generator().manual_seed(seed)
    region = problem.region  # type: ignore[attr-defined]
    delta = torch.rand(count, region.center.shape[1], generator=draw, dtype=torch.float64) * 2 - 1
    delta[count // 2 :] = torch.where(
        delta[count // 2 :].abs() > 0.3, delta[count // 2 :].sign(), 0.0
    )
    delta = (
        delta
        * float(region.radius)
        / (1 if region.norm.is_box else delta.abs().sum(1, keepdim=True).clamp(min=1))
    )
    return torch.minimum(
        torch.maximum(region.center + delta, region.center + region.low),
        region.center + region.high,
    )


def check_ends(norm: str, name: str = "relu", seeds: Sequence[int] = range(12)) -> None:
    """No value of a point that fails lies outside, and no case is ruled out that has such a point;
    some boxes are much smaller.
    """
    failing, narrow = 0, 1.0
    for seed in seeds:
        for before, after, points in cases_of(seed, norm, name):
            failing += len(points)
            assert after is not None or not len(points)
            if after is None:
                continue
            values = before.graph.values(points)
            for number, box in after.boxes.items():
                assert bool(
                    (
                        (values[number] >= box.lower - 1e-12)
                        & (values[number] <= box.upper + 1e-12)
                    ).all()
                )
                old = before.boxes[number]
                assert bool(((box.lower >= old.lower) & (box.upper <= old.upper)).all())
                narrow = min(
                    narrow,
                    float(
                        ((box.upper - box.lower) / (old.upper - old.lower).clamp(min=1e-9)).min()
                    ),
                )
    assert failing > 100 and narrow < 0.9


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("name", ["relu", "clip"])
def test_values_of_points_that_fail_lie_between_the_ends(norm: str, name: str) -> None:
    check_ends(norm, name)


def _higher(
    below: Callable[[MultiplierBound, float], float],
) -> Callable[[MultiplierBound, float], float]:
    return lambda self, radius: below(self, radius) + 0.05


class _Stronger(bound_tightening.Ends):
    """The condition asks for more than that the case fails."""

    def __new__(
        cls, low_row: np.ndarray, high_row: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> _Stronger:
        """Move every upper end, that of the case's margin among them."""
        return super().__new__(cls, low_row, high_row, low, high - 0.2)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "ends higher than proved": lambda m: m.setattr(
        MultiplierBound, "below", _higher(MultiplierBound.below)
    ),
    "a condition that is too strong": lambda m: m.setattr(bound_tightening, "Ends", _Stronger),
    "the wrong sign": lambda m: m.setattr(
        bound_tightening, "bound_of", _turned(bound_tightening.bound_of)
    ),
}


def _turned(bound_of: Callable[..., MultiplierBound]) -> Callable[..., MultiplierBound]:
    """What is proved of a value passes for a bound of its negative."""
    return lambda model, answer, *args: bound_of(
        model, answer._replace(sign=-answer.sign, multipliers=-answer.multipliers), *args
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_tightening_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_ends("linf", seeds=range(8))
    MISTAKES[name](monkeypatch)
    assert wrong_somewhere(lambda: check_ends("linf", seeds=range(8)))


@pytest.mark.parametrize("name", LIES)
def test_a_lying_solver_cannot_tighten_too_much(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lp.BallPrograms.solve

    def lying(self: lp.BallPrograms, *args: object, **more: object) -> lp.Answer | None:
        answer = real(self, *args, **more)  # type: ignore[arg-type]
        return None if answer is None else LIES[name](answer)

    monkeypatch.setattr(lp.BallPrograms, "solve", lying)
    for seed in range(8):
        for before, after, points in cases_of(seed, "linf"):
            assert after is not None or not len(points)
            for number, box in ({} if after is None else after.boxes).items():
                values = before.graph.values(points)[number]
                assert bool(((values >= box.lower - 1e-12) & (values <= box.upper + 1e-12)).all())


def test_without_time_nothing_is_tightened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        globals(), "tightened", lambda *args: tightened_at_once(*args[:-1], -np.inf)
    )
    for before, after, _ in cases_of(8, "linf"):
        assert after is not None
        assert all(
            torch.equal(box.lower, before.boxes[k].lower)
            and torch.equal(box.upper, before.boxes[k].upper)
            for k, box in after.boxes.items()
        )


tightened_at_once = tightened


def test_the_search_goes_on_after_a_case(by_case: list[Relaxed | None]) -> None:
    """Two features, three classes: both cases have an example, so the nearer one of the second is
    met after the first is done.
    """
    for seed in range(4):
        activation, pieces = ACTIVATIONS["relu"]
        model = perceptron(seed, activation, WIDTHS)
        problem = asked(model, seed, 3, "linf")
        truth = by_enumeration(model, pieces, problem)
        (found,) = exact(problem)
        assert found.lower <= truth <= found.upper * (1 + 1e-12) and found.lower >= min(
            truth, 1.0
        ) * (1 - 1e-6)
    assert len(by_case) > 4


def test_examples_are_looked_for_in_the_whole_network_again_after_a_case(
    by_case: list[Relaxed | None],
) -> None:
    for seed in range(4):
        problem = asked(perceptron(seed, ACTIVATIONS["relu"][0], WIDTHS), seed, 3, "linf")
        search = milp_module._PointSearch(MILP(), problem, torch.tensor([0]))
        search.run()
        assert search.tree is None or search.examples.model is search.tree.model
    assert any(state is not None for state in by_case)
