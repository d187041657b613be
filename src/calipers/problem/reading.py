"""What do callers hand over? Tensors, arrays, lists and tables become tensors; of anything else it
is said what it is and what to give instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.calls import normal


def tensor(value: Any, what: str, cure: str) -> Tensor:
    """Return the value as a tensor without a graph; raises `BadInput`, beginning with `what` was
    asked for and ending with a `cure`.
    """
    if isinstance(value, Tensor):
        return normal(value.detach())
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
            return normal(torch.stack([v.detach() for v in value]))
        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
        said = (
            "strings"
            if array.dtype.kind in "US"
            else f"a {type(value).__name__} that holds no table of numbers"
        )
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # a ragged list, a number type that torch does not have
        said = f"a {type(value).__name__} that holds no table of numbers"
    raise BadInput(
        f"{what} must be numbers, a tensor or an array; got "
        f"{'nothing' if value is None else said}. {cure}"
    )


def points(value: Any) -> Tensor:
    """Return points x (N, *D); raises `BadInput`."""
    cure = (
        "Points are stacked along the first axis, images (N, C, H, W); of a loader: x, y = "
        "map(torch.cat, zip(*loader))."
    )
    x = tensor(value, "x", cure)
    if x.dim() < 2 or not len(x) or not x[0].numel():
        raise BadInput(
            "x must hold at least one point of at least one feature, shape (N, *D), got "
            f"{tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise BadInput(
            f"x has dtype {x.dtype}; give floating point numbers in the model's native units (for "
            "8-bit images: x.float() / 255)"
        )
    return x


def labels(value: Any, n: int, classes: Any = None) -> Tensor:
    """Return labels (n,) as places among the outputs; `classes`, where the model names its own, in
    order, are what labels are looked up in.
    """
    if classes is not None:
        return _looked_up(value, n, np.asarray(classes))
    cure = "Labels are places among the model's outputs, 0, 1, 2, ...: one integer a point."
    y = tensor(value, "y", cure)
    if y.shape == (n, 1):
        y = y[:, 0]
    if y.shape != (n,) or y.is_floating_point():
        raise BadInput(
            f"y must hold one integer label a point, shape ({n},), got {tuple(y.shape)} of "
            f"{y.dtype}"
        )
    return y.long()


def _looked_up(value: Any, n: int, classes: Any) -> Tensor:
    held = np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value).reshape(
        -1
    )
    if held.shape != (n,):
        raise BadInput(f"y must hold one label a point, shape ({n},), got {np.shape(value)}")
    place = {label: k for k, label in enumerate(classes.tolist())}
    unknown = [label for label in held.tolist() if label not in place]
    if unknown:
        raise BadInput(
            f"labels must be among the model's own classes {list(place)[:20]}, got {unknown[0]!r}"
        )
    return torch.tensor([place[label] for label in held.tolist()])


__all__ = ["labels", "points", "tensor"]
