"""Can rounding hide an example from a certifier? Networks whose exact and executed answers differ,
each against exact numbers and many executions.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import backdoors
import pytest
import torch
from backdoors import BackDoor
from executions import executions
from torch import nn

from calipers.bounds.rounding import SEARCH, Arithmetic
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.input_split import InputSplit
from calipers.certificates.radius import CertifiedRadius
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.threats.ball import Ball

pytestmark = pytest.mark.slow  # minutes; part of the slow shelf

SIGMAS = tuple(10.0**power for power in range(8, 18))
RUN = "float32-executed"


@lru_cache(maxsize=4)
def asked(door: BackDoor) -> Problem:
    """Ask about the point 0, in the network's own precision; captured once for all tools."""
    x = door.grid()[:1] * 0
    return Problem.pose(
        Classifier(door.network), x, torch.zeros(1, dtype=torch.long), Ball("linf", 1.0, None)
    )


def tools(**settings: Any) -> Iterator[Any]:
    """Yield every certifier of a ball, with little time."""
    yield from (
        IBP(**settings),
        CROWN(**settings),
        AlphaCROWN(steps=4, intermediate=3, **settings),
        CertifiedRadius(CROWN(**settings), rounds=4),
    )
    yield from (BranchAndBound(seconds=0.1, **settings), InputSplit(seconds=0.1, **settings))


def proved(tool: Any, door: BackDoor) -> bool:
    """Does the tool claim the whole ball?"""
    return any(
        bool((claim.radius >= 1.0).any()) for claim in tool(asked(door)) if isinstance(claim, Claim)
    )


def exactly_wrong(door: BackDoor) -> bool:
    """Is some point of the grid an example in exact numbers?"""
    for point in door.grid()[[0, 64, 96, 112, 128]].tolist():
        values = list(map(Fraction, point))
        for module in door.network:
            if isinstance(module, nn.Linear):
                rows = zip(module.weight.tolist(), module.bias.tolist(), strict=True)
                values = [
                    sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
                    for row, b in rows
                ]
            else:
                values = [max(v, Fraction(0)) for v in values]
        if values[0] <= values[1]:
            return True
    return False


def runs_wrong(door: BackDoor) -> set[bool]:
    """Return whether executions have an example on the grid; both answers where that depends on the
    order.
    """
    if door.network[0].weight.dtype == torch.float64:
        with torch.no_grad():
            results = [
                door.network(door.grid()),
                torch.cat([door.network(point) for point in door.grid().split(1)]),
            ]
    else:
        results = [run.values[-1] for run in executions(door.network, door.grid()[64:])]
    return {bool((logits[:, 0] <= logits[:, 1]).any()) for logits in results}


DOORS = (backdoors.hidden, backdoors.sprung, backdoors.ordered)


@pytest.mark.parametrize("make", DOORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_certifier_claims_what_exact_numbers_or_float64_get_wrong(
    make: Any, dtype: torch.dtype
) -> None:
    for sigma in SIGMAS:
        door = make(sigma, dtype)
        wrong = exactly_wrong(door) or (dtype == torch.float64 and True in runs_wrong(door))
        assert not wrong or not [tool for tool in tools() if proved(tool, door)], door.name


@pytest.mark.parametrize("make", DOORS, ids=lambda f: f.__name__)
def test_nothing_is_claimed_about_executions_that_go_wrong_in_some_order(make: Any) -> None:
    judged = 0
    for sigma in SIGMAS:
        door = make(sigma, torch.float32)
        if True in runs_wrong(door):
            judged += 1
            assert not [tool for tool in tools(guarantee=RUN) if proved(tool, door)], door.name
    assert judged >= 5 or make is backdoors.hidden


def test_what_the_order_decides_is_refused() -> None:
    for sigma in SIGMAS:
        door = backdoors.ordered(sigma, torch.float32)
        assert runs_wrong(door) == {True, False}, door.name
        assert not [tool for tool in tools(guarantee=RUN) if proved(tool, door)], door.name


def test_real_arithmetic_and_the_execution_are_two_questions() -> None:
    """A rounded trigger: exact numbers have no example and float64 proves it, while float32 runs
    into one. Only the other guarantee sees that.
    """
    door = backdoors.sprung(2.0**27, torch.float32)
    assert not exactly_wrong(door) and runs_wrong(door) == {True}
    assert proved(CROWN(), door) and not proved(CROWN(guarantee=RUN), door)


def test_harmless_networks_of_the_same_form_are_proved_with_both_guarantees() -> None:
    door = backdoors.BackDoor("harmless", backdoors.ordered(4.0, torch.float32).network)
    with torch.no_grad():
        door.network[-1].bias[0] = 3.0  # type: ignore[union-attr, operator]
    assert not exactly_wrong(door) and runs_wrong(door) == {False}
    for guarantee in ("float64-checked", RUN):
        assert all(
            proved(tool, door)
            for tool in tools(guarantee=guarantee)
            if not isinstance(tool, IBP | CertifiedRadius)
        ), guarantee


def test_a_verifier_without_allowances_is_fooled() -> None:
    """The same sweeps in float32, and in float64 without allowances, claim what is false: the door
    does what it is made for.
    """
    for arithmetic, dtype in (
        (SEARCH, torch.float32),
        (Arithmetic(torch.float64, checked=False), torch.float64),
    ):
        doors = [backdoors.hidden(sigma, dtype) for sigma in (*SIGMAS, 1e18, 1e19)]
        fooled = [
            exactly_wrong(door) and bool(CROWN().bound(asked(door), arithmetic).worst > 0)
            for door in doors
        ]
        assert sum(fooled) >= 2, arithmetic
