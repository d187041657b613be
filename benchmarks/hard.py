"""Does the thorough plan find examples where gradients fail? On images that a mixed-integer solver
broke and PGD-100 with 30 restarts did not.

The images are published with the network `mnist_madry_tiny`; an example within linf 0.3 exists at
each of them, so a certificate there is an error.

    PYTHONPATH=src python benchmarks/hard.py [--plan thorough]
"""

from __future__ import annotations

import argparse
import csv

import common
import numpy as np
import torch

import calipers
from calipers.threats.ball import Ball


def main() -> None:
    """Print how many images each stage broke, and the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", default="thorough")
    options = parser.parse_args()
    common.start(f"The {options.plan} plan on images that resist gradient attacks")
    model, path = (
        common.network("mnist_madry_tiny"),
        common.DATA / "truth" / "madry_tiny_hard_images.npz",
    )
    if model is None or not path.exists():
        print(
            f"skipped: no {path.name} among the published data (set CALIPERS_BENCHMARK_DATA to "
            "its folder)"
        )
        return
    with (common.DATA / "truth" / "madry_tiny_hard_eps0.3.csv").open() as table:
        solved = {
            int(row["test_index"])
            for row in csv.DictReader(table)
            if row["status_at_eps0.3"] == "unsafe_mip_found"
        }
    with np.load(path) as arrays:
        kept = np.isin(arrays["test_index"], list(solved))
        x, y = (
            torch.tensor(arrays["x"][kept]).float()[:, None] / 255,
            torch.tensor(arrays["y"][kept]).long(),
        )
    results: list[calipers.Result] = []
    seconds = common.clock(
        lambda: results.append(calipers.measure(model, x, y, Ball("linf", 0.3), plan=options.plan))
    )
    rows = results[0].points
    print(
        f"{len(rows)} images: {sum(r.verdict == 'broken' for r in rows)} broken, "
        f"{sum(r.verdict == 'robust' for r in rows)} certified, in {seconds:.1f} s"
    )
    for row in rows:
        if row.verdict == "broken":
            print(
                f"  image {row.index}: example at {row.upper:.6f} by {row.tool.partition('(')[0]}"
            )


if __name__ == "__main__":
    main()
