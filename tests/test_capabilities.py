"""Do tools declare what they can be asked, and do lists, plans and refusals follow from it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import calipers
from calipers import presets
from calipers.cli import app
from calipers.cli.tools import as_markdown
from calipers.errors import BadInput
from calipers.presets import ATTACKS, CERTIFIERS, PLANS, plan_for, stage_of, tool_from
from calipers.problem.capabilities import EVERY, Capabilities, capabilities_of, misfit
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.substitutions import one_hot_groups

NAMED_ALONE = sorted({*ATTACKS, *CERTIFIERS} - {"BPDA", "EOT", "Transfer"})  # need a setting
RADII = {"linf": 0.3, "l2": 0.7, "l1": 1.5, "l0": 3.0, "pixels": 2.0}


def posed(threat: str) -> Problem:
    """Return a small question in a norm, or about symbols."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    if threat == "letters":
        x = nn.functional.one_hot(torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]), 3).flatten(1).float()
        return Problem.pose(
            model, x, model(x).argmax(1), calipers.Substitutions(one_hot_groups(4, 3), 1)
        )
    x = torch.rand(2, 3, 2, 2)
    return Problem.pose(model, x, model(x).argmax(1), calipers.Ball(threat, RADII[threat]))


@pytest.mark.parametrize("threat", [*EVERY, "letters"])
@pytest.mark.parametrize("name", NAMED_ALONE)
def test_a_tool_answers_what_it_declares_and_nothing_else(name: str, threat: str) -> None:
    tool, problem = tool_from(name), posed(threat)
    if misfit(tool, problem.threat):
        with pytest.raises(BadInput):
            presets.check_fit(tool, problem.threat)
        if threat == "letters" or not capabilities_of(tool).norms:  # type: ignore[union-attr]
            return  # the inside of a ball may be searched in the hull of the symbols, in vain
        with pytest.raises(BadInput):
            list(tool(problem))
    else:
        told = [i for answer in tool(problem) for i in answer.index.tolist()]
        assert set(told) == {0, 1}


@pytest.mark.parametrize("name", ["SPSA", "FiniteDifferences", "Square", "RayS"])
def test_a_wrong_declaration_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = type(tool_from(name))
    wrong = dataclasses.replace(tool.capabilities, norms=EVERY)  # type: ignore[attr-defined]
    monkeypatch.setattr(tool, "capabilities", wrong)
    with pytest.raises(BadInput):
        test_a_tool_answers_what_it_declares_and_nothing_else(name, "l0")


def test_searches_fit_where_the_tools_fit_that_they_run() -> None:
    inside = tool_from("IterativeTightening(FAB(steps=5), PGD(steps=5))")
    assert not misfit(inside, calipers.Ball("l2", 0.1))
    assert misfit(inside, calipers.Ball("l0", 2)).startswith("FAB is made for linf, l2, l1")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("threat", [*EVERY, "letters"])
def test_plans_hold_only_what_fits(name: str, threat: str) -> None:
    asked = posed(threat).threat
    if (name == "categorical") != (threat == "letters"):
        with pytest.raises(BadInput, match="holds no attack for"):
            plan_for(asked, name)
        return
    plan = plan_for(asked, name)
    assert plan.stages and not any(misfit(stage.tool, asked) for stage in plan.stages)
    dropped = [s for s in PLANS[name].stages if s not in plan.stages]
    assert all(misfit(stage.tool, asked) for stage in dropped)


@dataclasses.dataclass(frozen=True)
class Nothing:
    """An attack of somebody else's, which finds nothing."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "nearest example", "leaves every point where it is", norms=("l2",)
    )

    patience: int = 3

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the points themselves."""
        index = torch.arange(len(problem))
        yield Attempt(index, problem.x, index * 0, index * 0)


def test_installed_tools_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("Nothing", "test_capabilities:Nothing", "calipers.tools")
    bare = metadata.EntryPoint("Bare", "builtins:int", "calipers.tools")

    def installed(*found: Any) -> Any:
        return lambda group: found if group == "calipers.tools" else ()

    monkeypatch.setattr(metadata, "entry_points", installed(entry))
    tool = tool_from("Nothing(patience=5)")
    assert (type(tool).__name__, tool.patience) == ("Nothing", 5)  # type: ignore[union-attr]
    assert (stage_of(tool).kind, stage_of(tool).objective) == ("attack", "distance")
    shown = CliRunner().invoke(app, ["tools", "--norm", "l2"]).output
    assert "leaves every point where it is" in shown
    assert "leaves every point" not in CliRunner().invoke(app, ["tools", "--norm", "linf"]).output
    monkeypatch.setattr(metadata, "entry_points", installed(bare))
    with pytest.raises(BadInput, match=r"builtins:int.*declares no `capabilities`"):
        tool_from("Bare")


def test_the_readme_lists_the_tools() -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert as_markdown() in page, "put `calipers tools --markdown` into README.md"


def test_the_list_names_every_tool_of_a_norm() -> None:
    shown = CliRunner().invoke(app, ["tools", "--norm", "l0"]).output
    assert "SigmaZero" in shown and "DDN" not in shown
    assert CliRunner().invoke(app, ["tools", "--norm", "l3"]).exit_code == 2
