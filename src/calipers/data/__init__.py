"""Embedded data: two small MNIST networks and the first 500 test images.

`mnist-plain` was trained in the ordinary way, `mnist-robust` adversarially at linf radius 0.1. Both
take pixels in [0, 1], so a radius is in native units. `NOTICE.md` beside this file says how they
were made, which accuracies they reach, and their licences.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from calipers.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

NAMES = ("mnist-plain", "mnist-robust")


def architecture() -> nn.Sequential:
    """Return the untrained network that both embedded networks share.

    It maps (N, 1, 28, 28) pixels to (N, 10) logits, with 40,370 weights. Strided convolutions take
    the place of pooling: every layer is affine or a ReLU, so every certificate method applies to
    it.
    """
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 48), nn.ReLU(),
        nn.Linear(48, 10),
    )  # fmt: skip


def build(name: str) -> nn.Sequential:
    """Return an embedded network: float32, frozen, in evaluation mode.

    `name` is one of `NAMES`; raises `BadInput` for any other.
    """
    if name not in NAMES:
        raise BadInput(f"no embedded network is called {name!r}; choose one of {', '.join(NAMES)}")
    from safetensors.torch import load_file

    model = architecture()
    with resources.as_file(
        resources.files(__name__) / f"{name.replace('-', '_')}.safetensors"
    ) as path:
        model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def images() -> tuple[Tensor, Tensor]:
    """Return the first 500 MNIST test images in official order, and labels.

    x is (500, 1, 28, 28) float32 in [0, 1], y is (500,) int64.
    """
    import numpy as np
    import torch

    with (
        (resources.files(__name__) / "mnist_test500.npz").open("rb") as file,
        np.load(file) as digits,
    ):
        x, y = torch.from_numpy(digits["x"]), torch.from_numpy(digits["y"])
    return x.unsqueeze(1).float() / 255, y
