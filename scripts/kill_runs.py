"""Does a run that was killed, interrupted or doubled end with the brackets of one that was left
alone? Tries it at random moments, over all plans.

    python scripts/kill_runs.py --kills 200 --interrupts 100 --pairs 50

Each trial forks a process that measures a small network into a record, ends it by SIGKILL or SIGINT
at a random moment (up to three times), and lets another one take the record up; a pair is two
processes on one record. Then nothing that the record held at any of these moments may be missing,
SQLite must find the file whole and the chain of digests unbroken, and the brackets must equal those
of an undisturbed run, number by number. One line a trial that fails; exit code 1 if any did.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import calipers
from calipers.api.measure import measure_exactly
from calipers.attacks.engine import query_loop, queue
from calipers.measurement import plan as plans
from calipers.record.bracket import Bracket
from calipers.record.record import Record
from calipers.threats.substitutions import one_hot_groups

POINTS, FEATURES, LETTERS, SYMBOLS = 12, 10, 6, 3
RADIUS = 0.17
_LONGEST = 300.0  # seconds after which a trial counts as stuck

Cut = Callable[[int], None]


def net(inputs: int) -> nn.Module:
    """Return a small network with a few hundred unstable neurons' worth of trouble, the same in
    every process.
    """
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    ).eval()
    with torch.no_grad():
        for p in module.parameters():
            p *= 4
    return module


def question(plan: str) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """Return model, points, labels and threat of a plan."""
    draw = torch.Generator().manual_seed(5)
    if plan == "categorical":
        model = net(LETTERS * SYMBOLS)
        x = (
            nn.functional.one_hot(
                torch.randint(SYMBOLS, (POINTS, LETTERS), generator=draw), SYMBOLS
            )
            .flatten(1)
            .float()
        )
        return (
            model,
            x,
            model(x).argmax(1),
            calipers.Substitutions(one_hot_groups(LETTERS, SYMBOLS), 2),
        )
    model, x = net(FEATURES), torch.rand(POINTS, FEATURES, generator=draw)
    return model, x, model(x).argmax(1), calipers.Ball("linf", RADIUS)


def measure(plan: str, record: str) -> None:
    """Measure into the record."""
    model, x, y, threat = question(plan)
    if plan == "sweep":
        calipers.curve(
            model, x, y, threat, [0.02, 0.04, 0.06, 0.08, 0.1], plan="quick", record=record
        )
    elif plan == "exact":
        measure_exactly(model, x[:6], y[:6], threat, record=record)
    else:
        calipers.measure(model, x, y, threat, plan=plan, record=record)


PLANS = (
    "quick",
    "standard",
    "brackets",
    "thorough",
    "complete",
    "autoattack",
    "distance",
    "categorical",
    "sweep",
    "exact",
)


def forked(
    plan: str, record: Path, cuts: list[float] | None = None, sign: int = signal.SIGKILL
) -> None:
    """Run the plan in processes of its own, each ended after so many seconds; the last one to its
    end.
    """
    for cut in [*(cuts or []), None]:
        child = start(plan, record)
        if cut is not None:
            time.sleep(cut)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, sign)
        end(child)


def start(plan: str, record: Path) -> int:
    """Fork a process that measures, and return its number."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        measure(plan, str(record))
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        print(f"{plan}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 1
    finally:
        os._exit(code)


def end(child: int) -> None:
    """Wait for a process, but not for ever."""
    until = time.monotonic() + _LONGEST
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError
        time.sleep(0.002)


_KEYS = """select q.text, p.text, e.kind, t.text, e.radius from evidence e
    join name q on q.id = e.question join name p on p.id = e.point join name t on t.id = e.tool"""


def held(record: Path) -> set[tuple[Any, ...]]:
    """Return the keys of all facts that the file holds, also of those that are passed over."""
    if not record.exists():
        return set()
    with contextlib.closing(sqlite3.connect(record, timeout=30)) as db:
        tables = {name for (name,) in db.execute("select name from sqlite_master")}
        return set(db.execute(_KEYS)) if "evidence" in tables else set()


def bracket(record: Path) -> tuple[Any, ...]:
    """Return the brackets of a record as plain numbers, and the tools that set them."""
    with Record(record, read_only=True) as ledger:
        (asked,) = ledger.questions()
        found = Bracket.of(
            [p.name for p in ledger.points(asked.fingerprint)], ledger.evidence(asked.fingerprint)
        )
    return found.lower.tolist(), found.upper.tolist(), found.lower_tool, found.upper_tool


def wrong(record: Path, before: set[tuple[Any, ...]], expected: tuple[Any, ...]) -> list[str]:
    """Return what is wrong with a record at the end: facts lost, file or chain broken, other
    brackets.
    """
    said = []
    if missing := before - held(record):
        said.append(f"lost: {len(missing)} facts")
    with contextlib.closing(sqlite3.connect(record, timeout=30)) as db:
        if db.execute("pragma integrity_check").fetchone() != ("ok",):
            said.append("corrupt: the file")
    with Record(record, read_only=True) as ledger:
        said += [f"corrupt: {what}" for what in ledger.trust().altered]
    found = bracket(record)
    for i, (a, b) in enumerate(
        zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True)
    ):
        if a != b:
            said.append(f"different: point {i} is {a}, alone {b}")
    return said


def trial(
    kind: str, plan: str, folder: Path, seconds: float, draw: random.Random
) -> tuple[Path, set[tuple[Any, ...]]]:
    """Carry out one trial, and return its record and the facts that it held on the way."""
    record, before = folder / "run.calipers", set[tuple[Any, ...]]()
    if kind == "pair":
        first = start(plan, record)
        time.sleep(draw.uniform(0, 0.5 * seconds))
        second = start(plan, record)
        end(first)
        end(second)
        return record, held(record)
    for _ in range(draw.choice((1, 1, 2, 3))):
        child = start(plan, record)
        time.sleep(draw.uniform(0, 1.05 * seconds))
        os.kill(child, signal.SIGKILL if kind == "kill" else signal.SIGINT)
        end(child)
        before |= held(record)
    forked(plan, record)
    return record, before


def main() -> int:
    """Run the trials, and print how many went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, usual in (("kills", 200), ("interrupts", 100), ("pairs", 50)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plans._POINTS.update(attack=4, certifier=4)  # so that a few points make several blocks
    for module in (queue, query_loop):
        module._SECONDS_BETWEEN_YIELDS = (
            0.01  # and tools hand over what they have at moments of the clock
        )
    draw, names = random.Random(options.seed), options.plans.split(",")
    alone, seconds = dict[str, tuple[Any, ...]](), dict[str, float]()
    count, failed = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        # what is loaded on the way need not be loaded by each process
        measure("quick", f"{folder}/warm")
        for plan in names:
            begun, record = time.monotonic(), Path(folder) / f"{plan}.calipers"
            forked(plan, record)
            alone[plan], seconds[plan] = bracket(record), time.monotonic() - begun
            settled = sum(
                low > 0 or up < float("inf") for low, up in zip(*alone[plan][:2], strict=True)
            )
            print(
                f"{plan}: {seconds[plan]:.1f} s alone, {settled} brackets of {len(alone[plan][0])} "
                "say something",
                flush=True,
            )
        todo = [("kill", options.kills), ("interrupt", options.interrupts), ("pair", options.pairs)]
        for kind, k in [(kind, k) for kind, n in todo for k in range(n)]:
            plan, place = names[k % len(names)], Path(tempfile.mkdtemp(dir=folder))
            try:
                said = wrong(*trial(kind, plan, place, seconds[plan], draw), alone[plan])
            except TimeoutError:
                said = ["stuck"]
            count[kind] += 1
            for what in {text.partition(":")[0] for text in said}:
                failed[f"{kind} {what}"] += 1
            for text in said:
                print(f"{kind} {k} {plan}: {text}", flush=True)
    print(
        ", ".join(f"{n} {kind}s" for kind, n in count.items()),
        "|",
        ", ".join(f"{what}: {n}" for what, n in failed.items()) or "0 lost, 0 corrupt, 0 different",
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
