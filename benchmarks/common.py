"""What do the benchmarks share? Networks and images, timing in alternating pairs, and the words for
what ran where.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from calipers.data import build, images

THREADS = 2
# published networks, not part of the project
DATA = Path(
    os.environ.get(
        "CALIPERS_BENCHMARK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"
    )
)


def start(question: str, peers: Sequence[str] = ()) -> dict[str, ModuleType]:
    """Print the question and the circumstances, and return the peers that can be imported."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    found = {name: module for name in peers if (module := _imported(name)) is not None}
    versions = ", ".join(
        f"{name} {getattr(module, '__version__', '?')}"
        for name, module in {"torch": torch, **found}.items()
    )
    busy = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(
        f"{question}\n{platform.machine()}, Python {platform.python_version()}, {versions}; "
        f"{THREADS} threads of {os.cpu_count()} cores{busy}"
    )
    missing = [name for name in peers if name not in found]
    if missing:
        print(f"not importable here, so not measured: {', '.join(missing)}")
    return found


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def network(name: str) -> nn.Module | None:
    """Return an embedded network ("mnist-plain", "mnist-robust") or a published one; None, with a
    message, where its file is absent.
    """
    if name.startswith("mnist-"):
        return build(name)
    path = DATA / "nets" / f"{name}.npz"
    if not path.exists():
        print(
            f"{name}: skipped, no {path.name} among the published networks (set "
            "CALIPERS_BENCHMARK_DATA to the folder that holds nets/ and data/)"
        )
        return None
    with np.load(path) as arrays:
        layers = [
            _layer(entry, {k: torch.tensor(v) for k, v in arrays.items() if k != "spec"})
            for entry in json.loads(str(arrays["spec"]))
        ]
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Normalise(nn.Module):
    """(x - mean) / std, statistics (1, C, 1, 1): the plainest form, which every peer can read."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return (x - self.mean) / self.std  # type: ignore[operator]


def _layer(entry: dict[str, object], arrays: dict[str, Tensor]) -> nn.Module:
    op = str(entry["op"])
    if op == "normalize":
        return Normalise(
            torch.tensor(entry["mean"]).view(1, -1, 1, 1),
            torch.tensor(entry["std"]).view(1, -1, 1, 1),
        )
    if op not in ("conv2d", "linear"):
        return {"relu": nn.ReLU, "flatten": nn.Flatten}[op]()
    weight, bias = arrays[str(entry["w"])], arrays[str(entry["b"])]
    if op == "linear":
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            tuple(weight.shape[2:]),
            tuple(entry["stride"]),
            tuple(entry["padding"]),
        )  # type: ignore[arg-type]
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Return the first MNIST test images, at most 500 of them."""
    x, y = images()
    return x[:count], y[:count]


def cifar(count: int) -> tuple[Tensor, Tensor]:
    """Return the first of the 200 CIFAR-10 test images that published certificates are counted
    on.
    """
    with np.load(DATA / "data" / "cifar10_sdp200.npz") as arrays:
        x, y = torch.tensor(arrays["x"][:count]), torch.tensor(arrays["y"][:count]).long()
    x = x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
    return (x.float() / 255 if x.dtype == torch.uint8 else x.float()).contiguous(), y


def right(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points that the model classifies correctly."""
    with torch.no_grad():
        kept = model(x).argmax(1) == y
    return x[kept], y[kept]


def clock(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


CONTROL = "the first again (control)"


def alternate(
    sides: dict[str, Callable[[], object]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Return seconds for each side: every round runs all of them in turn, and the first once more.
    `warm`: one run of each beforehand that does not count.
    """
    first = next(iter(sides))
    order = {**sides, CONTROL: sides[first]}
    if warm:
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        for name, run in order.items():
            seconds[name].append(clock(run))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def table(seconds: dict[str, list[float]], notes: dict[str, str] | None = None) -> None:
    """Print one line a side: median seconds, and the median and spread of its ratio to the first
    side in the same round.
    """
    first = next(iter(seconds))
    width = max(map(len, seconds))
    print(f"  {'':{width}}  {'seconds':>8}  {'ratio':>6}  spread")
    for name, measured in seconds.items():
        ratios = [a / b for a, b in zip(measured, seconds[first], strict=True)]
        note = (notes or {}).get(name, "")
        print(
            f"  {name:{width}}  {median(measured):8.3f}  {median(ratios):6.2f}  "
            f"{min(ratios):.2f}-{max(ratios):.2f}  {note}"
        )
