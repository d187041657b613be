"""Does the default plan come back from everyday networks? Seconds of its attacks alone, of all of
it, their ratio, and the memory it took at most.

Each row runs in a process of its own; processor seconds count. ResNet-18 and WRN-28-10 see random
images of 3 x 32 x 32, ResNet-50 and a small vision transformer of 3 x 224 x 224, all with random
weights. The LeNet is trained here against linf 0.3 (two minutes, kept in the folder of temporary
files) and sees MNIST digits: of it the share of the lower jaw counts, and what it proves.

    PYTHONPATH=src python benchmarks/large.py [--only ResNet-18 LeNet] [--points 8] \\
        [--radius 1e-4 8/255]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from fractions import Fraction
from pathlib import Path

import common
import everyday
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import calipers
from calipers.presets import plan_for
from calipers.progress import Progress

ROWS = [
    ("ResNet-18", 8, "1e-4"),
    ("ResNet-18", 8, "8/255"),
    ("WRN-28-10", 4, "8/255"),
    ("ResNet-50", 4, "1/255"),
    ("ViT", 4, "1/255"),
    ("LeNet", 40, "0.3"),
]
# whole run over attacks alone; of the lower jaw, on the LeNet; GiB
RATIO, SHARE, ROOM = 2.2, 0.5, 6.0


def trained() -> nn.Module:
    """Return the LeNet, trained in this folder of temporary files once."""
    model, kept = everyday.lenet(), Path(tempfile.gettempdir()) / "calipers-lenet-0.3.pt"
    if not kept.exists():
        with np.load(common.DATA / "data" / "mnist_train_60k.npz") as arrays:
            x, y = (
                torch.tensor(arrays["x"]).float()[:, None] / 255,
                torch.tensor(arrays["y"]).long(),
            )
        torch.manual_seed(0)
        model = everyday.lenet()
        _train(model, x, y, steps=600)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


def _train(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, radius: float = 0.3) -> None:
    """Train against a few steps of projected ascent, in a ball that grows to its radius in the
    first half.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        chosen = torch.randint(len(x), (64,))
        reach = radius * min(1.0, 2 * step / steps)
        low, high = (x[chosen] - reach).clamp(0, 1), (x[chosen] + reach).clamp(0, 1)
        point = low + torch.rand_like(low) * (high - low)
        for _ in range(4):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(
                functional.cross_entropy(model(point), y[chosen]), point
            )
            point = (point.detach() + reach / 2 * gradient.sign()).clamp(low, high)
        optimiser.zero_grad()
        functional.cross_entropy(model(point), y[chosen]).backward()
        optimiser.step()


def posed(name: str, points: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, images and labels."""
    if name != "LeNet":
        return everyday.made(name, points)
    model = trained()
    x, y = common.digits(4 * points)
    x, y = common.right(model, x, y)
    return model, x[:points], y[:points]


class Stages:
    """Notes the processor time at which each stage begins."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, float]] = []

    def __call__(self, now: Progress) -> None:
        """Note where another stage is at work."""
        if now.stage and (not self.begun or self.begun[-1][0] != now.stage):
            self.begun.append((now.stage, time.process_time()))

    def lower(self) -> float:
        """Return the seconds of the stages of the lower jaw."""
        ends = [*(at for _, at in self.begun[1:]), time.process_time()]
        return sum(
            end - at
            for (name, at), end in zip(self.begun, ends, strict=True)
            if name.startswith(("IBP", "CROWN"))
        )


def alone(name: str, points: int, radius: str, which: str) -> None:
    """Measure one row, by the attacks of the plan or all of it, and print the figures."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    threat = calipers.Ball("linf", float(Fraction(radius)))
    plan = plan_for(threat, "standard")
    if which == "attacks":
        plan = dataclasses.replace(plan, stages=tuple(s for s in plan.stages if s.kind == "attack"))
    model, x, y = posed(name, points)
    begun, stages = time.process_time(), Stages()
    result = calipers.measure(model, x, y, threat, plan=plan, progress=stages)
    seconds, lower = time.process_time() - begun, stages.lower()
    figures = {
        "seconds": seconds,
        "lower": lower,
        "certified": result.robust_accuracy.certified.count,
        "attacked": result.robust_accuracy.attacked.count,
    }
    print(
        json.dumps(
            {
                **figures,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "said": str(result),
            }
        )
    )


def child(name: str, points: int, radius: str, which: str) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    arguments = [sys.executable, __file__, "--alone", name, str(points), radius, which]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> int:
    """Print a row for each network; return 1 where one falls short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--points", type=int)
    parser.add_argument("--radius", nargs="*", help="in place of the usual ones")
    parser.add_argument(
        "--once",
        action="store_true",
        help="take the attacks' time from the whole run, in place of one of their own",
    )
    parser.add_argument("--said", action="store_true", help="print what each run said, too")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(given.alone[0], int(given.alone[1]), given.alone[2], given.alone[3])
        return 0
    common.start("the default plan on everyday networks: processor seconds, one thread")
    print(
        f"  {'network':10} {'points':>6} {'linf':>7}  {'attacks':>8} {'whole':>8} {'ratio':>6} "
        f"{'lower':>6}  {'certified':>9} {'attacked':>8}  {'peak GiB':>8}"
    )
    short = 0
    for name, points, radius in ROWS:
        if (given.only and name not in given.only) or (given.radius and radius not in given.radius):
            continue
        count = given.points or points
        whole = child(name, count, radius, "whole")
        attacks = (
            {**whole, "seconds": whole["seconds"] - whole["lower"]}
            if given.once
            else child(name, count, radius, "attacks")
        )
        ratio, peak, share = (
            whole["seconds"] / attacks["seconds"],
            max(attacks["peak"], whole["peak"]),
            1 - attacks["seconds"] / whole["seconds"],
        )
        short += ratio > RATIO or peak > ROOM or (name == "LeNet" and share > SHARE)
        print(f"  {name:10} {count:6d} {radius:>7}  {attacks['seconds']:8.1f} "
              f"{whole['seconds']:8.1f} {ratio:6.2f} {share:6.0%}  {whole['certified']:9.0f} "
              f"{whole['attacked']:8.0f}  {peak:8.2f}",
              flush=True)  # fmt: skip
        print(whole["said"] if given.said else "", end="\n" if given.said else "", flush=True)
    print(
        f"at most {RATIO} and {ROOM:.0f} GiB, the lower jaw of the LeNet at most {SHARE:.0%}: "
        f"{short} rows fall short"
    )
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main())
