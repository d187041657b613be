"""What is an affine operation of which only the function is known? Its adjoint is PyTorch's
vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Generic:
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
    kind: Literal["affine"] = field(default="affine", repr=False)

    def value(self, *inputs: Tensor) -> Tensor:
        """As the model does it."""
        return self.run(*inputs)

    def adjoint(self, a: Tensor) -> tuple[Tensor, ...]:
        """By automatic differentiation; exact, since the operation is linear."""
        if self.diagonal:
            return (a.reshape(len(a), *self.input_shapes[0]),)
        with torch.enable_grad():
            zeros = [
                torch.zeros(len(a), *shape, dtype=a.dtype, device=a.device, requires_grad=True)
                for shape in self.input_shapes
            ]
            return torch.autograd.grad(self.run(*zeros), zeros, a)

    @property
    def positive(self) -> bool:
        """Are no weights negative?"""
        return self.sizes is None

    @property
    def rounds(self) -> bool:
        """Does the operation compute anything?"""
        return not self.diagonal

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

    def to(self, dtype: torch.dtype) -> Generic:
        """No constants to convert."""
        return self
