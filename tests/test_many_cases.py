"""Does any of ten thousand random questions show a bound above an attacked value? Operations x
norms x boxes x goals x certifiers, on the slow shelf.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import nets
import pytest
import torch
from nets import attacked

from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.input_split import InputSplit
from calipers.certificates.radius import CertifiedRadius
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim

QUESTIONS = 10_000
BLOCK = 500
_SIZES = (0.5, 0.2, 0.07)  # of the random radius: from far too large to where bounds decide
# beyond the smallest box drawn a question is refused
_LARGEST = {"linf": 0.3, "l2": 0.42, "l1": 0.6}


def certifier(seed: int) -> Any:
    """Return one of the certifiers; those that search get little to do."""
    plain = (
        IBP(),
        CROWN(),
        CROWN(),
        CROWN(),
        AlphaCROWN(steps=3, intermediate=0),
        AlphaCROWN(steps=2, intermediate=2),
        CertifiedRadius(CROWN(), rounds=3),
    )
    draw = random.Random(seed)
    return (
        draw.choice((BranchAndBound(seconds=0.05), InputSplit(seconds=0.05)))
        if draw.random() < 0.1
        else draw.choice(plain)
    )


def judged(seed: int) -> tuple[str, str, list[str]]:
    """Return the certifier's and the norm's name, and every claim that an attacked point
    contradicts.
    """
    case = nets.random_case(seed)
    case = replace(
        case,
        ball=case.ball.at(
            (case.ball.radii(len(case.x)) * _SIZES[seed % 3]).clamp(max=_LARGEST[case.ball.norm])
        ),
    )
    tool, found = certifier(seed), list[str]()
    problem = Problem.pose(
        Classifier(nets.Carrier(case).eval()), case.x, case.y, case.ball, case.goal
    )
    radius, margin = (
        torch.zeros(len(case.x), dtype=torch.float64),
        torch.full((len(case.x),), -torch.inf, dtype=torch.float64),
    )
    for claim in tool(problem):
        if isinstance(claim, Claim):
            radius[claim.index], margin[claim.index] = claim.radius, claim.margin
    proved = radius > 0
    # The margin of a point that is not proved is one at the radius asked; a search claims radius 0
    # then, with the margin there.
    inside = case.at(
        radius
        if isinstance(tool, CertifiedRadius)
        else torch.where(proved, radius, case.ball.radii(len(case.x)))
    )
    points = attacked(inside, seed)
    worst = (
        case.worst(case.graph.values(points.flatten(0, 1))[-1], len(points))
        .view(len(points), -1)
        .amin(0)
    )
    name = type(tool).__name__
    found += [
        f"seed {seed}, {name}: point {i} is broken at {float(radius[i]):.6g}"
        for i in torch.nonzero(proved & ~(worst > 0)).flatten().tolist()
    ]
    room = 1e-11 * (1 + worst.abs())  # of the float64 execution that judges
    crossed = (margin > worst + room) & (margin > 1e-300)
    found += [
        f"seed {seed}, {name}: point {i}, {float(margin[i]):.6g} > {float(worst[i]):.6g}"
        for i in torch.nonzero(crossed).flatten().tolist()
    ]
    return name, f"{case.ball.norm}, {int(proved.sum())} of {len(proved)} proved", found


def block(first: int) -> tuple[Counter[str], Counter[str], int, list[str]]:
    """Judge a block of questions; returns counts by tool and norm, the points proved, and what is
    wrong.
    """
    torch.set_num_threads(1)
    tools, norms, proved, wrong = Counter[str](), Counter[str](), 0, list[str]()
    for seed in range(first, first + BLOCK):
        name, said, found = judged(seed)
        norm, _, rest = said.partition(", ")
        tools[name] += 1
        norms[norm] += 1
        proved += int(rest.split()[0])
        wrong += found
    return tools, norms, proved, wrong


def test_a_few_of_them() -> None:
    assert not [line for seed in range(40) for line in judged(seed)[2]]


@pytest.mark.slow
def test_no_claim_of_ten_thousand_is_contradicted() -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(block, range(100_000, 100_000 + QUESTIONS, BLOCK)))
    tools, norms = (sum((r[k] for r in results), Counter[str]()) for k in (0, 1))
    proved, wrong = sum(r[2] for r in results), [line for r in results for line in r[3]]
    print(
        f"\n{QUESTIONS} questions of three points, {proved} points proved, {len(wrong)} claims "
        f"contradicted; {dict(tools)}; {dict(norms)}"
    )
    assert not wrong
    assert proved > QUESTIONS / 4
