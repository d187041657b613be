"""Does the number of points in flight bound the memory of an attack, however many points there are?

Measured in processes of their own by the largest resident size: what a run adds to what the process
held before it, in MB. A point's own storage (the point, its candidate, the random streams' keys)
grows with the points and is small; the activations of a wide layer grow with the batch and are
large.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from functools import cache

import arsenal
import pytest
from torch import Tensor

FEATURES, WIDTH = 64, 16384  # 0.25 kB a point, 64 kB an activation
RUN = textwrap.dedent(
    """
    import gc, sys
    import torch
    from torch import nn
    from calipers.attacks.engine import queue
    from calipers.attacks.apgd import APGD
    from calipers.threats.ball import Ball
    from calipers.problem.problem import Problem

    name, points, batch, leak = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "leak"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear({features}, {width}), nn.Tanh(), nn.Linear({width}, 3)).eval()
    x = torch.rand(points, {features})
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(16)])
    if leak:  # a loss that is kept with its graph
        kept, true = [], queue.Queue._step
        def step(self, slots, part, *rest):
            kept.append(self.network(slots.x.detach().requires_grad_()).sum())
            return true(self, slots, part, *rest)
        queue.Queue._step = step

    class Narrow(nn.Module):  # the door looks at 256 points at once; a model may split what it is given
        def __init__(self): super().__init__(); self.net = model; self.parts = 16
        def forward(self, x): return torch.cat([self.net(p) for p in x.split(self.parts)])

    narrow = Narrow().eval()
    problem = Problem.pose(narrow, x, y, Ball("linf", 1e-4, box=(0, 1)))
    attack = {{"APGD": APGD(steps=2), "APGD, targets": APGD(steps=1, targets=1)}}[name]
    list(attack(problem.take(list(range(16))), batch=16))  # what every run needs once
    narrow.parts = 10**9
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the largest resident size begins anew
    def status(key):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
    before = status("VmRSS")
    for _ in attack(problem, batch=batch):
        pass
    print((status("VmHWM") - before) / 1024)
    """
).format(features=FEATURES, width=WIDTH)

measurable = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the system does not say how much memory a process took at most",
)


@cache
def added(name: str, points: int, batch: int, leak: str = "no") -> float:
    """Return how many MB a run takes at most beyond what was held before it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, name, str(points), str(batch), leak],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


STORED = 4096 * FEATURES * 4 / 2**20  # MB of one copy of all the points
# of the points that a problem and an attack's book may hold: x, box ends, best, candidates …
COPIES = 16


@pytest.mark.slow
@measurable
@pytest.mark.parametrize("name", ["APGD", "APGD, targets"])
def test_eight_times_the_points_take_no_more_than_their_own_storage(name: str) -> None:
    few, many = added(name, 512, 32), added(name, 4096, 32)
    assert many <= 1.25 * few + COPIES * STORED, (few, many)


@measurable
def test_more_points_in_flight_take_more() -> None:
    small, large = added("APGD", 512, 32), added("APGD", 512, 256)
    assert large >= 3 * small, (small, large)


@measurable
def test_a_kept_graph_is_caught() -> None:
    few, many = added("APGD", 128, 32, "leak"), added("APGD", 512, 32, "leak")
    assert not many <= 1.25 * few + COPIES * STORED, (few, many)


class Counting(arsenal.RowWise):
    """Remembers the most rows it was ever given: of the class, as some attacks work on copies."""

    most = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.most = max(Counting.most, len(x))
        return super().forward(x)


@pytest.mark.parametrize("name", sorted(arsenal.arsenal()))
def test_no_attack_hands_the_model_all_points_at_once(name: str) -> None:
    """256 points, or for a search among ways of switching symbols 4096 of those."""
    attack, threat = arsenal.arsenal()[name]
    problem = arsenal.pose(Counting().eval(), threat, n=600)
    Counting.most = 0
    arsenal.collected(attack, problem)
    assert 100 < Counting.most <= (4096 if threat == "letters" else 256)
