"""Networks as people have them, in plain modules with random weights: ResNet-18 and WRN-28-10 for
32 x 32, ResNet-50 and a small ViT for 224 x 224, a LeNet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Convolutions with batch norm on one way, the input on the other: two of 3 x 3, or with
    `narrow` a bottleneck of three.
    """

    def __init__(self, inside: int, outside: int, stride: int, narrow: int = 0) -> None:
        super().__init__()
        shapes = (
            [(inside, narrow, 1, 1), (narrow, narrow, 3, stride), (narrow, outside, 1, 1)]
            if narrow
            else [(inside, outside, 3, stride), (outside, outside, 3, 1)]
        )
        self.way = nn.ModuleList(normed(*shape) for shape in shapes)
        self.short = (
            nn.Identity()
            if inside == outside and stride == 1
            else normed(inside, outside, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        z = x
        for i, part in enumerate(self.way):
            z = part(functional.relu(z) if i else z)
        return functional.relu(z + self.short(x))


class Wide(nn.Module):
    """A block of a wide residual network: norm and activation come before each convolution."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)))
        self.convolutions = nn.ModuleList(
            (convolution(inside, outside, 3, stride), convolution(outside, outside, 3, 1))
        )
        self.short = (
            nn.Identity()
            if inside == outside and stride == 1
            else convolution(inside, outside, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        z = functional.relu(self.norms[0](x))
        short = self.short(x if isinstance(self.short, nn.Identity) else z)
        return self.convolutions[1](functional.relu(self.norms[1](self.convolutions[0](z)))) + short


def convolution(inside: int, outside: int, size: int, stride: int) -> nn.Module:
    """Return a convolution that keeps the image's size but for its stride."""
    return nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)


def normed(inside: int, outside: int, size: int, stride: int) -> nn.Module:
    """Return a convolution and its batch norm."""
    return nn.Sequential(convolution(inside, outside, size, stride), nn.BatchNorm2d(outside))


def stacked(
    inside: int, groups: list[tuple[int, int, int]], make: Callable[[int, int, int], nn.Module]
) -> tuple[list[nn.Module], int]:
    """Return groups (channels, blocks, stride) of blocks one after the other, and the channels at
    their end.
    """
    blocks = []
    for channels, count, stride in groups:
        for i in range(count):
            blocks.append(make(inside, channels, stride if i == 0 else 1))
            inside = channels
    return blocks, inside


def headed(layers: list[nn.Module], channels: int, classes: int) -> nn.Module:
    """Return the layers with the usual end of an image network."""
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def resnet18(classes: int = 10) -> nn.Module:
    """The form for 32 x 32: no pooling at the beginning."""
    blocks, last = stacked(64, [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)], Block)
    return headed([normed(3, 64, 3, 1), nn.ReLU(), *blocks], last, classes)


def wrn_28_10(classes: int = 10) -> nn.Module:
    """The network of most leaderboards for 32 x 32."""
    blocks, last = stacked(16, [(160, 4, 1), (320, 4, 2), (640, 4, 2)], Wide)
    return headed(
        [convolution(3, 16, 3, 1), *blocks, nn.BatchNorm2d(last), nn.ReLU()], last, classes
    )


def resnet50(classes: int = 1000) -> nn.Module:
    """The form for 224 x 224."""
    groups = [(256, 3, 1), (512, 4, 2), (1024, 6, 2), (2048, 3, 2)]
    blocks, last = stacked(
        64, groups, lambda inside, outside, stride: Block(inside, outside, stride, outside // 4)
    )
    return headed([normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks], last, classes)


class ViT(nn.Module):
    """A vision transformer of patches of 16 x 16, mean pooling in place of a class token."""

    def __init__(
        self, wide: int = 192, depth: int = 12, heads: int = 3, classes: int = 1000
    ) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, wide, 16, 16)
        self.place = nn.Parameter(0.02 * torch.randn(1, 196, wide))
        self.layers = nn.ModuleList(Layer(wide, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 224, 224) -> (N, classes)."""
        z = self.cut(x).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            z = layer(z)
        return self.head(self.norm(z).mean(1))


class Layer(nn.Module):
    """Attention and two dense layers, each behind a norm and beside its input."""

    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.heads, self.all = heads, nn.Linear(wide, 3 * wide)
        self.norms = nn.ModuleList((nn.LayerNorm(wide), nn.LayerNorm(wide)))
        self.out, self.up, self.down = (
            nn.Linear(wide, wide),
            nn.Linear(wide, 4 * wide),
            nn.Linear(4 * wide, wide),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, d) -> (N, T, d)."""
        _, count, wide = x.shape
        query, key, value = (
            t.reshape(-1, count, self.heads, wide // self.heads).transpose(1, 2)
            for t in self.all(self.norms[0](x)).split(wide, 2)
        )
        weights = (query @ key.transpose(2, 3) * (wide // self.heads) ** -0.5).softmax(3)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(-1, count, wide))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


def lenet() -> nn.Module:
    """The usual kind for 28 x 28."""
    layers = [
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 7 * 7, 200), nn.ReLU(), nn.Linear(200, 10)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "ResNet-18": (resnet18, (3, 32, 32)),
    "WRN-28-10": (wrn_28_10, (3, 32, 32)),
    "ResNet-50": (resnet50, (3, 224, 224)),
    "ViT": (ViT, (3, 224, 224)),
}


def made(name: str, points: int, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network with random weights, and random images with the classes that it gives
    them.
    """
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    model, x = build().eval(), torch.rand(points, *shape)
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(1)])
    return model, x, y
