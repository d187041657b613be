"""What does another solver's search tree do to a claim? It says where to begin. Whatever it leaves
out is put back, and every branch is proved again.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from clocks import AMPLE
from test_milp import (
    ACTIVATIONS,
    SETTINGS,
    Pooled,
    against_enumeration,
    asked,
    by_enumeration,
    exact,
    perceptron,
    small,
    wrong_somewhere,
)
from torch import nn

from calipers.bounds.rounding import CHECKED
from calipers.certificates import milp as milp_module
from calipers.certificates.alpha_crown import Start
from calipers.certificates.exact import scip_hints, scip_process
from calipers.certificates.exact.encoding import encoded
from calipers.certificates.exact.incumbents import Examples
from calipers.certificates.exact.model import MIPModel
from calipers.certificates.exact.scip_hints import covering, hinted, question_of
from calipers.certificates.exact.scip_process import Hints
from calipers.certificates.milp import MILP
from calipers.errors import BadInput
from calipers.presets import tool_from
from calipers.problem.problem import Problem
from calipers.threats.region import Region

needs_scip = pytest.mark.skipif(
    find_spec("pyscipopt") is None,
    reason="pyscipopt is not installed: pip install 'calipers[scip]'",
)


def hinting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every search takes hints."""
    monkeypatch.setattr(
        MILP.__init__,
        "__defaults__",
        tuple("SCIP" if d == "none" else d for d in MILP.__init__.__defaults__ or ()),
    )
    assert MILP().hints == "SCIP"


# ---- branches that leave nothing out
# --------------------------------------------------------------------------------------------------


def check_covering(
    cover: Callable[[list[int], list[dict[int, int]]], list[dict[int, int]]], seed: int
) -> None:
    """Every way of choosing is in one branch."""
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 2, 3]) for _ in range(5)]
    junk = [
        {draw.randrange(-1, 7): draw.randrange(-1, 4) for _ in range(draw.randrange(4))}
        for _ in range(draw.randrange(6))
    ]
    found = cover(sizes, junk)
    for way in itertools.product(*map(range, sizes)):
        assert (
            sum(
                all(0 <= choice < 5 and way[choice] == option for choice, option in branch.items())
                for branch in found
            )
            == 1
        )


def grown(draw: random.Random, sizes: list[int], made: dict[int, int]) -> list[dict[int, int]]:
    """Return the leaves of a random tree."""
    left = [c for c in range(len(sizes)) if c not in made]
    if not left or draw.random() < 0.3:
        return [made]
    choice = draw.choice(left)
    return [
        leaf
        for option in range(sizes[choice])
        for leaf in grown(draw, sizes, {**made, choice: option})
    ]


def test_branches_cover_everything_once_whatever_is_given() -> None:
    for seed in range(200):
        check_covering(covering, seed)
    assert covering([2, 2], []) == [{}]


def test_leaves_of_a_tree_stay_as_they_are() -> None:
    for seed in range(100):
        draw = random.Random(seed)
        sizes = [2, 3, 2, 2]
        leaves = grown(draw, sizes, {})
        draw.shuffle(leaves)
        assert sorted(map(sorted, map(dict.items, covering(sizes, leaves)))) == sorted(
            map(sorted, map(dict.items, leaves))
        )


def test_branches_that_were_believed_would_show() -> None:
    assert any(
        wrong_somewhere(lambda s=seed: check_covering(lambda _, branches: branches, s))
        for seed in range(5)
    )  # type: ignore[misc]


# ---- a solver that lies
# --------------------------------------------------------------------------------------------------


def junk(
    model: MIPModel, region: Region, radius: float, seconds: float, stop: Callable[[], bool]
) -> Iterator[Hints]:
    """Yield what no solver would say."""
    draw = random.Random(len(model.choices))
    for goal in model.goals.values():
        leaves = [
            {c: draw.randrange(3) for c in range(len(model.choices)) if draw.random() < 0.5}
            for _ in range(4)
        ]
        delta = np.array([draw.uniform(-radius, radius) for _ in model.reach]) * draw.choice(
            [1.0, 1.0, np.nan]
        )
        yield Hints(
            goal,
            draw.choice([None, delta]),
            draw.choice([0.0, radius, np.nan]),
            draw.choice([[], leaves]),
        )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
@pytest.mark.parametrize("name", ["relu", "clip"])
def test_junk_makes_no_claim_wrong(norm: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hinting(monkeypatch)
    monkeypatch.setattr(milp_module, "check_scip", lambda: None)
    monkeypatch.setattr(milp_module, "hinted", junk)
    for seed in range(2):
        against_enumeration(norm, name, seed, widths=(3, 2, 3) if norm == "l2" else (3, 2, 2, 3))


def test_leaving_branches_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    hinting(monkeypatch)
    monkeypatch.setattr(milp_module, "check_scip", lambda: None)
    monkeypatch.setattr(
        milp_module,
        "hinted",
        lambda model, *_: (Hints(goal, None, 0.0, [{0: 0}]) for goal in model.goals.values()),
    )
    against_enumeration("linf", "relu", 0)
    monkeypatch.setattr(milp_module, "covering", lambda _, branches: branches)
    assert any(
        wrong_somewhere(lambda s=seed: against_enumeration("linf", "relu", s)) for seed in range(8)
    )  # type: ignore[misc]


def test_pieces_without_an_example_leave_no_edge() -> None:
    """Nothing of this network's box is adversarial: whatever pieces are asked about, no zero of
    theirs lowers what is left to prove.
    """
    model = perceptron(1, ACTIVATIONS["clip"][0], (3, 2, 2, 3))
    problem = asked(model, 1, 3, "l2")
    with torch.no_grad():
        start = Start.tightened(problem, CHECKED, steps=2, intermediate=0)
        assert start.root is not None
        cases = {
            case: [case] for case in torch.nonzero(~(start.case_bounds[0] > 0)).flatten().tolist()
        }
        rows = encoded(start.root.state, start.spec[0], start.offsets[0], cases)
        examples = Examples(problem).within(start.root.state, rows, np.inf)
        ways = list(itertools.product(*(range(len(c.options)) for c in rows.choices)))
        assert len(ways) > 4
        for way in ways:
            assert examples.look(dict(enumerate(way))) is None and examples.edge == np.inf


# ---- SCIP itself
# --------------------------------------------------------------------------------------------------


def begun(
    network: nn.Module, features: int, norm: str, setting: str = "box"
) -> Iterator[tuple[Problem, Start, MIPModel]]:
    """Yield problems that slopes alone do not settle, with their relaxations and their models."""
    for seed in range(90):
        problem = asked(network.double().eval(), seed, features, norm, **SETTINGS[setting])
        with torch.no_grad():
            start = Start.tightened(problem, CHECKED, steps=2, intermediate=0)
            cases = {
                case: [case]
                for case in torch.nonzero(~(start.case_bounds[0] > 0)).flatten().tolist()
            }
            if start.root is not None:
                yield (
                    problem,
                    start,
                    encoded(start.root.state, start.spec[0], start.offsets[0], cases),
                )


@pytest.mark.one_in(3)
@needs_scip
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
def test_scip_says_what_enumeration_says(norm: str) -> None:
    for seed, name in ((3, "relu"), (1, "clip"), (2, "abs")):
        activation, pieces = ACTIVATIONS[name]
        network = perceptron(seed, activation, (3, 2, 2, 3))
        problem, start, model = next(
            begun(network, 3, norm, "box" if name == "relu" else "weights")
        )
        said = list(
            hinted(
                model,
                start.root.state.region,
                float(problem.threat.radii(1)[0]),
                30.0,
                lambda: False,
            )
        )  # type: ignore[union-attr]
        assert sorted(h.goal for h in said) == sorted(model.goals.values())
        truth = by_enumeration(network, pieces, problem)
        question = question_of(model, problem.region, 1.0, 1.0)
        lengths = [
            float(np.linalg.norm(h.delta * question.weight, question.power))
            for h in said
            if h.delta is not None
        ]
        least = min((h.distance for h in said if h.delta is not None), default=np.inf)
        assert abs(least - truth) <= 2e-3 * truth if truth < np.inf else least == np.inf
        assert not lengths or abs(min(lengths) - truth) <= 2e-3 * truth


@needs_scip
def test_leaves_of_a_search_are_those_of_a_tree() -> None:
    problem, start, model = next(begun(perceptron(0, nn.ReLU(), (3, 8, 8, 3)), 3, "linf"))
    assert start.root is not None
    (said, *_) = hinted(
        model, start.root.state.region, float(problem.threat.radii(1)[0]), 30.0, lambda: False
    )
    assert len(said.branches) > 2
    assert set(map(len, said.branches)) != {0} and len(
        covering([2] * len(model.choices), said.branches)
    ) <= 2 * len(said.branches)


@needs_scip
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
@pytest.mark.parametrize(
    "setting",
    ["box", *(pytest.param(name, marks=[pytest.mark.slow]) for name in ("weights", "constraints"))],
)
def test_enumeration_with_hints(norm: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hinting(monkeypatch)
    against_enumeration(norm, "relu", 3, setting, widths=(3, 2, 2, 3))


@needs_scip
def test_windows_with_hints() -> None:
    model = Pooled(residual=True).double().eval()
    for norm in ("linf", "l2"):
        problem = asked(model, 1, 2, norm)
        (own,), (with_hints,) = (
            exact(problem),
            exact(problem, MILP(seconds=AMPLE, hints="SCIP")),
        )
        assert with_hints.lower == pytest.approx(
            own.lower, rel=1e-5
        ) and with_hints.upper == pytest.approx(own.upper, rel=1e-5)


def constants_hold(name: str) -> None:
    """No offset of the region breaks a row that an option of another piece has opened."""
    network = Pooled() if name == "windows" else perceptron(0, ACTIVATIONS[name][0], (3, 4, 3, 3))
    _, start, model = next(begun(network, 2 if name == "windows" else 3, "linf"))
    assert start.root is not None
    with torch.no_grad():
        question = question_of(model, start.root.state.region, 1.0, 1.0)
        region = start.root.state.region
        shares = torch.rand(
            400,
            region.low.shape[1],
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float64,
        )
        tight = 0.0
        for delta in region.low + (region.high - region.low) * shares:
            values = start.state.graph.values(region.center + delta.view_as(region.center))
            v = model.of_values(values)
            v[model.results()] = model.values_of(v)
            for ways in question.choices:
                for way in ways:
                    apart = (
                        float(
                            (
                                model.inputs[[way.row]] @ delta.numpy()
                                + model.columns[[way.row]] @ v
                            )[0]
                        )
                        - way.at
                    )
                    assert -way.below - 1e-9 <= apart <= way.above + 1e-9
                    tight = max(
                        tight,
                        apart / way.above if way.above > 1e-6 else 0.0,
                        -apart / way.below if way.below > 1e-6 else 0.0,
                    )
    assert tight > 0.3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["relu", "clip", "abs", "windows"])
def test_constants_open_what_an_option_closes(name: str) -> None:
    constants_hold(name)


def test_smaller_constants_show(monkeypatch: pytest.MonkeyPatch) -> None:
    real = scip_hints._ways

    def halved(model: Any, choice: Any) -> list[Any]:
        return [w._replace(above=w.above / 4, below=w.below / 4) for w in real(model, choice)]

    monkeypatch.setattr(scip_hints, "_ways", halved)
    assert all(
        wrong_somewhere(lambda n=name: constants_hold(n))
        for name in ("relu", "clip", "abs", "windows")
    )  # type: ignore[misc]


def test_a_branching_of_scip_is_read_as_the_option_it_makes() -> None:
    program = object.__new__(scip_process._Program)
    program.binaries = {"c0o0": (0, 0, 1), "c1o2": (1, 2, -1)}
    assert program._made([("t_c0o0", 1.0, True)]) == {0: 0} and program._made(
        [("t_c0o0", 0.0, False)]
    ) == {0: 1}
    assert (
        program._made([("t_c1o2", 1.0, True)]) == {1: 2}
        and program._made([("t_c1o2", 0.0, False), ("t_x7", 0.3, True)]) == {}
    )


# ---- the process
# --------------------------------------------------------------------------------------------------


@needs_scip
def test_whoever_says_stop_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started, real = list[Any](), scip_hints.subprocess.Popen
    monkeypatch.setattr(
        scip_hints.subprocess, "Popen", lambda *a, **b: started.append(real(*a, **b)) or started[-1]
    )
    monkeypatch.setattr(scip_hints, "_ASK", "import time; time.sleep(600)")
    problem, _, model = next(begun(perceptron(0, nn.ReLU(), (3, 3, 3)), 3, "l2"))
    before = time.monotonic()
    assert (
        list(hinted(model, problem.region, 1.0, 60.0, lambda: time.monotonic() > before + 0.3))
        == []
    )
    assert [p.returncode for p in started] == [-9], "a process that sleeps was not ended"


@pytest.mark.one_in(2)
@needs_scip
@pytest.mark.parametrize("fault", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 11)"])
def test_a_process_that_dies_is_told_and_the_search_goes_on(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scip_hints, "_ASK", fault)
    (truth, *_) = exact(small())
    with pytest.warns(UserWarning, match="SCIP's process ended early"):
        (told_anyway, *_) = exact(small(), MILP(seconds=AMPLE, hints="SCIP"))
    assert told_anyway.lower == pytest.approx(truth.lower, rel=1e-6)


def test_without_scip_a_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyscipopt", None)
    monkeypatch.setattr(scip_hints, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'calipers\[scip\]'"):
        list(MILP(hints="SCIP")(small()))


def test_hints_of_nobody_are_refused() -> None:
    with pytest.raises(BadInput, match="hints of 'SCIP' or 'none', got 'Gurobi'"):
        tool_from("MILP(hints='Gurobi')")
    tool = tool_from("MILP(hints='SCIP')")
    assert isinstance(tool, MILP) and tool.hints == "SCIP"
