"""Is any bound of an operation, as people write it, above what the model itself does? Models around
one operation each, in torch and in ONNX.

Parameters, shapes, norms and radii are drawn from the seed; bounds by IBP, CROWN and AlphaCROWN,
and now and then BranchAndBound or InputSplit, are compared with what the model answers, in float64,
at corners, random points and points that gradients lead to.

PYTHONPATH=src python benchmarks/fuzz_ops.py --count 3000 [--seed 0] [--onnx 0.4] [--ways
clamp,pool]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import written_onnx
import written_torch
from written import Verdicts, judged


def main() -> None:
    """Print every violation as it is met, the counts so far now and then, and all at the end; exit
    with 1 where there was a violation.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--onnx", type=float, default=0.4, help="the share that is written as ONNX files"
    )
    parser.add_argument("--ways", default="", help="only these ways of writing, by name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # the exporter's own account of what it refuses
    total, share, started = (
        {"torch": Verdicts(), "onnx": Verdicts()},
        Counter[str](),
        time.process_time(),
    )
    for seed in range(options.seed, options.seed + options.count):
        kind = "onnx" if (seed * 0.618034) % 1 < options.onnx else "torch"
        way = written_onnx if kind == "onnx" else written_torch
        names = [n for n in sorted(way.WAYS) if not options.ways or n in options.ways.split(",")]
        if not names:
            continue
        before = time.process_time()
        found = judged(lambda: way.written(names[seed % len(names)], seed), seed)
        share[names[seed % len(names)]] += round(1000 * (time.process_time() - before))
        for line in found.wrong:
            print(f"{kind}: {line}", flush=True)
        total[kind].add(found)
        if (seed - options.seed) % 100 == 99:
            print(
                f"{seed - options.seed + 1}: "
                f"{'; '.join(f'{name} {seen}' for name, seen in total.items())}",
                file=sys.stderr,
                flush=True,
            )
    for kind, seen in total.items():
        print(f"{kind}: {seen}")
        print(
            "   refused:",
            "; ".join(f"{count} {reason}" for reason, count in seen.reasons.most_common(12)),
        )
    print(
        f"{time.process_time() - started:.0f} s of processor time, most for",
        ", ".join(f"{n} {ms / 1000:.0f}" for n, ms in share.most_common(4)),
    )
    sys.exit(1 if any(seen.wrong for seen in total.values()) else 0)


if __name__ == "__main__":
    main()
