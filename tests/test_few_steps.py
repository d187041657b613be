"""Do minimum-norm attacks come near in few steps? Those that need a hundred to bring the radius
down do not.
"""

from __future__ import annotations

from calipers.attacks.ddn import DDN
from calipers.data import build, images
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball


def median_distance(tool: DDN, problem: Problem) -> float:
    found = problem.x.clone()
    for attempt in tool(problem):
        found[attempt.index] = attempt.candidate
    return float(problem.region.distance(found).median())


def test_twelve_steps_of_ddn_come_nearly_as_near_as_a_hundred() -> None:
    """Where gamma alone moves the length, twelve steps end 5 % farther away than a hundred."""
    x, y = images()
    problem = Problem.pose(build("mnist-robust"), x[:60], y[:60], Ball("l2", 1.0))
    assert median_distance(DDN(steps=12), problem) < 1.03 * median_distance(DDN(steps=100), problem)
