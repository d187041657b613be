"""Are replaced letters found wherever they exist, and at what cost? Searches against the list of
all neighbours, on nucleotides and on mushrooms.

    python benchmarks/categorical.py [points at k = 1] [points at k = 2]

Nets are trained here, in seconds: splice junctions (60 nucleotides of 4 letters, 3 classes) and
mushrooms (22 attributes of 2 to 12 values, 2 classes). "Evaluations" are forwards a point, for
bounds the rows of backward sweeps; a point that a search breaks costs less, so the exhaustive
search is the dearer the fewer break.
"""

from __future__ import annotations

import gzip
import sys
import time
from collections.abc import Sequence

import torch
from common import DATA, right, start
from torch import Tensor, nn

import calipers
from calipers.attacks.substitution_search import SubstitutionSearch
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.enumeration import Enumeration
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Certifier
from calipers.threats.substitutions import Substitutions

_SEARCHES = (
    SubstitutionSearch("exhaustive", limit=10**6),
    SubstitutionSearch("gradient"),
    SubstitutionSearch("greedy"),
    SubstitutionSearch("beam"),
    SubstitutionSearch(),
)


def main(at_one: int = 1000, at_two: int = 200) -> None:
    """Print one table for each data set and number of switches."""
    start("Letters replaced: searches against the list of all neighbours")
    for name, read in (("splice", splice), ("mushroom", mushroom)):
        table = read()
        if table is None:
            continue
        rows, y = table
        x, groups = one_hot(rows)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], y[order]
        held = len(x) // 3
        model = trained(x[held:], y[held:])
        clean = float((model(x[:held]).argmax(1) == y[:held]).float().mean())
        x, y = right(model, x[:held], y[:held])
        print(
            f"\n{name}: {len(groups)} letters, {x.shape[1]} columns, clean accuracy "
            f"{100 * clean:.1f} % of {held} held-out points"
        )
        for k, points in ((1, at_one), (2, at_two)):
            compare(model, x[:points], y[:points], Substitutions(groups, k))


def compare(model: nn.Module, x: Tensor, y: Tensor, threat: Substitutions) -> None:
    """Print what every search breaks, what every certifier proves, and what they cost."""
    problem = Problem.pose(model, x, y, threat)
    sizes = problem.region.sizes()  # type: ignore[attr-defined]
    print(f"\n  k = {threat.k}, {len(x)} points, {min(sizes)} to {max(sizes)} neighbours each")
    print(
        "  tool                             broken or certified   differs from the list   "
        "evaluations a point   seconds"
    )
    truth = torch.zeros(0)
    for tool in _SEARCHES:
        begin = time.perf_counter()
        found = calipers.attack(model, x, y, threat, tool)
        spent = time.perf_counter() - begin
        truth = found.success if not len(truth) else truth
        line(
            tool,
            found.success,
            int((found.success != truth).sum()),
            float(found.forwards.double().mean()),
            spent,
        )
    for certifier in (Enumeration(), CROWN(), IBP()):
        begin = time.perf_counter()
        claims = list(certifier(problem))
        spent = time.perf_counter() - begin
        proved = torch.cat([c.radius for c in claims]) >= threat.radii(len(x))
        if bool((proved & truth).any()):
            sys.exit(f"{certifier} certifies a point that the list of all neighbours breaks")
        cost = torch.cat([c.forwards + c.backwards for c in claims]).double().mean()
        line(certifier, proved, int((proved != ~truth).sum()), float(cost), spent)


def line(tool: Attack | Certifier, decided: Tensor, off: int, cost: float, seconds: float) -> None:
    """Print one row."""
    count = int(decided.sum())
    name = f"{type(tool).__name__} {getattr(tool, 'search', '')}"
    print(
        f"  {name:<34} {count:6d} ({100 * count / len(decided):5.1f} %)   {off:12d} points   "
        f"{cost:19.1f}   {seconds:7.2f}"
    )


def splice() -> tuple[list[Sequence[str]], Tensor] | None:
    """Return the nucleotides and the class of every splice junction without ambiguous letters."""
    lines = read("splice.data.gz")
    found = [[part.strip() for part in text.split(",")] for text in lines]
    found = [row for row in found if set(row[2]) <= set("ACGT")]
    return (
        (
            [row[2] for row in found],
            torch.tensor([["EI", "IE", "N"].index(row[0]) for row in found]),
        )
        if found
        else None
    )


def mushroom() -> tuple[list[Sequence[str]], Tensor] | None:
    """Return the attributes of every mushroom, and whether it is poisonous."""
    found = [
        text.split(",") for text in read("agaricus-lepiota.data.gz") if text[:2] in ("p,", "e,")
    ]
    return (
        ([row[1:] for row in found], torch.tensor([int(row[0] == "p") for row in found]))
        if found
        else None
    )


def read(name: str) -> list[str]:
    """Return the lines of a file beside the published networks; none, with a message, where it is
    absent.
    """
    path = DATA / "data" / name
    if not path.exists():
        print(
            f"{name}: skipped, no such file (set CALIPERS_BENCHMARK_DATA to the folder that holds "
            "nets/ and data/)"
        )
        return []
    with gzip.open(path, "rt") as file:
        return [text.strip() for text in file if text.strip()]


def one_hot(rows: Sequence[Sequence[str]]) -> tuple[Tensor, list[list[int]]]:
    """Return the rows as one-hot columns, and the columns of each letter; letters of one kind only
    are left out, as they cannot change.
    """
    parts, groups, width = [], list[list[int]](), 0
    for column in zip(*rows, strict=True):
        kinds = sorted(set(column))
        if len(kinds) > 1:
            parts.append(
                nn.functional.one_hot(
                    torch.tensor([kinds.index(value) for value in column]), len(kinds)
                )
            )
            groups.append(list(range(width, width + len(kinds))))
            width += len(kinds)
    return torch.cat(parts, 1).float(), groups


def trained(x: Tensor, y: Tensor, hidden: int = 64, steps: int = 80) -> nn.Module:
    """Return a net of two hidden layers, trained on all points at once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(x.shape[1], hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, int(y.max()) + 1),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
