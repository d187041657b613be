"""What is an affine operation of which only the function is known? Its adjoint is PyTorch's
vector-Jacobian product.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from calipers.graph.kinds import Affine, Entry, Shape, diagonal_entry, matrix_entry

_FAN = 2  # outputs for each input, from which on the inputs are bounded in their place
_PLACES_WEIGH = re.compile(r"aten\.upsample_.*linear")


@dataclass(frozen=True, eq=False)
class Generic(Affine):
    """An affine operation given as a function: moving, copying, adding and averaging of elements,
    also next to constants ones (padding, concatenation).

    `run` is the operation itself on batches; the adjoint is its vector-Jacobian product at zero.
    `diagonal`: only the shape changes. Its weights are not negative, unless `sizes` is given: the
    operation with absolute weights and without its constant.
    """

    run: Callable[..., Tensor] = field(repr=False)
    name: str
    input_shapes: tuple[tuple[int, ...], ...]
    diagonal: bool = False
    sizes: Callable[..., Tensor] | None = field(default=None, repr=False)

    def value(self, *inputs: Tensor) -> Tensor:
        """As the model does it."""
        return self.run(*inputs)

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """By automatic differentiation; exact, since the operation is linear."""
        if self.diagonal:
            return (a.reshape(len(a), *self.input_shapes[0]),)
        live = torch.is_grad_enabled()  # then coefficients may depend on parameters
        with torch.enable_grad():
            zeros = [
                torch.zeros(len(a), *shape, dtype=a.dtype, device=a.device, requires_grad=True)
                for shape in self.input_shapes
            ]
            return torch.autograd.grad(self.run(*zeros), zeros, a, create_graph=live)

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def rounds(self) -> bool:
        """Does the operation compute anything?"""
        return not self.diagonal

    @property
    def sums_first(self) -> bool:
        """A mean may be executed as a sum."""
        return True

    @property
    def weighs_places(self) -> bool:
        """Images that are resized by interpolation."""
        return _PLACES_WEIGH.match(self.name) is not None

    @property
    def executed_as_written(self) -> bool:
        """Not a variance, nor an image that is resized to places which a precision rounds to
        others.
        """
        if self.name == "centre" or "nearest" not in self.name:
            return self.name != "centre"
        places = [
            torch.arange(torch.Size(s).numel(), dtype=torch.float64).view(1, *s)
            for s in self.input_shapes
        ]
        return torch.equal(self.run(*places), self.run(*(p.float() for p in places)).double())

    def carries(self, shapes: list[Shape], shape: Shape) -> bool:
        """Where it only moves and copies elements, or makes several times as many of them.

        Weights that are not negative, and of which the moments of order 0, 1 and 2 are those of a
        single one, belong to a single element.
        """
        if len(shapes) > 1:
            return False
        count = torch.Size(shapes[0]).numel()
        if torch.Size(shape).numel() >= _FAN * count or self.sizes is not None:
            return torch.Size(shape).numel() >= _FAN * count
        place = torch.arange(1.0, count + 1, dtype=torch.float64)
        with torch.no_grad():
            nothing, ones, first, second = (
                self.run(t.view(1, *shapes[0])).flatten()
                for t in (0 * place, place**0, place, place.square())
            )
        return (
            not bool(nothing.any())
            and bool((ones == 1).all())
            and bool((second == first.square()).all())
        )

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """As a matrix; the identity where only the shape changes."""
        if self.diagonal:
            return diagonal_entry(torch.ones(()).expand(shape))
        return matrix_entry(self.run, shapes, shape)

    def absolute(self, *inputs: Tensor) -> Tensor:
        """The weights are their own absolute values; what stands next to them is taken off."""
        if self.sizes is not None:
            return self.sizes(*inputs)
        made = self.run(*inputs)
        return made if self.diagonal else made - self._constant(inputs[0])

    def _constant(self, like: Tensor) -> Tensor:
        if like.dtype not in self._constants:
            self._constants[like.dtype] = self.run(
                *(like.new_zeros(1, *shape) for shape in self.input_shapes)
            )
        return self._constants[like.dtype]

    @cached_property
    def _constants(self) -> dict[torch.dtype, Tensor]:
        return {}
