"""Which model is measured? A classifier in the data's native units, frozen while we look at it, and counted."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calipers.errors import BadModel
from calipers.problem.chance import ballot, differ, drawn, seeded
from calipers.problem.search_copy import search_copy

_MODE_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_PROBABILITY_TOLERANCE = 1e-5
_ROWS = 256  # of one call: all points at once would not fit
_ENOUGH_TO_TELL = 10  # points on which a single output that never leaves [0, 1] cannot be a logit by chance


class Standardise(nn.Module):
    """(x - mean) / std per channel, as the first layer of the model: radii then stay in native units everywhere."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, ...) or (N, d); the statistics have one entry, or one a channel (feature)."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


class TwoLogits(nn.Module):
    """A single logit z as the logits (0, z) of two classes: class 1 wins iff z > 0."""

    weight: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([[0.0], [1.0]], dtype=dtype, device=device))

    def forward(self, z: Tensor) -> Tensor:
        """(N,) or (N, 1) -> (N, 2)."""
        return nn.functional.linear(z.reshape(-1, 1), self.weight)


@dataclass
class Counter:
    """Passes through the model, counted in points."""

    forwards: int = 0
    backwards: int = 0


class Classifier:
    """Logits of a frozen model, inputs in native units.

    `module` maps (N, *D) to logits (N, K), or to a single logit (N,) or (N, 1), which becomes two classes. If the model was trained on standardised
    inputs give `mean` and `std` (one number or one a channel), and pass data, box and radius in native units. Device and dtype are those of the parameters.

    A model that draws random numbers is refused unless `draws` > 0 declares it: points are then judged by the median margin of that many fresh draws (see
    chance.py), and nothing is certified.

    The module itself is only touched inside `frozen()`, which puts back every flag, mode and random state, also after an exception.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: float | Sequence[float] | Tensor | None = None,
        std: float | Sequence[float] | Tensor | None = None,
        draws: int = 0,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise BadModel(f"a Classifier wraps a torch.nn.Module, got {type(module).__name__}. Load other models with calipers.load(...).")
        if (mean is None) != (std is None):
            raise BadModel("give both mean and std (the ones the model was trained with), or neither")
        if draws < 0:
            raise BadModel(f"draws is the number of draws that judge a random model (usually 100), or 0 for a model without chance, got {draws}")
        self.module, self.draws = module, draws
        self.counter = Counter()
        anchor = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = anchor.device, anchor.dtype
        self.mean, self.std = (None if v is None else torch.as_tensor(v, dtype=self.dtype, device=self.device).reshape(-1) for v in (mean, std))
        if self.std is not None and not bool((self.std > 0).all()):
            raise BadModel(f"std must be positive in every channel, got {self.std.tolist()}")
        self._head: list[nn.Module] = [] if self.mean is None or self.std is None else [Standardise(self.mean, self.std)]
        self._tail: list[nn.Module] = []
        self._double: tuple[object, nn.Module] | None = None

    @property
    def network(self) -> nn.Module:
        """The whole map from native inputs to at least two logits, sharing the module's parameters."""
        parts = [*self._head, self.module, *self._tail]
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts)

    def check(self, x: Tensor) -> Tensor:
        """Run the model on points x (N, *D) at the door, and return their logits (N, K).

        Raises `BadModel` for active dropout or batch norm, a call that fails, an output that is no logits, outputs that are probabilities, or
        that depend on chance where no `draws` are declared.
        """
        self._check_mode()
        few = x[:2]
        try:
            z = self.logits(few)
        except Exception as error:
            raise BadModel(
                f"the model could not be called on inputs of shape {tuple(x.shape[1:])} and dtype {x.dtype}: {error}. "
                "Check the shape (images are N, C, H, W) and that the model takes a single batch of inputs."
            ) from error
        if not isinstance(z, Tensor) or z.dim() not in (1, 2) or len(z) != len(few):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise BadModel(f"the model must return logits of shape (N, K); for {len(few)} inputs it returned {got}")
        if not self.draws:
            self._check_chance(few, z)
        single = not self._tail and (z.dim() == 1 or z.shape[1] == 1)
        if single:
            self._tail = [TwoLogits(self.dtype, self.device)]
        logits = self.logits(x)
        if single and len(x) >= _ENOUGH_TO_TELL and bool(((logits[:, 1] >= 0) & (logits[:, 1] <= 1)).all()):
            self._tail = []
            raise BadModel(
                f"the model's single output lies in [0, 1] at all {len(x)} points: it looks like a probability, but a logit is needed "
                "(class 1 wins where it is above 0). Remove the last sigmoid."
            )
        if _are_probabilities(logits):
            raise BadModel(
                "the model's outputs are probabilities (rows in [0, 1] that sum to 1), but margins need logits: softmax flattens gradients and hides "
                "distances. Remove the last softmax, or return its input."
            )
        return logits

    def _check_mode(self) -> None:
        active = [name or type(m).__name__ for name, m in self.module.named_modules() if m.training and isinstance(m, _MODE_DEPENDENT)]
        if active:
            raise BadModel(
                f"the model is in training mode with active dropout or batch norm ({', '.join(active[:3])}{', …' if len(active) > 3 else ''}): "
                "its answer would depend on chance and on the rest of the batch. Call model.eval() first."
            )

    def _check_chance(self, x: Tensor, before: Tensor) -> None:
        """Ask again, with other random numbers at hand."""
        self.counter.forwards += len(x)
        with self.frozen(), torch.no_grad():
            (after,) = drawn(self.network, x, 1, 0)
        if differ(before, after):
            raise BadModel(
                "the model answers differently when it is asked twice: one pass decides nothing about a point. If chance is part of its defence, say so with "
                "Classifier(model, draws=100): a point then counts as broken where at least half of 100 fresh draws are fooled. Otherwise switch the "
                "randomness off."
            )

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the model still: evaluation mode, no parameter gradients, random state forked; all put back at the end, whatever happens.

        A declared random model begins with the same draws each time: what a tool finds does not depend on what others have drawn before.
        """
        modes = [(m, m.training) for m in self.module.modules()]
        flags = [(p, p.requires_grad) for p in self.module.parameters()]
        devices = [self.device] if self.device.type == "cuda" else []
        with seeded(0, self.device) if self.draws else torch.random.fork_rng(devices=devices):
            try:
                for module, _ in modes:
                    module.training = False
                for parameter, _ in flags:
                    parameter.requires_grad_(False)
                yield
            finally:
                for module, mode in modes:
                    module.training = mode
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) without gradients; counts N forwards."""
        self.counter.forwards += len(x)
        with self.frozen(), torch.no_grad():
            return _in_parts(self.network, x)

    def logits64(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) of a float64 copy of the model: nearly exact arithmetic, to tell a margin from its rounding. Counts N forwards."""
        if self.dtype == torch.float64:
            return self.logits(x)
        if self._double is None or self._double[0] != self.state():
            with self.frozen():
                self._double = (self.state(), copy.deepcopy(self.network).double().requires_grad_(False))
        self.counter.forwards += len(x)
        with self.frozen(), torch.no_grad():
            return _in_parts(self._double[1], x.double())

    def ballot(self, x: Tensor) -> Tensor:
        """Return the logits (draws, N, K) of fresh draws of a random model, each point alone (see chance.py). Counts draws x N forwards."""
        self.counter.forwards += self.draws * len(x)
        with self.frozen():
            return ballot(self.network, x, self.draws)

    def state(self) -> tuple[tuple[int, int], ...]:
        """Return what changes whenever a weight or buffer is replaced or written to; copies made of the model are only good for the state they were made in."""
        return tuple((id(t), t._version) for t in [*self.module.parameters(), *self.module.buffers()])

    def step(self, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        """Return the bare map from inputs to logits for use inside `frozen()`, as a copy that gives gradients sooner (see search_copy.py), in the model's
        dtype or another one."""
        with self.frozen():
            low = search_copy(self.network, dtype or self.dtype)
        return low if dtype in (None, self.dtype) else lambda x: low(x.to(dtype)).to(self.dtype)

    def digest(self) -> str:
        """Return a hash of the code's structure and every parameter and buffer: the model's identity in a record."""
        h = hashlib.sha256(str(self.module).encode())
        if self.draws:
            h.update(f"judged by {self.draws} draws".encode())
        for name, tensor in sorted({**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}.items()):
            h.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]


def _in_parts(network: nn.Module, x: Tensor) -> Tensor:
    """Return the network's answers, so many points at a time that its memory does not grow with their number."""
    z: Tensor = network(x) if len(x) <= _ROWS else torch.cat([network(part) for part in x.split(_ROWS)])
    return z


def _are_probabilities(z: Tensor) -> bool:
    """Do all rows look like a softmax's output? A row of exactly equal logits (1/K each) alone is no sign of it."""
    inside = bool((z.min() >= -_PROBABILITY_TOLERANCE) and (z.max() <= 1 + _PROBABILITY_TOLERANCE))
    return inside and bool(((z.sum(1) - 1).abs() < _PROBABILITY_TOLERANCE).all()) and bool((z.max() - z.min()) > _PROBABILITY_TOLERANCE)
