"""Is every instance of the verification competition that is at hand answered rightly, and how fast?
One process for each list.

The published verdicts stand beside the instances. A `sat` is only counted with a witness that holds
without tolerance. The medians of the field are those of VNN-COMP 2021 and 2022 (whole process,
start included, their machines): alpha-beta-CROWN / nnenum / Marabou where published.

    PYTHONPATH=src python benchmarks/vnncomp.py [acasxu ...] [--timeout 120]
"""

from __future__ import annotations

import argparse
import csv
import time
from statistics import median

import common

from calipers.api.verify import verify
from calipers.errors import CalipersError
from calipers.interchange import load_instances

# seconds
PUBLISHED = {
    "acasxu": "8.2 / 1.0 / 0.9",
    "mnist_fc": "7.4 / 2.2 / -",
    "rl_benchmarks": "7.0 / 0.9 / 0.4",
}


def main() -> None:
    """Print one line for every instance, and a table of lists."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lists", nargs="*")
    parser.add_argument("--timeout", type=float, default=120.0)
    options = parser.parse_args()
    common.start("Verdicts on instances of VNN-COMP")
    found = sorted((common.DATA / "vnncomp").glob("*/instances.csv"))
    if not found:
        print(
            "skipped: no vnncomp/*/instances.csv among the published data (set "
            "CALIPERS_BENCHMARK_DATA to its folder)"
        )
        return
    table = []
    for source in found:
        name = source.parent.name
        if options.lists and name not in options.lists:
            continue
        truth = {
            (row["network"], row["property"]): row["verdict"]
            for row in csv.DictReader(source.open())
        }
        seconds, right, wrong = [], 0, 0
        for one in load_instances(source):
            begun = time.perf_counter()
            try:
                answer = verify(one.network, one.specification, timeout=options.timeout).answer
            except CalipersError as error:
                answer = f"error ({error})"  # type: ignore[assignment]
            seconds.append(time.perf_counter() - begun)
            expected = truth[one.names]
            right, wrong = (
                right + (answer == expected),
                wrong + (answer in ("sat", "unsat") and answer != expected),
            )
            print(
                f"  {name:20s} {one.names[0][:40]:40s} {one.names[1]:24s} {expected:6s} "
                f"{answer:8s} {seconds[-1]:7.2f} s"
            )
        table.append(
            f"| {name} | {len(seconds)} | {right} | {wrong} | {median(seconds):.2f} | "
            f"{max(seconds):.1f} | {PUBLISHED.get(name, '-')} |"
        )
    print(
        "| list | instances | right | wrong | median s | longest s | published medians s "
        "|\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(table))


if __name__ == "__main__":
    main()
