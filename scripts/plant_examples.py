"""Which networks hide counterexamples that a certifier must not miss? Small ones trained to be
right all around each point, but for one planted input.

After SoundnessBench (Zhou et al. 2024, arXiv:2412.03154): every point has one planted input near
the edge of its box that has to be misclassified, while random inputs of the box and what gradient
ascent finds there are trained to be right. Run once; the tests read what it writes.

    python scripts/plant_examples.py tests/hidden.npz
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

POINTS, RADIUS, ROUNDS = 24, 0.2, 1500
SHOWN = 16  # inputs of each box that are shown to be right, every round
ROOM = 0.02  # of the margin that both sides are trained to keep

NETS: dict[str, Callable[[], nn.Sequential]] = {
    "dense 3": lambda: nn.Sequential(
        nn.Linear(3, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3)
    ),
    "dense 5": lambda: nn.Sequential(
        nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)
    ),
    "deep 4": lambda: nn.Sequential(
        nn.Linear(4, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 3),
    ),
    "wide 2": lambda: nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 3)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 3),
    ),
}
INPUTS = {"dense 3": 3, "dense 5": 5, "deep 4": 4, "wide 2": 2, "conv": 16}


def worst(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the worst margins (M,)."""
    logits = net(x)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return logits.gather(1, y[:, None])[:, 0] - others.amax(1)


def climbed(net: nn.Module, x: Tensor, y: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return inputs of the boxes around x that lower the margins, from `start`, by projected
    gradient ascent.
    """
    point = start
    for k in range(steps):
        point = point.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(worst(net, point, y).sum(), point)
        step = RADIUS / 2 / (1 + k)
        point = torch.minimum(
            torch.maximum(point - step * g.sign(), x - RADIUS), x + RADIUS
        ).detach()
    return point


def planted(name: str, seed: int) -> dict[str, np.ndarray]:
    """Train one network, and return its weights, points, labels and planted inputs."""
    torch.manual_seed(seed)
    net, d = NETS[name](), INPUTS[name]
    x = torch.rand(POINTS, d) * 4 - 2
    y = torch.randint(3, (POINTS,))
    apart = (x[:, None] - x).abs().amax(-1) + 9 * torch.eye(POINTS)
    y = torch.where(apart.amin(1) < 2 * RADIUS, y[0], y)  # boxes that overlap agree
    offset = (0.97 + 0.03 * torch.rand(POINTS, d)) * torch.randn(POINTS, d).sign() * RADIUS
    bad = x + offset
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=ROUNDS)
    many, label = x.repeat(SHOWN, 1), y.repeat(SHOWN)
    for _ in range(ROUNDS):
        free = many + RADIUS * (2 * torch.rand_like(many) - 1)
        near = climbed(net, many[: 4 * POINTS], label[: 4 * POINTS], free[: 4 * POINTS], 3)
        shown = torch.cat([free, near])
        same = torch.cat([label, label[: 4 * POINTS]])
        clear = (shown - bad.repeat(len(shown) // POINTS, 1)).abs().amax(
            1
        ) > 0.5 * RADIUS  # right around the planted input nothing is asked
        loss = (
            relu(ROOM - worst(net, shown, same))[clear].mean() * 5
            + relu(worst(net, bad, y) + ROOM).mean()
            + relu(10 * ROOM - worst(net, x, y)).mean()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return _kept(net, x, y, bad)


def _kept(net: nn.Sequential, x: Tensor, y: Tensor, bad: Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        kept = (worst(net, bad, y) < 0) & (worst(net, x, y) > 0)
    start = x + RADIUS * (2 * torch.rand_like(x) - 1)
    found = worst(net, climbed(net, x, y, start, 20), y)[kept] <= 0
    print(
        f"  kept {int(kept.sum())} of {len(x)}; one run of gradient ascent finds an example at "
        f"{int(found.sum())}"
    )
    arrays = {f"net.{k}": v.detach().numpy() for k, v in net.state_dict().items()}
    return arrays | {"x": x[kept].numpy(), "y": y[kept].numpy(), "bad": bad[kept].numpy()}


def main(path: str) -> None:
    """Write all networks into one file."""
    arrays = {}
    for seed, name in enumerate(NETS):
        print(name)
        arrays.update({f"{name}/{k}": v for k, v in planted(name, seed).items()})
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
