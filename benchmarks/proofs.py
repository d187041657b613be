"""Are all certificates proved again, by a program that shares nothing with the tools? Proof files,
and the checker alone in a process of its own for each.

Networks as in benchmarks/complete.py, and the unsat instances of VNN-COMP that are at hand. A line
for each: certificates, those proved again, those that were not and why, seconds of the checker (its
start included) and bytes of a file.

    PYTHONPATH=src python benchmarks/proofs.py [vnncomp mnist_wk17a ...] [--points 20] \\
        [--seconds 10] [--keep DIRECTORY]
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import common
import complete
import trained

import calipers
from calipers.api.verify import verify
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.input_split import InputSplit
from calipers.errors import CalipersError
from calipers.interchange import load_instances
from calipers.presets import plan_for
from calipers.record import checker
from calipers.record.record import Record
from calipers.threats.ball import Ball

RADII = {**complete.RADII, "sigmoid": 0.02}
COMPLETE = (BranchAndBound, InputSplit)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=["vnncomp", *RADII])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="of branch and bound for each point, and for each instance",
    )
    parser.add_argument(
        "--keep", type=Path, help="a directory for the files; else they are forgotten"
    )
    options = parser.parse_args()
    common.start("Certificates proved again by the checker alone")
    print(
        "| network | certificates | proved again | not | checking, s: median | longest | kB: "
        "median | largest |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as forgotten:
        kept = options.keep or Path(forgotten)
        kept.mkdir(parents=True, exist_ok=True)
        program = Path(forgotten) / "checker.py"
        program.write_bytes(Path(str(checker.__file__)).read_bytes())
        for name in options.networks:
            made = (
                instances(options.seconds)
                if name == "vnncomp"
                else points(name, options.points, options.seconds)
            )
            row(name, list(made), program, kept)


def instances(seconds: float) -> Iterator[tuple[str, bytes | None]]:
    """Yield the proofs of the instances that are unsat within the seconds, one for each box."""
    for source in sorted((common.DATA / "vnncomp").glob("*/instances.csv")):
        for one in load_instances(source):
            try:
                found = verify(one.network, one.specification, timeout=seconds, proofs=True)
            except CalipersError as error:
                print(f"  {source.parent.name} {' '.join(one.names)}: {error}")
                continue
            for k, data in enumerate(found.proofs):
                yield f"{source.parent.name}-{'-'.join(one.names)}-{k}", data


def points(name: str, count: int, seconds: float) -> Iterator[tuple[str, bytes | None]]:
    """Yield the proofs that the plan complete keeps of a network's points, at the radius of every
    one that is certified there.
    """
    model = trained.network(name)
    if model is None:
        return
    x, y = common.cifar(min(count, 200)) if name.startswith("cifar") else common.digits(count)
    ball, ledger = Ball("linf", RADII[name]), Record()
    plan = plan_for(ball, "complete")
    stages = tuple(
        dataclasses.replace(s, tool=dataclasses.replace(s.tool, seconds=seconds))
        if isinstance(s.tool, COMPLETE)
        else s
        for s in plan.stages
    )
    calipers.measure(
        model,
        x,
        y,
        ball,
        plan=dataclasses.replace(plan, stages=stages, proofs=True),
        record=ledger,
    )
    (asked,) = ledger.questions()
    for fact in (e for e in ledger.evidence(asked.fingerprint) if e.kind == "certificate"):
        data = ledger.witness(asked.fingerprint, fact)
        yield (
            f"{name}-{fact.point}-{fact.tool.partition('(')[0]}",
            None if data is None else data.tobytes(),
        )


def row(name: str, proofs: list[tuple[str, bytes | None]], program: Path, kept: Path) -> None:
    """Check every file in a process of its own, and print the line."""
    seconds, sizes, wrong = [0.0], [0], Counter[str]()
    for title, data in proofs:
        if data is None:
            wrong["no file"] += 1
            continue
        path = kept / f"{title.replace('/', '_')}.npz"
        path.write_bytes(data)
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-I", str(program), str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds.append(time.perf_counter() - begun)
        sizes.append(len(data))
        if done.returncode:
            wrong[
                done.stdout.partition("NOT proved: ")[2].strip() or done.stderr.strip()[-200:]
            ] += 1
    said = "; ".join(f"{count} x {reason}" for reason, count in wrong.most_common(5)) or "0"
    times = f"{median(seconds[1:] or seconds):.2f} | {max(seconds):.1f}"
    print(
        f"| {name} | {len(proofs)} | {len(proofs) - wrong.total()} | {said} | {times} | "
        f"{median(sizes[1:] or sizes) / 1e3:.0f} | {max(sizes) / 1e3:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
