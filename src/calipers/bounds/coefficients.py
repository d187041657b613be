"""Coefficients of backward bound propagation: dense, or as patches.

Patches cover a convolution's receptive field only. Both forms are rows (P, S, ...): P rows of
points (a point may come several times), S directions each. `values` handed in are per point, (N,
*shape); a form picks what its rows need. A second-layer neuron of a small image network sees 10 x
10 of 28 x 28 pixels: patches keep the arithmetic of its bounds to that window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from calipers.conv_gradient import contract
from calipers.graph.kinds import Affine, Windowed
from calipers.graph.receptive_field import Window
from calipers.graph.relaxations import Lines, Relaxation, by_sign
from calipers.threats.ball import Fall, Region

WORTH_A_WINDOW = 0.6  # a patch that covers more of its image than this is carried dense


class Coefficients(Protocol):
    """Coefficients (P, S, ...) of one number of the graph."""

    @property
    def points(self) -> Tensor | None:
        """The place of each row's point; None: row p belongs to point p."""

    @property
    def terms(self) -> int:
        """The number of elements that one row can have."""

    def dot(self, values: Tensor) -> Tensor:
        """Return <A, values>, (P, S)."""

    def size_dot(self, values: Tensor) -> Tensor:
        """Return <|A|, values>, (P, S)."""

    def plus(self, other: Coefficients) -> Coefficients:
        """Return the sum with coefficients of the same number and rows."""

    def back(self, op: Affine, shapes: list[tuple[int, ...]]) -> list[Coefficients]:
        """Return the coefficients of an affine operation's inputs."""

    def through(
        self, relaxation: Relaxation, shapes: list[tuple[int, ...]]
    ) -> tuple[list[Coefficients], Tensor]:
        """Return the coefficients of a relaxed operation's inputs.

        With them the offset (P, S). Positive coefficients take lower bounds, negative ones upper
        bounds.
        """

    def shares(self, elements: int) -> list[tuple[slice, Coefficients]]:
        """Return runs of rows, each with its slice.

        Of at most `elements` (P, S) each, where the form can be divided.
        """

    def fall(self, region: Region) -> Fall:
        """Return how far <A, x'> can fall over the regions, (P, S).

        Measured from its value at the centre.
        """

    def dense(self) -> Dense:
        """Return the same in dense form."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Dense coefficients `a (P, S, *shape)`.

    Row p belongs to point `points[p]` (None: row p to point p).
    """

    a: Tensor
    points: Tensor | None

    @property
    def terms(self) -> int:
        """All elements."""
        return self.a[0, 0].numel()

    def _at(self, values: Tensor) -> Tensor:
        return values if self.points is None else values.index_select(0, self.points)

    def dot(self, values: Tensor) -> Tensor:
        """Return <A, values> by batched matrix-vector products.

        Values of one row serve all points.
        """
        if len(values) == 1:
            return self.a.flatten(2) @ values.flatten()
        return contract(self.a.flatten(2), self._at(values).flatten(1))

    def size_dot(self, values: Tensor) -> Tensor:
        """Return <|A|, values>, as `dot` does."""
        return replace(self, a=self.a.abs()).dot(values)

    def plus(self, other: Coefficients) -> Dense:
        """Return the sum, element by element."""
        return replace(self, a=self.a + other.dense().a)

    def minus(self, values: Tensor) -> Dense:
        """Subtract a point's values from every one of its rows."""
        return replace(self, a=self.a - self._at(values)[:, None])

    def back(self, op: Affine, shapes: list[tuple[int, ...]]) -> list[Coefficients]:
        """Return the coefficients before an operation, by its own adjoint."""
        rows = self.a.shape[:2]
        return [
            replace(self, a=back.view(*rows, *shape))
            for back, shape in zip(op.adjoint(self.a.flatten(0, 1)), shapes, strict=True)
        ]

    def through(
        self, relaxation: Relaxation, shapes: list[tuple[int, ...]]
    ) -> tuple[list[Coefficients], Tensor]:
        """Return the coefficients before a relaxed operation.

        By the relaxation's own backward pass.
        """
        mine = relaxation if self.points is None else relaxation.each(self._at)
        backs, offset = mine.backward(self.a, shapes)
        return [replace(self, a=back) for back in backs], offset

    def shares(self, elements: int) -> list[tuple[slice, Coefficients]]:
        """Return runs of rows (P,)."""
        count = max(1, elements // self.a.shape[1])
        if count >= len(self.a):
            return [(slice(None), self)]
        places = self._places()
        parts = [slice(begin, begin + count) for begin in range(0, len(self.a), count)]
        return [(part, Dense(self.a[part], places[part])) for part in parts]

    def fall(self, region: Region) -> Fall:
        """Return the fall over the regions, from their support function."""
        return region.fall(self.a.flatten(2), self._places())

    def _places(self) -> Tensor:
        return (
            torch.arange(len(self.a), device=self.a.device) if self.points is None else self.points
        )

    def dense(self) -> Dense:
        """Return itself."""
        return self


@dataclass(frozen=True, eq=False)
class Patch:
    """Coefficients `a (P, S, C, h, w)` on a window of an image (C, H, W).

    Row p's window begins at `place[p] * stride + offset` (rows and columns; it may reach into the
    padding), where `place` is the row's element in the `grid` of the number where the backward pass
    began. `clean` says whether coefficients of places outside the image are zero.
    """

    a: Tensor
    points: Tensor
    place: Tensor
    grid: tuple[int, int]
    stride: tuple[int, int]
    offset: tuple[int, int]
    image: tuple[int, int]
    clean: bool = True
    """Whether coefficients of places outside the image are zero."""

    @property
    def terms(self) -> int:
        """All elements of the window."""
        return self.a[0, 0].numel()

    @property
    def _size(self) -> tuple[int, int]:
        return (self.a.shape[3], self.a.shape[4])

    @property
    def _window(self) -> Window:
        return Window(self.stride, self.offset, self._size, self.image)

    def _at(self, values: Tensor) -> Tensor:
        return self._window.at(values, self.points, self.place, self.grid)

    def dot(self, values: Tensor) -> Tensor:
        """Return <A, values> over the window.

        Values that are the same at every place of a channel (the bias of a convolution) need no
        window.
        """
        if len(values) == 1 and self.clean:
            channels = values.view(self.a.shape[2], -1)
            if bool((channels == channels[:, :1]).all()):
                return self.a.flatten(3).sum(3) @ channels[:, 0]
        return contract(
            self.a.flatten(2), self._at(values.view(-1, self.a.shape[2], *self.image)).flatten(1)
        )

    def size_dot(self, values: Tensor) -> Tensor:
        """Return <|A|, values> over the window."""
        return replace(self, a=self.a.abs()).dot(values)

    def plus(self, other: Coefficients) -> Coefficients:
        """Return the sum on the union of both windows.

        Windows of different strides are added in dense form.
        """
        if not isinstance(other, Patch) or other.stride != self.stride:
            return self.dense().plus(other)
        both = self._window.union(other._window)
        return replace(
            self,
            a=self._grown(both) + other._grown(both),
            offset=both.offset,
            clean=self.clean and other.clean,
        )

    def _grown(self, window: Window) -> Tensor:
        top, left = self.offset[0] - window.offset[0], self.offset[1] - window.offset[1]
        return functional.pad(
            self.a,
            [
                left,
                window.size[1] - left - self._size[1],
                top,
                window.size[0] - top - self._size[0],
            ],
        )

    def back(self, op: Affine, shapes: list[tuple[int, ...]]) -> list[Coefficients]:
        """Return the coefficients before an affine operation.

        Within the window where the operation is a convolution or acts element by element; dense
        otherwise.
        """
        if (windowed := op.windowed()) is not None:
            grown = self._through_window(windowed, shapes[0])
            wide = (
                grown._size[0] * grown._size[1] > WORTH_A_WINDOW * grown.image[0] * grown.image[1]
            )
            return [grown.dense() if wide else grown]
        slopes = op.slopes()
        if slopes is None or any(shape != (self.a.shape[2], *self.image) for shape in shapes):
            return self.dense().back(op, shapes)
        return [
            replace(self, a=self.a * self._at(s.expand(1, *shape))[:, None], clean=True)
            for s, shape in zip(slopes, shapes, strict=True)
        ]

    def _through_window(self, op: Windowed, shape: tuple[int, ...]) -> Patch:
        # Coefficients of places outside the image belong to no value: they must not reach real
        # inputs through the transposed convolution.
        rows, kept = (
            self.a.shape[:2],
            (self.a if self.clean else self.a * self._inside()[:, None]).flatten(0, 1),
        )
        seen = self._window.through(
            op.stride,
            op.padding,
            (op.window(self._size[0], 0), op.window(self._size[1], 1)),
            (shape[1], shape[2]),
        )
        moved = op.window_adjoint(kept).view(*rows, shape[0], *seen.size)
        return replace(
            self, a=moved, stride=seen.stride, offset=seen.offset, image=seen.image, clean=False
        )

    def _inside(self) -> Tensor:
        return self._at(self.a.new_ones(1, 1, *self.image))

    def through(
        self, relaxation: Relaxation, shapes: list[tuple[int, ...]]
    ) -> tuple[list[Coefficients], Tensor]:
        """Return the coefficients before a relaxed operation.

        As in dense form, on the windows of the lines (zero lines outside the image); dense where a
        relaxation is not made of lines.
        """
        lines = relaxation.lines()
        if lines is None:
            return self.dense().through(relaxation, shapes)
        each = [self._relaxed(pair) for pair in lines]
        return [back for back, _ in each], sum((o for _, o in each[1:]), each[0][1])

    def _relaxed(self, lines: Lines) -> tuple[Coefficients, Tensor]:
        low, low_at, high, high_at = lines
        # Differences are taken before the windows are cut out, which hold every value many times.
        rise, gap = (self._at(t)[:, None] for t in (high - low, high_at - low_at))
        a, offset = by_sign(
            self.a,
            self._at(low)[:, None],
            rise,
            self._at(low_at)[:, None] if bool(low_at.any()) else None,
            gap,
        )
        return replace(self, a=a, clean=True), offset

    def shares(self, elements: int) -> list[tuple[slice, Coefficients]]:
        """Return all rows as one run: windows are small."""
        return [(slice(None), self)]

    def fall(self, region: Region) -> Fall:
        """Return the fall over the regions, cut down to the window."""
        shape = (-1, self.a.shape[2], *self.image)
        low, high = (self._at(end.view(shape)).flatten(1) for end in (region.low, region.high))
        weight = (
            None
            if region.weight is None
            else self._at(region.weight.expand(region.low.shape[1]).view(shape)).flatten(1)
        )
        return region.window_fall(self.a.flatten(2), self.points, low, high, weight)

    def dense(self) -> Dense:
        """Return dense coefficients: every window placed in a full image."""
        rows, directions, channels = self.a.shape[:3]
        full = self.a.new_zeros(rows, directions, channels, self.image[0] * self.image[1])
        index, inside = self._flat_index()
        kept = (self.a * inside.view(rows, 1, 1, *self._size)).flatten(3)
        full.scatter_add_(3, index.view(rows, 1, 1, -1).expand_as(kept), kept)
        return Dense(full.view(rows, directions, channels, *self.image), self.points)

    def _flat_index(self) -> tuple[Tensor, Tensor]:
        corner = (self.place // self.grid[1], self.place % self.grid[1])
        axes = [
            (corner[k] * self.stride[k] + self.offset[k])[:, None]
            + torch.arange(self._size[k], device=self.place.device)
            for k in range(2)
        ]
        inside = ((axes[0] >= 0) & (axes[0] < self.image[0]))[:, :, None] & (
            (axes[1] >= 0) & (axes[1] < self.image[1])
        )[:, None, :]
        flat = (
            axes[0].clamp(0, self.image[0] - 1)[:, :, None] * self.image[1]
            + axes[1].clamp(0, self.image[1] - 1)[:, None, :]
        )
        return flat.flatten(1), inside


def unit_rows(
    flat: Tensor, points: Tensor, shape: tuple[int, ...], sign: Tensor, *, windowed: bool
) -> Coefficients:
    """Return the coefficients that select single elements of a number.

    The elements `flat`, times `sign` (P, S): (P,) as patches of one pixel, or (P, S) dense.
    """
    if windowed:
        channel, place = flat // (shape[1] * shape[2]), flat % (shape[1] * shape[2])
        a = (functional.one_hot(channel, shape[0]) * sign).view(-1, 1, shape[0], 1, 1)
        grid = (shape[1], shape[2])
        return Patch(a, points, place, grid, (1, 1), (0, 0), grid)
    a = torch.zeros(
        *flat.shape, torch.Size(shape).numel(), dtype=sign.dtype, device=flat.device
    ).scatter_(-1, flat[..., None], sign[..., None])
    return Dense(a.view(*flat.shape, *shape), points)
