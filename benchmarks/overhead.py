"""What does the run loop cost beside its tools? Bookkeeping of the plan `quick` on a small network,
by the number of points.

Bookkeeping is all processor time outside the tools, the referee and the model: the record, its
chain of digests, the join of evidence. It should grow with the number of points and no faster, and
be a small share of the whole.

    PYTHONPATH=src python benchmarks/overhead.py [--points 1000 4000 16000 64000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

import calipers
from calipers.measurement import ask, run
from calipers.measurement.referee import Referee


class Stopwatch:
    """Adds up the processor seconds inside whatever it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, timed; of calls inside each other the outermost counts."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun, self._depth = time.process_time(), self._depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                self.seconds += (time.process_time() - begun) * (self._depth == 0)

        return timed

    def through(self, make: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return the maker of an iterator, each of whose steps is timed."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            results, ended = make(*args, **kwargs), object()
            step = self.around(lambda: next(results, ended))
            while (result := step()) is not ended:
                yield result

        return timed


def measured(points: int) -> tuple[float, float]:
    """Return the processor seconds of a run on so many points, and those of its bookkeeping."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).eval()
    x = torch.rand(points, 32)
    y, watch = model(x).argmax(1), Stopwatch()
    held = [(Referee, name, getattr(Referee, name)) for name in ("open", "attempt", "claim")] + [
        (run, "gradients", run.gradients),
        (run._Session, "_forecast", run._Session._forecast),
    ]
    answers = ask.answers
    for where, name, call in held:
        setattr(where, name, watch.around(call))
    ask.answers = watch.through(answers)
    try:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            calipers.measure(
                model,
                x,
                y,
                calipers.Ball("linf", 0.05),
                plan="quick",
                record=Path(folder) / "run.calipers",
            )
            whole = time.process_time() - begun
    finally:
        ask.answers = answers
        for where, name, call in held:
            setattr(where, name, call)
    return whole, whole - watch.seconds


def main() -> None:
    """Print a line for each number of points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, nargs="*", default=[1000, 4000, 16000, 64000])
    options = parser.parse_args()
    common.start(str(__doc__).splitlines()[0])
    torch.set_num_threads(1)
    measured(64)  # imports, and the graph's
    for points in options.points:
        whole, books = measured(points)
        print(
            f"  {points:6d} points  {whole:7.2f} s  bookkeeping {books:6.2f} s, "
            f"{books / points * 1e6:6.1f} us a point, {books / whole:5.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
