"""How few letters fool a net, exactly? Programs against the list of all neighbours, one switch more
at a time, where that list gets too long.

    python benchmarks/letters.py [points] [seconds a point]

Nets and data of categorical.py. The list is asked within as many switches as its `limit` of a
million words a point allows; programs are not told how many there will be. Seconds are to be
compared within one run only.
"""

from __future__ import annotations

import sys
import time

import torch
from categorical import mushroom, one_hot, splice, trained
from common import right, start
from torch import Tensor

from calipers.certificates.enumeration import Enumeration
from calipers.certificates.milp import MILP
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.substitutions import Substitutions

_LIMIT = 10**6


def main(points: int = 50, seconds: float = 30.0) -> None:
    """Print one row for each data set and tool, and how many points stand at each distance."""
    start("Fewest letters: programs against the list of all neighbours")
    for name, read in (("splice", splice), ("mushroom", mushroom)):
        table = read()
        if table is None:
            continue
        x, groups = one_hot(table[0])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], table[1][order]
        held = len(x) // 3
        model = trained(x[held:], y[held:])
        x, y = right(model, x[:held], y[:held])
        problem = Problem.pose(model, x[:points], y[:points], Substitutions(groups, len(groups)))
        print(
            f"\n{name}: {len(problem)} points of {len(groups)} letters, "
            f"{min(problem.region.sizes()):.3g} words around each"
        )  # type: ignore[attr-defined]
        compare(problem, seconds)


def compare(problem: Problem, seconds: float) -> None:
    """Print what programs close and what the list closes, and stop where they contradict each
    other.
    """
    begin = time.perf_counter()
    lower, upper = exactly(problem, MILP(seconds=seconds))
    spent = time.perf_counter() - begin
    shut = upper == lower + 1
    print(f"  programs: {int(shut.sum())} of {len(problem)} distances exact in {spent:.1f} s")
    print(
        "  distance: "
        + ", ".join(
            f"{int((upper[shut] == d).sum())} at {int(d)}"
            for d in sorted(set(upper[shut].tolist()))
        )
    )
    resisted, whole = torch.zeros_like(lower), torch.zeros_like(lower)
    begin = time.perf_counter()
    for k in range(1, 5):
        part = problem.at(k)
        claimed = torch.cat([claim.radius for claim in Enumeration(_LIMIT)(part)])
        begun = torch.tensor(part.region.sizes()) <= _LIMIT  # type: ignore[attr-defined]
        resisted, whole = torch.maximum(resisted, claimed), torch.where(begun, float(k), whole)
    wrong = (
        (torch.minimum(lower, whole) < resisted)
        | (resisted >= upper)
        | ((resisted < whole) & shut & (lower > resisted))
    )
    listed = resisted < whole
    print(
        f"  the list: {int(listed.sum())} of {len(problem)}, within {int(whole.min())} switches, "
        f"in {time.perf_counter() - begin:.1f} s"
    )
    if bool(wrong.any()):
        sys.exit(f"{int(wrong.sum())} points on which the two disagree")


def exactly(problem: Problem, tool: MILP) -> tuple[Tensor, Tensor]:
    """Return the switches proved and those of the example met, (N,) each."""
    lower, upper = (
        torch.zeros(len(problem), dtype=torch.float64),
        torch.full((len(problem),), torch.inf, dtype=torch.float64),
    )
    for result in tool(problem):
        if isinstance(result, Attempt):
            upper[result.index] = problem.take(result.index).region.distance(result.candidate)
        else:
            lower[result.index] = result.radius
    return lower, upper


if __name__ == "__main__":
    main(*[kind(word) for kind, word in zip((int, float), sys.argv[1:], strict=False)])
