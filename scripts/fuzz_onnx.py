"""Is every ONNX file that a stranger may write read rightly, or refused in one sentence? Generated
and spoiled files against ONNX's reference.

Every second file is a small model over the operations that are read, with attributes at and beyond
their range; the others were spoiled, in their bytes or in what they say. They are read by child
processes, each of which may take a gibibyte beyond what it begins with and 20 seconds of processor
time for a file.

    PYTHONPATH=src python scripts/fuzz_onnx.py [--count 5000] [--seed 0] [--show wrong,traceback]
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
FAULTS = ("wrong", "traceback", "hang", "memory", "died")
SECONDS, SPARE, BATCH = 20, 2**30, 250


class HangError(BaseException):
    """A file that takes more processor time than any needs."""


def child(seed: int, first: int, last: int) -> None:
    """Judge files, and print a line for each."""
    import spoiled_onnx
    import torch

    torch.set_num_threads(1)

    def ring(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGPROF, ring)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        spoiled_onnx.judged(spoiled_onnx.case(seed, 0), path)  # whatever is imported late
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + SPARE, pages + SPARE))
        for number in range(first, last):
            print(json.dumps([number, "begun", ""]), flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                kind, line = spoiled_onnx.judged(spoiled_onnx.case(seed, number), path)
            except HangError:
                kind, line = "hang", ""
            signal.setitimer(signal.ITIMER_PROF, 0)
            if any(word in line for word in ("MemoryError", "allocate memory", "bad_alloc")):
                kind = "memory"
            print(json.dumps([number, kind, line]), flush=True)


def main() -> int:
    """Print the faults and a table of what became of the files; return 1 where there are faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", default=",".join(FAULTS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.seed, options.first, options.first + options.count)
        return 0
    kinds, number, end = Counter[str](), options.first, options.first + options.count
    while number < end:
        part = [
            "--child",
            "--seed",
            str(options.seed),
            "--first",
            str(number),
            "--count",
            str(min(BATCH, end - number)),
        ]
        done = subprocess.run(
            [sys.executable, __file__, *part], capture_output=True, text=True, check=False
        )
        begun = -1
        for text in done.stdout.splitlines():
            at, kind, line = json.loads(text)
            begun = at if kind == "begun" else -1
            if kind != "begun":
                number = at + 1
                kinds[kind] += 1
                if kind in options.show.split(","):
                    print(f"{at}: {kind}: {line[:300]}", flush=True)
        if begun >= 0 or not done.stdout:
            print(f"{begun}: died: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            kinds["died"], number = kinds["died"] + 1, max(number, begun) + 1
    print(", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
    return int(any(kinds[kind] for kind in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
