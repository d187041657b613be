"""Which networks and images ship with calipers? Two small MNIST convnets (`build`) and the first
500 MNIST test images (`images`).

`mnist-plain` was trained in the ordinary way, `mnist-robust` adversarially at linf radius 0.1; both
take pixels in [0, 1], so a radius is in native units. `NOTICE.md` beside this file says how they
were made, the figures they reach and under which licences they stand.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from calipers.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

NAMES = ("mnist-plain", "mnist-robust")


def architecture() -> nn.Sequential:
    """Return the untrained network that both embedded nets share: (N, 1, 28, 28) pixels to (N, 10)
    logits, 40,370 weights.

    Strided convolutions instead of pooling: every layer is affine or a ReLU, so every certificate
    method applies without a rewrite.
    """
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 48), nn.ReLU(),
        nn.Linear(48, 10),
    )  # fmt: skip


def build(name: str) -> nn.Sequential:
    """Return the embedded network `name`, one of `NAMES`: float32, frozen, in eval mode.

    Raises `BadInput` if no network of that name ships with calipers.
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
    """Return the first 500 MNIST test images in official order: x (500, 1, 28, 28) float32 in [0,
    1], y (500,) int64.
    """
    import numpy as np
    import torch

    with (
        (resources.files(__name__) / "mnist_test500.npz").open("rb") as file,
        np.load(file) as digits,
    ):
        x, y = torch.from_numpy(digits["x"]), torch.from_numpy(digits["y"])
    return x.unsqueeze(1).float() / 255, y
