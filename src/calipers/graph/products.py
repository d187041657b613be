"""Relaxations of operations on several elements: maximum and product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calipers.graph.kinds import Entry, Op, Shape
from calipers.graph.parameters import completed
from calipers.graph.relaxations import Ends, Parametrised, Planes, Relaxation, Saddle, Tilt


@dataclass(frozen=True, eq=False)
class MaxPool(Op):
    """The largest element of each window.

    `windows (out, k)` are flat input indices; places in the padding hold the index one past the
    end. Below: the element with the largest lower end. Above: the same element if it dominates the
    window, else the largest upper end.
    """

    run: Callable[[Tensor], Tensor] = field(repr=False)
    windows: Tensor
    shape: tuple[int, ...]

    def value(self, x: Tensor) -> Tensor:
        """Return the result of the model's own operation."""
        return self.run(x)

    def members(self) -> Tensor:
        """Return the windows."""
        return self.windows

    @property
    def executed_as_written(self) -> bool:
        """Return True: elements are only selected."""
        return True

    @property
    def executed_exactly(self) -> bool:
        """Return True: elements are only selected."""
        return True

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of its windows."""
        return Entry({"op": "largest"}, {"windows": self.windows})

    def interval(self, x: Ends) -> Ends:
        """Return the largest lower and the largest upper end of each window."""
        return self.value(x[0]), self.value(x[1])

    def _gather(self, x: Tensor) -> Tensor:
        """Return each window's elements, (M, *in) -> (M, out, k).

        The padding is minus infinity.
        """
        flat = functional.pad(x.flatten(1), (0, 1), value=float("-inf"))
        return flat[:, self.windows.to(x.device)]

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the elements that may be the maximum of an undecided window.

        A window is undecided where no element dominates it.
        """
        low, high = self._gather(lower), self._gather(upper)
        floor = low.amax(-1, keepdim=True)
        contends = high > floor
        undecided = (contends.sum(-1, keepdim=True) > 1) | (
            (contends.sum(-1, keepdim=True) == 1)
            & ~contends.gather(-1, low.argmax(-1, keepdim=True))
        )
        flags = (contends & undecided).to(torch.int8)
        members = self.windows.to(lower.device).flatten().expand(len(lower), -1)
        hit = torch.zeros(
            len(lower), lower[0].numel() + 1, dtype=torch.int8, device=lower.device
        ).scatter_reduce(1, members, flags.flatten(1), "amax")
        return hit[:, :-1].bool().view_as(lower)

    def relaxation(self, x: Ends, alpha: Tensor | None = None) -> Planes:
        """Return the planes that the class describes; there is no free parameter."""
        lower, upper = x
        low, high = self._gather(lower), self._gather(upper)
        best = low.argmax(-1, keepdim=True)
        others = high.scatter(-1, best, float("-inf")).amax(-1)
        pick = self.windows.to(lower.device).expand(len(lower), -1, -1).gather(-1, best)[..., 0]
        shape = (len(lower), *self.shape)
        return Planes(
            pick.view(shape), (low.amax(-1) >= others).view(shape), high.amax(-1).view(shape)
        )


_ULPS = 16  # units in the last place of the largest term, added to every intercept


@dataclass(frozen=True)
class Product(Op):
    """x * y between McCormick's planes (1976).

    For x in [l, u] and y in [k, h] they follow from (x - l)(y - k) >= 0 and (u - x)(h - y) >= 0
    below, (x - l)(h - y) >= 0 and (u - x)(y - k) >= 0 above.

    Both planes of a side are equally far from the product in the middle of the box. Any weighted
    mean of them is sound, and alpha is the weight of the second.
    """

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the product, element by element."""
        return x * y

    def interval(self, x: Ends, y: Ends) -> Ends:
        """Return the extremes, which are at the corners.

        0 times infinity gives NaN, which bounds nothing.
        """
        every = torch.stack([a * b for a in x for b in y])
        eps, tiny = torch.finfo(every.dtype).eps, torch.finfo(every.dtype).tiny
        least, most = every.amin(0), every.amax(0)  # a NaN remains a NaN
        return least - eps * least.abs() - tiny, most + eps * most.abs() + tiny

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry that pairs elements in the same place."""
        every = torch.arange(torch.Size(shape).numel())
        return Entry({"op": "product"}, {"left": every, "right": every, "into": every})

    def parametrised(self, held: Relaxation, *ends: Ends) -> Parametrised:
        """Return the planes as linear functions of alpha."""
        x, y = ends
        first, last = (self.relaxation(x, y, torch.full_like(x[0], a)) for a in (0.0, 1.0))
        return Tilt(first, last)

    def relaxation(self, x: Ends, y: Ends, alpha: Tensor | None = None) -> Saddle:
        """Return the planes of an alpha, by default the mean of both."""
        (low_x, high_x), (low_y, high_y) = x, y
        alpha = torch.full_like(low_x, 0.5) if alpha is None else alpha
        below_x, below_y = _mixed(low_y, high_y, alpha), _mixed(low_x, high_x, alpha)
        above_x, above_y = _mixed(high_y, low_y, alpha), _mixed(low_x, high_x, alpha)
        corners = [(a, b) for a in x for b in y]
        size = torch.maximum(low_x.abs(), high_x.abs()) * torch.maximum(low_y.abs(), high_y.abs())
        room = _ULPS * torch.finfo(size.dtype).eps * size + torch.finfo(size.dtype).tiny
        # x * y is linear along both axes, so a plane that lies under it at the corners lies under
        # it everywhere, however its slopes were rounded.
        below = torch.stack([a * b - below_x * a - below_y * b for a, b in corners]).amin(0) - room
        above = torch.stack([a * b - above_x * a - above_y * b for a, b in corners]).amax(0) + room
        return Saddle(below_x, below_y, below, above_x, above_y, above)


def _mixed(first: Tensor, second: Tensor, alpha: Tensor) -> Tensor:
    return first + alpha * (second - first)


def _max_pool(
    rank: int,
) -> Callable[[tuple[Any, ...], tuple[int, ...], tuple[int, ...]], MaxPool | None]:
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]

    def build(
        args: tuple[Any, ...], input_shape: tuple[int, ...], shape: tuple[int, ...]
    ) -> MaxPool | None:
        kernel, stride, padding, dilation, ceil = completed(args[1:], (None, [], 0, 1, False))

        def run(x: Tensor) -> Tensor:
            return pool(x, kernel, stride or kernel, padding, dilation, ceil)

        every = [
            (tuple(v) if isinstance(v, (list, tuple)) else (v,))
            for v in (kernel, stride or kernel, padding, dilation)
        ]
        one = windows(
            input_shape[1:], shape[1:], *(v * (rank if len(v) == 1 else 1) for v in every)
        )
        count, nowhere = torch.Size(input_shape[1:]).numel(), torch.Size(input_shape).numel()
        # every channel has the same windows
        each = [torch.where(one == count, nowhere, one + k * count) for k in range(input_shape[0])]
        return MaxPool(run, torch.cat(each), shape)

    return build


def windows(
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return the flat indices that each output place reads, (outputs, k).

    They index an image of `size`; a place in the padding is given the number of elements of the
    image. The indices follow from the strides. Finding them by running the operation would take a
    row of the whole image for each output: gigabytes at 224 x 224.
    """
    flat, inside = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for n, m, k, step, pad, spread in zip(
        size, out, kernel, stride, padding, dilation, strict=True
    ):
        place = torch.arange(m)[:, None] * step - pad + torch.arange(k) * spread
        here = (place >= 0) & (place < n)
        flat = (flat[:, None, :, None] * n + place[None, :, None, :]).reshape(len(flat) * m, -1)
        inside = (inside[:, None, :, None] & here[None, :, None, :]).reshape(len(inside) * m, -1)
    # Sorted, the padding last: where nothing is known of any element, the first one is picked for
    # the window, so that must not be padding.
    return torch.where(inside, flat, torch.Size(size).numel()).sort(-1).values


SELECTIONS: dict[
    str, Callable[[tuple[Any, ...], tuple[int, ...], tuple[int, ...]], MaxPool | None]
] = {
    "aten.max_pool1d.default": _max_pool(1),
    "aten.max_pool2d.default": _max_pool(2),
    "aten.max_pool3d.default": _max_pool(3),
}
"""Builders by exported name.

A builder takes the call's arguments, the input shape and the output shape.
"""
