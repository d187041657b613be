"""How long do both jaws, the float64 confirmation and the referee take on a real network?
`mnist_wk17a` at linf 0.1, 500 images, against known distances.
"""

from __future__ import annotations

import csv
import sys

import common
import numpy as np

import calipers
from calipers.measurement.plan import Plan, Stage

# what plain CROWN and PGD have been seen to reach, and the time they may take
CERTIFIED, BROKEN, SECONDS = 471, 12, 20.0
PLAN = Plan(
    "both jaws",
    (
        Stage(calipers.attacks.PGD(steps=10, step=0.25), "attack"),
        Stage(calipers.certificates.CROWN(), "certifier"),
        Stage(calipers.attacks.PGD(steps=100, restarts=5), "attack"),
    ),
)


def main() -> int:
    """Print counts and seconds of the whole measurement, capture included; return 1 if it falls
    short.
    """
    common.start("both jaws on mnist_wk17a, linf 0.1, 500 MNIST test images")
    model = common.network("mnist_wk17a")
    if model is None:
        return 0
    x, y = common.digits(500)
    found: list[calipers.Result] = []
    seconds = common.clock(
        lambda: found.append(calipers.measure(model, x, y, calipers.Ball("linf", 0.1), plan=PLAN))
    )
    result = found[0]
    correct, certified = result.clean_accuracy.count, result.robust_accuracy.certified.count
    broken = correct - result.robust_accuracy.attacked.count
    print(
        f"{correct} correct, {certified} certified in checked float64 (at least {CERTIFIED}), "
        f"{broken} broken (at least {BROKEN})"
    )
    print(f"{seconds:.1f} s (at most {SECONDS:.0f})")
    wrong = _against_truth(result)
    print(f"against exact distances: {wrong} verdicts contradict them")
    return int(certified < CERTIFIED or broken < BROKEN or seconds > SECONDS or wrong > 0)


def _against_truth(result: calipers.Result) -> int:
    """Count verdicts that a known exact distance contradicts."""
    wrong = 0
    with (common.DATA / "truth" / "wk17a_linf_exact_idx0-249.csv").open() as file:
        for row in csv.DictReader(file):
            i, lower = int(row["mnist_test_index"]), float(row["lower"] or 0)
            upper = float(row["upper"]) if row["upper"] else np.inf
            wrong += bool(result.bracket.lower[i] > upper) + bool(
                0 < result.bracket.upper[i] < lower - 1e-9
            )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
