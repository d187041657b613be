"""What does the run loop cost beside its tools? Bookkeeping of the plan `quick` on the embedded
network and on one of two hidden layers of 64, and of exact distances on a tiny one, by the number
of points.

Bookkeeping is all processor time outside the tools, the referee and the model: the record, its
chain of digests, the join of evidence. It should grow with the number of points and no faster, and
be a small share of the whole.

    PYTHONPATH=src python benchmarks/overhead.py [--points 1000 4000 16000] [--exact 50 100 200]
                                                 [--embedded 1000 4000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

import calipers
from calipers import data
from calipers.api.measure import measure_exactly
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


def embedded(points: int) -> tuple[float, float]:
    """Return the same of the embedded robust network, on noisy copies of its digits."""
    x, _ = calipers.load_data(None)
    draw = torch.Generator().manual_seed(0)
    x = x[torch.arange(points) % len(x)]
    x = (x + 0.02 * torch.randn(x.shape, generator=draw)).clamp(0, 1)
    model = data.build("mnist-robust")
    return books(model, x, 0.1, partial(calipers.measure, plan="quick"))


def quickly(points: int) -> tuple[float, float]:
    """Return the processor seconds of the plan `quick` on so many points, and of its books."""
    return books(*dense(points, 32, 64), 0.05, partial(calipers.measure, plan="quick"))


def exactly(points: int) -> tuple[float, float]:
    """Return the processor seconds of exact distances of so many points, and of their books."""
    one = calipers.Plan(
        "one", (calipers.Stage(calipers.attacks.FMN(steps=20), "attack", "distance"),)
    )
    return books(*dense(points, 6, 6), 0.05, partial(measure_exactly, plan=one))


def dense(points: int, inputs: int, width: int) -> tuple[nn.Module, torch.Tensor]:
    """Return a network of two hidden layers with random weights, and random points."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    ).eval()
    return model, torch.rand(points, inputs)


def books(
    model: nn.Module, x: torch.Tensor, radius: float, ask_for: Callable[..., Any]
) -> tuple[float, float]:
    """Return the processor seconds of a run on these points, and those of its bookkeeping."""
    with torch.no_grad():
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
            record = Path(folder) / "run.calipers"
            ask_for(model, x, y, calipers.Ball("linf", radius), record=record)
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
    parser.add_argument("--embedded", type=int, nargs="*", default=[1000, 4000])
    parser.add_argument("--exact", type=int, nargs="*", default=[50, 100, 200])
    options = parser.parse_args()
    common.start(str(__doc__).splitlines()[0])
    torch.set_num_threads(1)
    quickly(64)  # imports, and the graph's
    for what, measure, counts in (
        ("embedded", embedded, options.embedded),
        ("quick", quickly, options.points),
        ("exact", exactly, options.exact),
    ):
        for points in counts:
            whole, books = measure(points)
            print(
                f"  {what:8} {points:6d} points  {whole:7.2f} s  bookkeeping {books:6.2f} s, "
                f"{books / points * 1e6:6.1f} us a point, {books / whole:5.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
