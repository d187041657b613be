"""How were the networks in `calipers.data` made? This script trains both, takes the image sample
and writes the four data files.

    OMP_NUM_THREADS=1 python scripts/train_embedded.py

* `mnist-plain` minimises cross-entropy on clean images.
* `mnist-robust` is adversarially trained (Madry et al. 2018, equation 2.1): cross-entropy on PGD
  examples at
  linf radius 0.1. A ReLU-stability
  loss (Xiao et al. 2019) is added so that linear relaxations are less loose on it. Its pre-activation bounds are naive interval arithmetic;
  unlike Xiao et al. we use neither an L1 penalty nor weight pruning.

Needs the MNIST arrays named in `SOURCE` (uint8 x (N, 28, 28), y (N,)). Seeds are fixed and one
thread is used: the same torch build on the same kind of processor gives the same weights. The
settings were chosen on MNIST test images 500 to 1499, none of which is shipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, linear

from calipers.data import architecture

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT.parent / "shared" / "data" / "data"
TARGET = ROOT / "src" / "calipers" / "data"
RADIUS = 0.1
STABILITY_WEIGHT = 2e-4
BATCH, PLAIN_EPOCHS, ROBUST_EPOCHS = 128, 5, 8
SAMPLE = 500

NOTICE = """\
# Notice for the data that ship with calipers

The four files listed here are written by `scripts/train_embedded.py`.

| file | what it is | licence |
|---|---|---|
| `mnist_plain.safetensors` | float32 weights of `mnist-plain`: ordinary training (cross-entropy on clean images) | Apache-2.0 |
| `mnist_robust.safetensors` | float32 weights of `mnist-robust`: adversarial training, see below | Apache-2.0 |
| `mnist_test500.npz` | the first {sample} MNIST test images in official order: x uint8 ({sample}, 28, 28), y int64 ({sample},) | CC BY-SA 3.0 |
| `NOTICE.md` | this notice | Apache-2.0 |

**Images.** MNIST is by Yann LeCun and Corinna Cortes and derives from data sets of NIST. It stands under the Creative Commons
Attribution-ShareAlike 3.0 licence (<https://creativecommons.org/licenses/by-sa/3.0/>). The sample was cut and repackaged, its pixels are unchanged.

**Networks.** Both share one architecture (`calipers.data.architecture`), take pixels in [0, 1] and were trained on the 60,000 MNIST training images.
`mnist-robust` minimises cross-entropy on PGD-7 examples at linf radius {radius} (Madry et al. 2018). One regulariser is added: the ReLU-stability
loss of Xiao et al. 2019 on interval bounds, weight {weight:g},
which makes linear relaxations less loose. No bound of the margins is trained, so the net
is adversarially trained and not certifiably trained.

Accuracy on the {sample} images; PGD: 100 steps, one random start, linf radius {radius},
an upper bound of the robust accuracy and nothing more.

| network | clean | PGD |
|---|---|---|
{figures}
"""

Loss = Callable[[nn.Sequential, Tensor, Tensor, float], Tensor]


def read_digits(name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return x (N, 28, 28) uint8 and y (N,) int64 of one file in `SOURCE`; stops with a message if
    it is absent.
    """
    path = SOURCE / name
    if not path.is_file():
        raise SystemExit(
            f"{name} is needed and was not found: put it at {path} (keys x: uint8 (N, 28, 28), y: "
            "(N,))"
        )
    with np.load(path) as digits:
        return digits["x"], digits["y"].astype(np.int64)


def pixels(x: NDArray[np.uint8]) -> Tensor:
    """Return x (N, 28, 28) uint8 as (N, 1, 28, 28) float32 in [0, 1]."""
    return torch.from_numpy(x).unsqueeze(1).float() / 255


def pgd(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int) -> Tensor:
    """Return the last iterate of projected gradient ascent on cross-entropy from a random start,
    inside the linf ball and [0, 1].

    The step 2.5 radius / steps lets an iterate cross the whole ball (as in Madry et al. 2018).
    """
    low, high = (x - radius).clamp(min=0), (x + radius).clamp(max=1)
    adversarial = low + (high - low) * torch.rand_like(x)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(model(adversarial), y), adversarial)
        stepped = adversarial.detach() + 2.5 * radius / steps * gradient.sign()
        adversarial = torch.minimum(torch.maximum(stepped, low), high)
    return adversarial


def instability(model: nn.Sequential, x: Tensor, radius: float) -> Tensor:
    """Return the ReLU-stability loss: -tanh(1 + lower * upper) summed over the ReLUs, averaged over
    the batch (scalar).

    A ReLU whose input interval [lower, upper] excludes zero is linear on the whole ball, and no
    relaxation loses anything there.
    """
    lower, upper = (x - radius).clamp(min=0), (x + radius).clamp(max=1)
    total = x.new_zeros(())
    for layer in model:
        if isinstance(layer, nn.ReLU):
            total = total - torch.tanh(1 + lower * upper).sum() / len(x)
            lower, upper = lower.relu(), upper.relu()
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            centre, spread = layer((lower + upper) / 2), _absolute(layer, (upper - lower) / 2)
            lower, upper = centre - spread, centre + spread
        else:
            lower, upper = layer(lower), layer(upper)
    return total


def _absolute(layer: nn.Conv2d | nn.Linear, half_width: Tensor) -> Tensor:
    """Return the half-width of the layer's output interval: the layer with |weights| and no
    bias.
    """
    if isinstance(layer, nn.Linear):
        return linear(half_width, layer.weight.abs())
    return conv2d(half_width, layer.weight.abs(), stride=layer.stride, padding=layer.padding)


def plain_loss(model: nn.Sequential, x: Tensor, y: Tensor, _progress: float) -> Tensor:
    """Return the cross-entropy on clean images (scalar), the same throughout training."""
    return cross_entropy(model(x), y)


def robust_loss(model: nn.Sequential, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Return cross-entropy on PGD-7 examples plus the weighted stability loss (scalar).

    `progress` in [0, 1] is the share of training done; the radius ramps up over the first quarter,
    or the net may never start to learn.
    """
    radius = RADIUS * min(1.0, 4 * progress)
    adversarial = pgd(model, x, y, radius, steps=7)
    return cross_entropy(model(adversarial), y) + STABILITY_WEIGHT * instability(model, x, radius)


def train(loss: Loss, x: Tensor, y: Tensor, epochs: int) -> nn.Sequential:
    """Return a network trained by Adam with a one-cycle learning rate; x (N, 1, 28, 28), y (N,)."""
    torch.manual_seed(0)
    model = architecture()
    steps = epochs * (len(x) // BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    batches = (
        rows
        for _ in range(epochs)
        for rows in torch.randperm(len(x))[: steps // epochs * BATCH].split(BATCH)
    )
    for step, rows in enumerate(batches):
        optimiser.zero_grad()
        loss(model, x[rows], y[rows], step / steps).backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def percent_correct(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy on x (N, 1, 28, 28) in percent."""
    return 100 * int((model(x).argmax(1) == y).sum()) / len(y)


def write_notice(figures: list[str]) -> None:
    """Write the notice that ships with the data; `figures` are the rows of its table."""
    text = NOTICE.format(
        sample=SAMPLE, radius=RADIUS, weight=STABILITY_WEIGHT, figures="\n".join(figures)
    )
    (TARGET / "NOTICE.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Train both networks, write the four files and print the figures that stand in the notice."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_x, train_y = read_digits("mnist_train_60k.npz")
    test_x, test_y = read_digits("mnist_test_2k.npz")
    test_x, test_y = test_x[:SAMPLE], test_y[:SAMPLE]
    np.savez_compressed(TARGET / "mnist_test500.npz", x=test_x, y=test_y)
    x, y = pixels(test_x), torch.from_numpy(test_y)
    figures = []
    for name, loss, epochs in (
        ("plain", plain_loss, PLAIN_EPOCHS),
        ("robust", robust_loss, ROBUST_EPOCHS),
    ):
        model = train(loss, pixels(train_x), torch.from_numpy(train_y), epochs)
        (TARGET / f"mnist_{name}.safetensors").write_bytes(save(model.state_dict()))
        clean, attacked = (
            percent_correct(model, x, y),
            percent_correct(model, pgd(model, x, y, RADIUS, steps=100), y),
        )
        figures.append(f"| `mnist-{name}` | {clean:.1f} % | {attacked:.1f} % |")
        print(figures[-1])
    write_notice(figures)


if __name__ == "__main__":
    main()
