"""Which networks does the grid of strength train itself? Seven small ones on MNIST digits, each
robust, or deceptive, in a way of its own.

Attacks that were tuned on networks of one kind are blind on others: so there is one trained
plainly, one each on PGD examples in linf, l2 and l1, one on examples of a single step until
training collapses (catastrophic overfitting: robust to one step, and to little else), one provably
(interval bounds), and one with max-pool, tanh and saturating ends. Each takes seconds to a minute
of one thread, and is kept in a folder outside the project.

    PYTHONPATH=src python benchmarks/grid_nets.py
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from calipers.threats.ball import Ball

KEPT = Path(
    os.environ.get("CALIPERS_GRID_NETS", Path(tempfile.gettempdir()) / "calipers-grid-nets")
)
BATCH = 100

Loss = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
"""(model, x, y, how far training has come, from 0 to 1) -> the loss to fall."""


class Saturating(nn.Module):
    """Ends that saturate: logits 8 tanh(z / 4), whose gradients all but vanish where the network is
    sure.
    """

    def forward(self, z: Tensor) -> Tensor:
        """(N, K) -> (N, K)."""
        return 8 * torch.tanh(z / 4)


def small() -> nn.Sequential:
    """Return two strided convolutions and two dense layers, 8,600 weights in the convolutions'
    part.
    """
    convolutions = (
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
    )
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(784, 40), nn.ReLU(), nn.Linear(40, 10)
    )


def pooled() -> nn.Sequential:
    """Return the network with max-pool, tanh and saturating ends."""
    first, second = (
        (nn.Conv2d(1, 8, 5, padding=2), nn.MaxPool2d(2), nn.Tanh()),
        (nn.Conv2d(8, 16, 5, padding=2), nn.MaxPool2d(2), nn.Tanh()),
    )
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(784, 10), Saturating())


def plainly(model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Return the cross-entropy on the images themselves."""
    return functional.cross_entropy(model(x), y)


def against(norm: str, radius: float, steps: int, share: float) -> Loss:
    """Return the cross-entropy on PGD examples (Madry et al. 2018); the radius grows over the first
    third of training.
    """

    def loss(model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
        region = Ball(norm, radius * min(1.0, 0.05 + 3 * progress)).region(x)
        z = x if steps == 1 else region.project(x + 0.01 * torch.randn_like(x))
        for _ in range(steps):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y), z)
            z = region.project(region.step(z.detach(), gradient, share))
        return functional.cross_entropy(model(z), y)

    return loss


def provably(radius: float) -> Loss:
    """Return the cross-entropy of the worst logits by intervals (Gowal et al. 2018), mixed with the
    plain one while weight and radius grow.
    """

    def loss(model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
        share = min(1.0, 1.5 * progress)
        low, high = (x - share * radius).clamp(0, 1), (x + share * radius).clamp(0, 1)
        assert isinstance(model, nn.Sequential)
        for layer in model:
            middle, half = (low + high) / 2, (high - low) / 2
            if isinstance(layer, nn.Conv2d | nn.Linear):
                linear = functional.linear if isinstance(layer, nn.Linear) else _convolved(layer)
                middle, half = layer(middle), linear(half, layer.weight.abs())
                low, high = middle - half, middle + half
            else:
                low, high = layer(low), layer(high)
        own = functional.one_hot(y, 10).bool()
        return (1 - share / 2) * plainly(
            model, x, y, progress
        ) + share / 2 * functional.cross_entropy(torch.where(own, low, high), y)

    return loss


def _convolved(layer: nn.Conv2d) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: functional.conv2d(
        x, weight, stride=layer.stride, padding=layer.padding
    )  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recipe:
    """An architecture, what training makes fall, on how many images, and how often it sees them."""

    build: Callable[[], nn.Sequential]
    loss: Loss
    images: int = 10_000
    passes: int = 4


OWN: dict[str, Recipe] = {
    "own-plain": Recipe(small, plainly),
    "own-linf": Recipe(small, against("linf", 0.25, 6, 0.35), passes=6),
    "own-l2": Recipe(small, against("l2", 2.0, 6, 0.4), passes=6),
    "own-l1": Recipe(small, against("l1", 10.0, 8, 0.3), passes=5),
    "own-one-step": Recipe(small, against("linf", 0.35, 1, 1.0), passes=12),
    "own-provable": Recipe(small, provably(0.15), passes=12),
    "own-pooled": Recipe(pooled, plainly),
}


def network(name: str) -> nn.Module | None:
    """Return a network of this file, trained now unless it is kept, or one of `common.network`;
    None, with a message, where its files are absent.
    """
    if name not in OWN:
        return common.network(name)
    kept = KEPT / f"{name}.pt"
    torch.manual_seed(0)
    model = OWN[name].build()
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        digits = training(OWN[name].images)
        if digits is None:
            return None
        train(model, OWN[name], *digits)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    return model.eval().requires_grad_(False)


def training(count: int) -> tuple[Tensor, Tensor] | None:
    """Return the first training images; None, with a message, where they are absent."""
    path = common.DATA / "data" / "mnist_train_60k.npz"
    if not path.exists():
        print(f"no {path.name} among the published data: the grid's own networks are skipped")
        return None
    with np.load(path) as arrays:
        return torch.tensor(arrays["x"][:count]).float()[:, None] / 255, torch.tensor(
            arrays["y"][:count]
        ).long()


def train(model: nn.Module, recipe: Recipe, x: Tensor, y: Tensor) -> None:
    """Train in place, Adam with one cycle of its rate."""
    total = recipe.passes * -(-len(x) // BATCH)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=total)
    done = 0
    for _ in range(recipe.passes):
        for place in torch.randperm(len(x)).split(BATCH):
            loss = recipe.loss(model, x[place], y[place], done / total)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += 1


def main() -> None:
    """Train what is not kept, and print what each gets right: of digits, of digits after one step
    in linf 0.2, and after 20 steps.
    """
    common.start("Networks of the grid of strength")
    torch.set_num_threads(1)
    x, y = common.digits(300)
    for name in OWN:
        begin = time.process_time()
        model = network(name)
        if model is None:
            return
        taken = time.process_time() - begin
        rights = [float((model(x).argmax(1) == y).float().mean())]
        for steps, share in ((1, 1.0), (20, 0.15)):
            region, z = Ball("linf", 0.2).region(x), x.clone()
            for _ in range(steps):
                z.requires_grad_()
                (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y), z)
                z = region.project(region.step(z.detach(), gradient, share))
            rights.append(float((model(z).argmax(1) == y).float().mean()))
        print(
            f"{name:14} {taken:6.1f} s of training; right: {rights[0]:.1%}, after one step "
            f"{rights[1]:.1%}, after 20 steps {rights[2]:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
