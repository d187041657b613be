"""Train the small networks on which the tests try attacks and certifiers; seconds of one core.

They learn from the last 400 embedded digits, and the tests ask about the first 100; `small` learns
three classes of points in a cube. Seeds are fixed; run once, the tests read what it writes.

    python scripts/train_reference_nets.py

`scripts/reference_distances.py` then finds the exact distances that stand beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, linear

from calipers import data

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "nets"
HELD_OUT = 100  # embedded digits that no network learns from
BATCH = 80
Loss = Callable[[nn.Sequential, Tensor, Tensor, float], Tensor]


def convolutional() -> nn.Sequential:
    """Return two strided convolutions and two dense layers, 13,494 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(4, 8, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 7 * 7, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Sequential]] = {
    "provable": convolutional,
    "tanh": lambda: nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 12), nn.Tanh(), nn.Linear(12, 10)
    ),
    "small": lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)),
}


def points(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a network learns from and what the tests ask about: x, y, x, y."""
    if name == "small":
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(600, 3, generator=generator)
        y = (x[:, 0] * x[:, 1] > 0.25).long() + (x[:, 2] > 0.6).long()
        return x[40:], y[40:], x[:40], y[:40]
    x, y = data.images()
    return x[HELD_OUT:], y[HELD_OUT:], x[:HELD_OUT], y[:HELD_OUT]


def box(x: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return both ends of the linf ball inside [0, 1]."""
    return (x - radius).clamp(min=0), (x + radius).clamp(max=1)


def intervals(model: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds of the logits from bounds of the input, by interval arithmetic."""
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            centre, spread = layer((low + high) / 2), (high - low) / 2
            if isinstance(layer, nn.Linear):
                spread = linear(spread, layer.weight.abs())
            else:
                spread = conv2d(
                    spread, layer.weight.abs(), stride=layer.stride, padding=layer.padding
                )
            low, high = centre - spread, centre + spread
        else:
            low, high = layer(low), layer(high)
    return low, high


def ordinary(model: nn.Sequential, x: Tensor, y: Tensor, _progress: float) -> Tensor:
    """Return the cross-entropy (scalar)."""
    return cross_entropy(model(x), y)


def certified(model: nn.Sequential, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Return half the cross-entropy, and half that of the worst logits in intervals (scalar).

    The radius grows over the first half of training (Gowal et al. 2018).
    """
    low, high = intervals(model, *box(x, 0.1 * min(1.0, 2 * progress)))
    worst = high.scatter(1, y[:, None], low.gather(1, y[:, None]))
    return (cross_entropy(model(x), y) + cross_entropy(worst, y)) / 2


HOW: dict[str, tuple[Loss, int]] = {
    "provable": (certified, 150),
    "tanh": (ordinary, 150),
    "small": (ordinary, 150),
}
"""What each network minimises, and over how many epochs."""


def trained(name: str) -> nn.Sequential:
    """Return the network, trained from seed 0; digits are moved by up to a pixel every epoch."""
    torch.manual_seed(0)
    model, (loss, epochs), (x, y, _, _) = NETS[name](), HOW[name], points(name)
    steps = epochs * (len(x) // BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=steps)
    for step in range(steps):
        rows = torch.randperm(len(x))[:BATCH]
        batch = x[rows]
        if batch.dim() == 4:
            down, right = torch.randint(-1, 2, (2,)).tolist()
            batch = batch.roll((down, right), (2, 3))
        optimiser.zero_grad()
        loss(model, batch, y[rows], step / steps).backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train every network, store it, and print how often it is right on points it never saw."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in NETS:
        begun = time.process_time()
        model, (_, _, x, y) = trained(name), points(name)
        np.savez_compressed(
            FOLDER / f"{name}.npz", **{k: v.numpy() for k, v in model.state_dict().items()}
        )
        right = int((model(x).argmax(1) == y).sum())
        low, high = intervals(model, *box(x, 0.1)) if name == "provable" else (x, x)
        proved = ""
        if name == "provable":
            worst = high.scatter(1, y[:, None], low.gather(1, y[:, None]))
            proved = f", {int((worst.argmax(1) == y).sum())} certified by intervals at 0.1"
        print(
            f"{name}: {right} of {len(x)} right{proved}; {time.process_time() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
