"""Points and labels from a DataLoader or Dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from calipers.arguments import tensor
from calipers.errors import BadInput

POINTS = ("x", "images", "image", "data", "inputs", "input", "pixel_values", "inputs_embeds")
LABELS = ("y", "labels", "label", "targets", "target")
_MOST = 2**31  # bytes of points that are taken unless their number is given

_CURE = "Points are handed out as (x, y) or as a dict with one of the names " + ", ".join(
    (*POINTS[:4], *LABELS[:3])
)


def hands_out(value: object) -> bool:
    """Return whether this is a loader or a data set, not a table of points."""
    return isinstance(value, DataLoader | Dataset)


def drained(source: Any, points: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the points and labels of a DataLoader or Dataset.

    A DataLoader yields batches, a Dataset single points. Returns x (N, *D), and y (N,) or None
    where there are no labels; the first `points` of them, if given.

    Raises `BadInput` for what is no pair of points and labels, and for more than 2 GiB of points
    where no number of `points` is given.
    """
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    count, size = 0, 0
    for item in _items(source):
        if points is not None and count >= points:
            break
        x, y = _pair(item, type(source).__name__)
        if not isinstance(source, DataLoader):
            x, y = x[None], None if y is None else y.reshape(1)
        if xs and x.shape[1:] != xs[0].shape[1:]:
            raise BadInput(
                f"the {type(source).__name__} hands out points of shapes {tuple(xs[0].shape[1:])} "
                f"and {tuple(x.shape[1:])}; resize or pad them to one shape"
            )
        xs.append(x)
        ys += [] if y is None else [y]
        count, size = count + len(x), size + x.numel() * x.element_size()
        if points is None and size > _MOST:
            raise BadInput(
                f"the {type(source).__name__} holds more than {_MOST // 2**30} GiB of points. Take "
                "as many as are to be measured: x, y = calipers.load_data(loader, points=1000)"
            )
    if not xs:
        raise BadInput(f"the {type(source).__name__} hands out nothing")
    if ys and len(ys) != len(xs):
        raise BadInput(f"the {type(source).__name__} hands out labels for some points only")
    return torch.cat(xs)[:points], torch.cat(ys)[:points] if ys else None


def _items(source: Any) -> Iterable[Any]:
    """Return an iterable over batches, or over single points."""
    if isinstance(source, DataLoader | IterableDataset):
        return source
    return (source[i] for i in range(len(source)))


def _pair(item: Any, what: str) -> tuple[Tensor, Tensor | None]:
    """Return points and labels of a batch, or one of each."""
    if isinstance(item, Mapping):
        x, y = (next((item[n] for n in names if n in item), None) for names in (POINTS, LABELS))
        if x is None:
            raise BadInput(f"the {what} hands out {', '.join(map(str, item))}. {_CURE}")
    elif isinstance(item, tuple | list):
        if not 1 <= len(item) <= 2:
            raise BadInput(f"the {what} hands out {len(item)} things at once. {_CURE}")
        x, y = item[0], item[1] if len(item) == 2 else None
    else:
        x, y = item, None
    return tensor(x, f"what the {what} hands out", _CURE), (
        None if y is None else tensor(y, f"labels of the {what}", _CURE)
    )
