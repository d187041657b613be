"""How do points and labels come in from files? Arrays, and folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers import data
from calipers.errors import BadInput
from calipers.interchange.files import existing

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def load_data(source: str | None, labels: str | None = None, points: int | None = None) -> tuple[Tensor, Tensor]:
    """Return x (N, *D) and y (N,), the first `points` of them.

    `.npz` with arrays x and y (or one of each kind), `.npy` with the labels in another `.npy`, a folder with one sub-folder of images a class (in
    sorted order, as torchvision has it), or None: the embedded MNIST images. 8-bit values are scaled to [0, 1]; images come out as (N, C, H, W).
    """
    if source is None:
        x, y = data.images()
    else:
        path = existing(source, "data")
        x, y = _folder(path) if path.is_dir() else _arrays(path, labels)
    if len(x) != len(y):
        raise BadInput(f"{source} holds {len(x)} points but {len(y)} labels")
    if points is not None and points < 1:
        raise BadInput(f"the number of points must be at least 1, got {points}")
    return x[:points], y[:points]


def _arrays(path: Path, labels: str | None) -> tuple[Tensor, Tensor]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if labels is None:
                raise BadInput(f"{path} holds the points alone: name the file of their labels, --labels labels.npy")
            return _as_points(loaded), torch.as_tensor(np.load(existing(labels, "labels"), allow_pickle=False))
        arrays = {k: loaded[k] for k in loaded.files}
    except (ValueError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} cannot be read as arrays ({error}). Give an .npz with x and y, or an .npy of plain numbers.") from error
    y = next((arrays[k] for k in ("y", "labels", "label", "targets") if k in arrays), None)
    x = next((arrays[k] for k in ("x", "images", "data", "inputs") if k in arrays), None)
    if x is None or y is None:
        raise BadInput(f"{path} holds the arrays {', '.join(arrays) or 'none'}; x (the points) and y (the labels) are needed")
    return _as_points(x), torch.as_tensor(y)


def _as_points(array: np.ndarray[Any, Any]) -> Tensor:
    x = torch.as_tensor(array)
    if x.dtype != torch.uint8:
        return x if x.is_floating_point() else x.double()
    if x.dim() == 3:
        x = x[:, None]
    elif x.dim() == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = x.permute(0, 3, 1, 2).contiguous()
    return x.float() / 255


def _folder(path: Path) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("reading images needs Pillow: pip install 'calipers[images]'") from error
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    files = [(f, k) for k, folder in enumerate(classes) for f in sorted(folder.rglob("*")) if f.suffix.lower() in _IMAGES]
    if not files:
        raise BadInput(f"{path} holds no images in class folders; expected {path}/CLASS/IMAGE.png")
    arrays = [np.asarray(image) for image in map(Image.open, (f for f, _ in files))]
    sizes = {a.shape for a in arrays}
    if len(sizes) > 1 or any(a.dtype != np.uint8 for a in arrays):
        raise BadInput(
            f"the images in {path} must be 8-bit and of one size, found {len(sizes)} sizes: {', '.join(map(str, sorted(sizes)[:3]))}. Resize them first."
        )
    return _as_points(np.stack(arrays)), torch.tensor([k for _, k in files])
