"""Which networks do the benchmarks train themselves? A residual one, two with smooth activations
and a small vision transformer, on MNIST digits.

Trained once, half a minute each, on the 60,000 training images where they are beside the project
(the embedded 500 otherwise), and kept in build/.

    PYTHONPATH=src python benchmarks/trained.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

KEPT = Path(__file__).resolve().parents[1] / "build" / "networks"


class Block(nn.Module):
    """Two convolutions with batch norm, and the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return functional.relu(
            x + self.norms[1](self.second(functional.relu(self.norms[0](self.first(x)))))
        )


class Encoder(nn.Module):
    """Attention over 16 tokens, then two layers on each token; batch norm in the place of layer
    norm, as in the vision transformers of VNN-COMP.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.before, self.between = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.rise, self.fall = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        t = self.before(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (self._split(layer(t)) for layer in (self.query, self.key, self.value))
        mixed = torch.matmul(
            torch.softmax(
                torch.matmul(q, k.transpose(2, 3)) / (self.width / self.heads) ** 0.5, -1
            ),
            v,
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(-1, 16, self.width))
        t = self.between(x.transpose(1, 2)).transpose(1, 2)
        return x + self.fall(functional.relu(self.rise(t)))

    def _split(self, t: Tensor) -> Tensor:
        return t.reshape(-1, 16, self.heads, self.width // self.heads).transpose(1, 2)


class Tokens(nn.Module):
    """16 patches of 7 x 7 pixels, each a vector, with its place added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.place = (
            nn.Conv2d(1, width, 7, stride=7),
            nn.Parameter(torch.zeros(1, 16, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, 16, width)."""
        return self.patch(x).flatten(2).transpose(1, 2) + self.place


class Mean(nn.Module):
    """The mean over all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, width)."""
        return x.mean(1)


def _dense(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 100),
        activation(),
        nn.Linear(100, 100),
        activation(),
        nn.Linear(100, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=4, padding=2),
        nn.ReLU(),
        Block(8),
        Block(8),
        nn.Flatten(),
        nn.Linear(392, 10),
    ),
    "sigmoid": lambda: _dense(nn.Sigmoid),
    "tanh": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(392, 10),
    ),
    "vit": lambda: nn.Sequential(Tokens(16), Encoder(16, 2), Mean(), nn.Linear(16, 10)),
}


def network(name: str) -> nn.Module | None:
    """Return a network trained here, or one of `common.network`."""
    if name not in NETWORKS:
        return common.network(name)
    torch.manual_seed(0)
    model, kept = NETWORKS[name](), KEPT / f"{name}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        _train(model)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    return model.eval().requires_grad_(False)


def _train(model: nn.Module) -> None:
    """Two passes, a little noise added to every image."""
    path = common.DATA / "data" / "mnist_train_60k.npz"
    if path.exists():
        with np.load(path) as arrays:
            x, y = (
                torch.tensor(arrays["x"]).float()[:, None] / 255,
                torch.tensor(arrays["y"]).long(),
            )
    else:
        x, y = common.digits(500)
    rounds = 2 if path.exists() else 20
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 6e-3, total_steps=rounds * -(-len(x) // 128)
    )
    for _ in range(rounds):
        for place in torch.randperm(len(x)).split(128):
            noisy = (x[place] + 0.1 * torch.randn(len(place), 1, 28, 28)).clamp(0, 1)
            optimiser.zero_grad()
            functional.cross_entropy(model(noisy), y[place]).backward()
            optimiser.step()
            schedule.step()


def main() -> None:
    """Train what is not kept, and print the share of the embedded digits that each gets right."""
    common.start("Networks trained for the benchmarks")
    for name in NETWORKS:
        model, (x, y) = network(name), common.digits(500)
        assert model is not None
        with torch.no_grad():
            print(
                f"{name:9} {sum(p.numel() for p in model.parameters()):7} weights, "
                f"{float((model(x).argmax(1) == y).float().mean()):.1%} of 500 digits"
            )


if __name__ == "__main__":
    main()
