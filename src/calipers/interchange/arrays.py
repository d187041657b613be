"""Points and labels from arrays, data sets and folders of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers import data
from calipers.arguments import tensor
from calipers.errors import BadInput
from calipers.interchange.archives import FREE, RATIO
from calipers.interchange.checkpoints import plain_tensors
from calipers.interchange.files import existing, is_file
from calipers.interchange.loaders import drained, hands_out
from calipers.interchange.npy import Array, NpyFile, array_of

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # of images, with the bytes of a pixel
_X, _Y = ("x", "images", "data", "inputs"), ("y", "labels", "label", "targets")


def load_data(
    source: Any, labels: str | None = None, points: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return points and labels from a file, folder, loader or pair.

    Arrays of 8-bit integers in files, and images, are scaled to [0, 1]; images come out as (N, C,
    H, W). What is handed over in Python is taken as it is.

    Args:
        source: One of: an .npz file with arrays x and y (also images, data or inputs, and label(s)
            or target(s)); a .pt file with such tensors, in a dict or a pair; an .npy file, with the
            labels in another; a folder with one sub-folder of images for each class, in sorted
            order as in torchvision; a DataLoader, a Dataset or a pair (x, y); or None for the
            embedded MNIST images.
        labels: The .npy file that holds the labels of an .npy file, or of an .npz file without any.
        points: How many points to return, the first ones; None for all of them.

    Returns:
        x (N, *D) and y (N,).

    Raises:
        BadInput: For what cannot be read as points and labels, holds more of one than of the other,
            or would unpack to far more than it takes on the disk.

    Example:
        >>> x, y = load_data(None, points=4)
        >>> x.shape, y.tolist()
        (torch.Size([4, 1, 28, 28]), [7, 2, 1, 0])
    """
    if points is not None and points < 1:
        raise BadInput(f"the number of points must be at least 1, got {points}")
    if hands_out(source) or isinstance(source, tuple):
        return _handed(source, points)
    if source is None:
        x, y = data.images()
    else:
        path = existing(source, "data")
        if path.suffix in (".pt", ".pth"):
            x, y = _tensors(path)
        else:
            x, y = _folder(path) if path.is_dir() else _arrays(path, labels)
    if len(x) != len(y):
        raise BadInput(f"{source} holds {len(x)} points but {len(y)} labels")
    return x[:points], y[:points]


def _handed(source: Any, points: int | None) -> tuple[Tensor, Tensor]:
    """Return what was handed over in Python, as it is."""
    if not isinstance(source, tuple):
        x, y = drained(source, points)
        if y is None:
            raise BadInput(f"the {type(source).__name__} hands out points without labels")
        return x, y
    if len(source) != 2:
        raise BadInput(f"data are a pair (x, y), got {len(source)} things")
    x, y = (
        tensor(part, name, "Give arrays.") for part, name in zip(source, ("x", "y"), strict=True)
    )
    return x[:points], y[:points]


def _tensors(path: Path) -> tuple[Tensor, Tensor]:
    """Return points and labels of a `torch.save` file: a pair or a dict."""
    held = plain_tensors(path)
    if isinstance(held, dict):
        pair = [next((held[n] for n in names if n in held), None) for names in (_X, _Y)]
    else:
        pair = list(held) if isinstance(held, tuple | list) else []
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise BadInput(
            f"{path} holds a {type(held).__name__} where points and labels are needed: save them "
            "with torch.save({'x': x, 'y': y}, path)"
        )
    x, y = (part.detach().cpu() for part in pair if part is not None)
    return (x.float() / 255 if x.dtype == torch.uint8 else x), y


def _arrays(path: Path, labels: str | None) -> tuple[Tensor, Tensor]:
    """Return points and labels of an .npz or .npy file."""
    with NpyFile(path) as file:
        if file.single:
            if labels is None:
                raise BadInput(
                    f"{path} holds the points alone: name the file of their labels, --labels "
                    "labels.npy"
                )
            return _as_points(file.array(""), path), _labels(existing(labels, "labels"))
        x, y = (next((name for name in names if name in file.names), None) for names in (_X, _Y))
        if x is None or (y is None and labels is None):
            held = ", ".join(file.names)[:300] or "none"
            raise BadInput(
                f"{path} holds the arrays {held}; x (the points) and y (the labels) are needed"
            )
        told = (
            _labels(existing(str(labels), "labels"))
            if y is None
            else _as_labels(file.array(y), path)
        )
        return _as_points(file.array(x), path), told


def _labels(path: Path) -> Tensor:
    """Return the labels in a file."""
    return _as_labels(array_of(path, _Y), path)


def _as_labels(array: Array, path: Path) -> Tensor:
    """Return an array as labels; integers become int64."""
    if array.ndim == 0:
        raise BadInput(f"{path} holds one number where labels are needed, one for each point")
    if array.dtype.kind in "iu":
        if array.size and int(array.max()) >= 2**63:
            raise BadInput(
                f"{path} holds labels of 2^63 and more; labels are classes, counted from 0"
            )
        array = array.astype(np.int64)
    return torch.as_tensor(array)


def _as_points(array: Array, path: Path) -> Tensor:
    """Return an array as points; 8-bit images are scaled and put in order."""
    if array.ndim == 0:
        raise BadInput(f"{path} holds one number where points are needed, (N, *D)")
    if array.dtype != np.uint8:
        return torch.as_tensor(array if array.dtype.kind == "f" else array.astype(np.float64))
    x = torch.as_tensor(array)
    if x.dim() == 3:
        x = x[:, None]
    elif x.dim() == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = x.permute(0, 3, 1, 2).contiguous()
    return x.float() / 255


def _folder(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images of a folder, and their classes.

    Their sizes are compared before any is unpacked.
    """
    try:
        from PIL import Image  # noqa: F401
    except ImportError as error:
        raise BadInput("reading images needs Pillow: pip install 'calipers[images]'") from error
    try:
        classes = sorted(p for p in path.iterdir() if p.is_dir())
        files = [
            (f, k)
            for k, folder in enumerate(classes)
            for f in sorted(folder.rglob("*"))
            if f.suffix.lower() in _IMAGES
        ]
    except OSError as error:
        raise BadInput(f"the folder {path} cannot be read ({error})") from error
    if not files:
        raise BadInput(f"{path} holds no images in class folders; expected {path}/CLASS/IMAGE.png")
    sizes = {_image(f, look=True) for f, _ in files}
    if len(sizes) > 1:
        shown = ", ".join(map(str, sorted(sizes)[:3]))
        raise BadInput(
            f"the images in {path} must be 8-bit and of one size, found {len(sizes)} sizes: "
            f"{shown}. Resize them first."
        )
    total = len(files) * math.prod(sizes.pop())
    if total > max(FREE, RATIO * sum(f.stat().st_size for f, _ in files)):
        raise BadInput(
            f"the images in {path} would unpack to {total:,} bytes, more than {RATIO} times what "
            "they take on the disk"
        )
    return _as_points(np.stack([_image(f) for f, _ in files]), path), torch.tensor(
        [k for _, k in files]
    )


def _image(path: Path, look: bool = False) -> Any:
    """Return an image's pixels, or with `look` its rows, columns and channels."""
    from PIL import Image

    if not is_file(path):
        raise BadInput(f"{path} is no ordinary file")
    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise BadInput(
                    f"{path} must be 8-bit grey or RGB; its mode is {image.mode}. Convert it "
                    "first: Image.open(path).convert('RGB')"
                )
            return (*image.size[::-1], _MODES[image.mode]) if look else np.asarray(image)
    except BadInput:
        raise
    except Exception as error:  # for a damaged image, Pillow raises whatever its decoders do
        raise BadInput(
            f"{path} cannot be read as an image ({type(error).__name__}: {str(error)[:200]}); is "
            "it complete?"
        ) from error
