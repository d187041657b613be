"""Conversion of arguments to tensors, with helpful errors.

Tensors, arrays, lists and tables become tensors; for anything else an error says what it is and
what to give instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.calls import normal
from calipers.errors import BadInput


def tensor(value: Any, what: str, cure: str) -> Tensor:
    """Return the value as a tensor without a graph.

    Raises `BadInput` for anything that is no numbers; the message begins with `what` was asked for
    and ends with a `cure`.
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


def points(value: Any, *, grey_levels: bool = False) -> tuple[Tensor, list[str]]:
    """Return points x (N, *D), and notes of what was done to them.

    Bytes become numbers in [0, 1], or keep their values where these are `grey_levels`. Raises
    `BadInput` for anything else than floating point numbers or bytes.
    """
    x = tensor(_table(value), "x", "Points are stacked along the first axis, images (N, C, H, W).")
    if x.dim() < 2 or not len(x) or not x[0].numel():
        raise BadInput(
            "x must hold at least one point of at least one feature, shape (N, *D), got "
            f"{tuple(x.shape)}"
        )
    if x.dtype == torch.uint8:
        if grey_levels:
            return x.float(), []
        return x.float() / 255, ["the 8-bit values of the points are divided by 255"]
    if not x.is_floating_point():
        raise BadInput(
            f"x has dtype {x.dtype}; give floating point numbers in the model's native units: "
            "x.float() for counts and other whole features; token ids are no points of a ball "
            "(measure on embeddings, or on one-hot symbols with calipers.Substitutions)"
        )
    return x, []


def _table(value: Any) -> Any:
    """Return the numbers of a data frame; anything else as it is."""
    if isinstance(value, Tensor | np.ndarray) or not hasattr(value, "to_numpy"):
        if hasattr(value, "toarray"):
            raise BadInput(f"x is a sparse {type(value).__name__}; write x.toarray()")
        return value
    try:
        return value.to_numpy(dtype="float64")
    except (TypeError, ValueError) as error:
        names = [
            str(name)
            for name in getattr(value, "columns", [])
            if getattr(value[name].dtype, "kind", "O") not in "biuf"
        ]
        raise BadInput(
            f"x holds columns that are no numbers: {', '.join(names[:8]) or error}. Encode them "
            "(one column for each category, 0 or 1), and let calipers.Substitutions replace them"
        ) from error


def names(given: Any, known: Any, count: int) -> tuple[str, ...]:
    """Return the names of so many columns: those of a frame, or the model's.

    () where neither has as many names.
    """
    for found in (getattr(given, "columns", None), known):
        told = () if found is None else tuple(str(name) for name in found)
        if len(told) == count:
            return told
    return ()


def labels(value: Any, n: int, classes: Any = None) -> Tensor:
    """Return labels (n,) as places among the outputs.

    `classes`, the names that the model gives its classes in order, are what labels are looked up
    in; None where it has no names. Raises `BadInput` for labels that do not fit.
    """
    if classes is not None:
        return _looked_up(value, n, np.asarray(classes))
    y = tensor(
        value,
        "y",
        "Labels are places among the model's outputs, 0, 1, 2, ...: one integer a point. A model "
        "whose outputs have names keeps them, in order, as model.classes_.",
    )
    if y.shape == (n, 1):
        y = y[:, 0]
    if y.shape != (n,) or y.is_floating_point():
        cure = (
            ": write y.argmax(1)"
            if y.dim() == 2 and len(y) == n and y.shape[1] > 1
            else ": write y.long()"
            if y.shape == (n,) and bool((y == y.round()).all())
            else ""
        )
        raise BadInput(
            f"y must hold one integer label a point, shape ({n},), got {tuple(y.shape)} of "
            f"{y.dtype}{cure}"
        )
    return y.long()


def check_range(y: Tensor, classes: int) -> None:
    """Raise `BadInput` where labels (N,) are not among so many outputs."""
    low, high = int(y.min()), int(y.max())
    if low >= 0 and high < classes:
        return
    held = set(y.unique().tolist())
    cure = (
        ". For labels of -1 and 1 write (y > 0).long(), or keep model.classes_ = [-1, 1]"
        if held <= {-1, 1}
        else ". Labels that begin at 1: write y - 1"
        if (low, high) == (1, classes)
        else ""
    )
    raise BadInput(
        f"labels must lie in 0..{classes - 1} for a model of {classes} classes, got "
        f"{low}..{high}{cure}"
    )


def _looked_up(value: Any, n: int, classes: Any) -> Tensor:
    """Return the places of labels among the names of the classes."""
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


__all__ = ["check_range", "labels", "names", "points", "tensor"]
