"""An affine operation of which only the function is known.

Its adjoint is PyTorch's vector-Jacobian product.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from calipers.graph.kinds import Affine, Entry, Shape, diagonal_entry, matrix_entry

_FAN = 2  # from this many outputs per input on, the inputs are bounded instead
_PLACES_WEIGH = re.compile(r"aten\.upsample_.*linear")


@dataclass(frozen=True, eq=False)
class Generic(Affine):
    """An affine operation given as a function.

    It moves, copies, adds or averages elements, also beside constant ones (padding, concatenation).

    `run` is the operation itself on batches; the adjoint is its vector-Jacobian product at zero.
    `diagonal`: only the shape changes. The weights are not negative unless `sizes` is given, which
    is the operation with absolute weights and without its constant.
    """

    run: Callable[..., Tensor] = field(repr=False)
    name: str
    input_shapes: tuple[tuple[int, ...], ...]
    diagonal: bool = False
    sizes: Callable[..., Tensor] | None = field(default=None, repr=False)

    def value(self, *inputs: Tensor) -> Tensor:
        """Return the result of the model's own operation."""
        return self.run(*inputs)

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return W^T a by automatic differentiation, exact for a linear map."""
        if self.diagonal:
            return (a.reshape(len(a), *self.input_shapes[0]),)
        live = torch.is_grad_enabled()  # with gradients on, coefficients may depend on parameters
        with torch.enable_grad():
            zeros = [
                torch.zeros(len(a), *shape, dtype=a.dtype, device=a.device, requires_grad=True)
                for shape in self.input_shapes
            ]
            return torch.autograd.grad(self.run(*zeros), zeros, a, create_graph=live)

    @property
    def label(self) -> str:
        """Return the name of the operation."""
        return self.name

    @property
    def rounds(self) -> bool:
        """Return whether the operation does more than change the shape."""
        return not self.diagonal

    @property
    def sums_first(self) -> bool:
        """Return True: a mean may be executed as a sum and a division."""
        return True

    @property
    def weighs_places(self) -> bool:
        """Return whether the operation resizes images by interpolation."""
        return _PLACES_WEIGH.match(self.name) is not None

    @property
    def executed_as_written(self) -> bool:
        """Return whether the operation is executed exactly as written.

        It is not for a variance ("centre"), nor for an image resized to the nearest places where a
        lower precision rounds some place to another.
        """
        if self.name == "centre" or "nearest" not in self.name:
            return self.name != "centre"
        places = [
            torch.arange(torch.Size(s).numel(), dtype=torch.float64).view(1, *s)
            for s in self.input_shapes
        ]
        return torch.equal(self.run(*places), self.run(*(p.float() for p in places)).double())

    def carries(self, shapes: list[Shape], shape: Shape) -> bool:
        """Return whether to bound the input instead of the result.

        So it is where the operation only moves and copies elements, or where its result has at
        least twice as many elements as its input.

        To recognise moves and copies, the moments of order 0, 1 and 2 of the weights (non-negative)
        over element numbers are computed: where they equal those of a single element of weight 1,
        each output is one input element.
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
        """Return a matrix entry; the identity where only the shape changes."""
        if self.diagonal:
            return diagonal_entry(torch.ones(()).expand(shape))
        return matrix_entry(self.run, shapes, shape)

    def absolute(self, *inputs: Tensor) -> Tensor:
        """Return |W| r.

        The weights are non-negative, so that is W r: the operation without its constant.
        """
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
