"""Hints from SCIP about a network's mixed-integer program, unverified.

SCIP solves mixed-integer programs over Euclidean balls, which HiGHS refuses. It runs in a process
of its own, and of its search tree only the branches are kept in which it ended. Nothing that SCIP
says is trusted: points are run through the model, and whatever the branches are, `covering` turns
them into branches that leave nothing out, each of which needs a proof like any other.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from calipers.certificates.exact.model import Choice, MIPModel
from calipers.certificates.exact.scip_process import Hints, SCIPJob, Way
from calipers.errors import BadInput
from calipers.threats.region import Region

_STARTING = 5.0  # seconds for the process to begin, and to end
_LOOK = 0.05  # seconds between two calls of `stop`
_ROOM = 1e-9  # share of a constant's size by which it is made larger than necessary
_ASK = "from calipers.certificates.exact.scip_process import serve; serve()"


def check_scip() -> None:
    """Raise `BadInput` where SCIP is not installed."""
    if find_spec("pyscipopt") is None:
        raise BadInput(
            "MILP(hints='SCIP') needs the package pyscipopt, which is not installed here: pip "
            "install 'calipers[scip]', or leave `hints` out"
        )


def hinted(
    model: MIPModel, region: Region, radius: float, seconds: float, stop: Callable[[], bool]
) -> Iterator[Hints]:
    """Ask SCIP about every goal of a model, and yield its hints.

    It looks within the radius, until the time is up or `stop` says so.
    """
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    question = question_of(model, region, radius, seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", _ASK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    told: SimpleQueue[Hints | None] = SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, question, told), daemon=True)
    reader.start()
    ends = time.monotonic() + seconds + _STARTING
    try:
        while time.monotonic() < ends and not stop():
            try:
                hints = told.get(timeout=_LOOK)
            except Empty:
                continue
            if hints is not None:
                yield hints
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STARTING)
            if code := process.returncode:
                warnings.warn(
                    f"SCIP's process ended early with code {code}: the search goes on without the "
                    "hints that are lacking",
                    stacklevel=2,
                )
            return
    finally:
        process.kill()
        reader.join()
        process.wait()


def _read(
    process: subprocess.Popen[bytes], question: SCIPJob, told: SimpleQueue[Hints | None]
) -> None:
    """Put the hints that a process writes into a queue, then None.

    None is put in also where the process dies half-way.
    """
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin, process.stdout:
            pickle.dump(question, process.stdin)
            process.stdin.close()
            while True:
                told.put(pickle.load(process.stdout))
    except (EOFError, OSError, pickle.UnpicklingError):
        told.put(None)


def question_of(model: MIPModel, region: Region, radius: float, seconds: float) -> SCIPJob:
    """Return a model as numbers for SCIP, with big-M constants.

    The constants relax the row of an option where another option is chosen.
    """
    weight = (
        np.ones(len(model.reach)) if region.weight is None else region.weight.double().cpu().numpy()
    )
    floor, ceiling = (end[0].double().cpu().numpy() for end in (region.low, region.high))
    power = 2.0 if region.norm.is_euclidean else 1.0 if region.norm.is_sparse else np.inf
    choices = [_ways(model, choice) for choice in model.choices]
    ends = model.low_row, model.high_row, model.low, model.high
    return SCIPJob(
        model.inputs,
        model.columns,
        *ends,
        choices,
        power,
        weight,
        floor,
        ceiling,
        list(model.goals.values()),
        radius,
        seconds,
    )


def _ways(model: MIPModel, choice: Choice) -> list[Way]:
    """Return a choice's options with the big-M constants of their rows.

    They are how far each option's row may be from its equation where another option is chosen.
    """
    ways, y = [], choice.value
    for k, option in enumerate(choice.options):
        if option.z < 0:
            lowest = min(model.low[m] for m in choice.members)
            ways.append(
                Way(
                    option.row,
                    option.at,
                    0.0,
                    float(model.high[y] - lowest) * (1 + _ROOM),
                    -1,
                    0.0,
                    0.0,
                )
            )
            continue
        slope, apart = -model.columns[option.row, option.z], [0.0]
        for other in (o for j, o in enumerate(choice.options) if j != k):
            tilt = -model.columns[other.row, other.z] - slope
            ends = max(other.low, model.low[other.z]), min(other.high, model.high[other.z])
            apart += [tilt * z + other.at - option.at for z in ends if np.isfinite(z)]
        room = _ROOM * max(map(abs, apart))
        ways.append(
            Way(
                option.row,
                option.at,
                room - min(apart),
                room + max(apart),
                option.z,
                option.low,
                option.high,
            )
        )
    return ways


def covering(options: list[int], branches: list[dict[int, int]]) -> list[dict[int, int]]:
    """Return disjoint branches, choice -> option, that cover all choices.

    They do so however wrong the given branches are. Where those are the leaves of a tree of such
    choices, they are returned. `options` is the number of options of each choice.
    """
    done, todo = list[dict[int, int]](), [(dict[int, int](), branches)]
    while todo:
        made, inside = todo.pop()
        asked = Counter(
            choice
            for branch in inside
            for choice in branch
            if choice not in made and 0 <= choice < len(options)
        )
        if not asked or any(set(branch) <= set(made) for branch in inside):
            done.append(made)
            continue
        ((choice, _),) = asked.most_common(1)
        for option in range(options[choice]):
            todo.append(
                ({**made, choice: option}, [b for b in inside if b.get(choice, option) == option])
            )
    return done
