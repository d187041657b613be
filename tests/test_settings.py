"""Does every setting of a run stand at the object that it describes, and is none ignored?"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import calipers
from calipers.api.measure import measure_exactly
from calipers.api.settings import Settings
from calipers.attacks.pgd import PGD
from calipers.measurement.plan import Plan, Stage
from calipers.presets import PLANS, plan_for
from calipers.threats.substitutions import Substitutions, one_hot_groups

BALL = calipers.Ball("linf", 0.1)
ONE = (Stage(PGD(steps=3), "attack"),)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 2).eval()


def points() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    return x, net()(x).argmax(1)


@pytest.mark.parametrize("name", ["seconds", "seed", "lower_share", "proofs", "guarantee", "title"])
@pytest.mark.parametrize("call", ["measure", "curve", "distance", "measure_exactly"])
def test_a_former_setting_is_refused_with_its_new_place(call: str, name: str) -> None:
    function: Callable[..., Any] = {**vars(calipers), "measure_exactly": measure_exactly}.get(
        call
    ) or getattr(calipers, call)
    radii = ([0.1],) if call == "curve" else ()
    with pytest.raises(TypeError, match=rf"{call} has no setting '{name}': it is called .* now"):
        function(net(), *points(), BALL, *radii, **{name: 1})


def test_a_setting_that_never_was_is_refused_with_those_that_are() -> None:
    with pytest.raises(TypeError, match="has no setting 'sede'; it has goal, model, plan"):
        calipers.measure(net(), *points(), BALL, sede=1)  # type: ignore[call-arg]


def test_the_calls_that_measure_share_one_list_of_settings() -> None:
    own = inspect.signature(calipers.measure).parameters
    assert {n for n, p in own.items() if p.kind is p.KEYWORD_ONLY} == set(Settings.__annotations__)
    for function in (calipers.curve, calipers.distance, measure_exactly):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert kinds[-1] is inspect.Parameter.VAR_KEYWORD


def test_a_plan_without_stages_is_the_named_one_with_its_settings() -> None:
    chosen = plan_for(BALL, Plan("quick", seed=3, seconds=60, lower_share=0.5))
    assert chosen == dataclasses.replace(PLANS["quick"], seed=3, seconds=60, lower_share=0.5)
    assert plan_for(BALL, chosen) == chosen
    assert plan_for(BALL, Plan(seed=1)) == dataclasses.replace(plan_for(BALL, "standard"), seed=1)
    letters = Substitutions(one_hot_groups(2, 2), 1)
    assert plan_for(letters, Plan(seed=1)).name == "categorical"
    assert plan_for(BALL, Plan("quick", lower_share=math.inf)).lower_share is None
    assert plan_for(BALL, Plan("quick")).lower_share == 0.75
    with pytest.raises(calipers.BadInput, match="there is no plan 'quik'"):
        plan_for(BALL, Plan("quik", seed=1))


def test_proofs_and_guarantee_reach_the_certifiers() -> None:
    tools = [s.tool for s in plan_for(BALL, Plan("quick", proofs=True)).stages]
    assert [tool.proofs for tool in tools if hasattr(tool, "proofs")] == [True, True, True]
    executed = plan_for(BALL, Plan("quick", guarantee="float32-executed"))
    assert {s.tool.guarantee for s in executed.stages if s.kind == "certifier"} == {
        "float32-executed"
    }
    with pytest.raises(calipers.BadInput, match="a guarantee is float64-checked or"):
        plan_for(BALL, Plan("quick", guarantee="float16"))  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_a_time_below_nothing_is_refused(seconds: float) -> None:
    with pytest.raises(calipers.BadInput, match="seconds is a time of 0 or more"):
        Plan(seconds=seconds)


def test_seed_name_and_settings_are_in_the_record() -> None:
    named = calipers.Classifier(net(), name="small net")
    plan = Plan("one", ONE, seed=7, seconds=60)
    found = calipers.measure(named, *points(), BALL, plan=plan)
    run = found.ledger.runs(found.summary.question.fingerprint)[-1]
    assert (run.seed, run.title, run.notes["settings"]) == (7, "small net", {"seconds": 60})
    assert found.summary.title == "small net" and "seed': 7" in str(found.summary.facts)


def test_the_confidence_belongs_to_the_reading() -> None:
    found = calipers.measure(net(), *points(), BALL, plan=Plan("one", ONE))
    wide = found.at_confidence(0.99)
    low, high = found.robust_accuracy.interval
    assert wide.robust_accuracy.interval[0] <= low and wide.robust_accuracy.interval[1] >= high
    assert wide.clean_accuracy.wilson.low < found.clean_accuracy.wilson.low
    assert (found.robust_accuracy.confidence, wide.robust_accuracy.confidence) == (0.95, 0.99)
    assert wide.bracket is found.bracket and wide.points == found.points
    assert wide.at_confidence(0.95).summary.robust == found.summary.robust
    for wrong in (0.0, 1.0, 2.0, math.nan):
        with pytest.raises(calipers.BadInput, match="between 0 and 1"):
            found.at_confidence(wrong)
