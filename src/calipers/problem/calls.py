"""How is a model called, so that nothing of its surroundings has a say? With gradients, on a tensor
of its own, as its own Python code.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Switch gradients on and inference mode off, whatever the caller has set: evaluation code
    stands inside `torch.no_grad()` as a habit.

    Also decorates functions. Not for generators: what is switched inside one is switched for its
    caller as well, until the next value is asked for.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def normal(x: Tensor) -> Tensor:
    """Return the tensor, copied if it was made in inference mode: such tensors take no part in
    gradients.
    """
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled parts of a model run as the Python code that they were made of: their backward
    passes may be run once only.

    Where nothing was compiled the compiler is not even loaded.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def undressed(module: nn.Module) -> nn.Module:
    """Return the module that was handed to `torch.compile` or `DataParallel`, or the module
    itself.
    """
    inner = module
    while True:
        if isinstance(original := getattr(inner, "_orig_mod", None), nn.Module):
            inner = original
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            return inner


class Fresh(nn.Module):
    """A network that is given a tensor of its own at every call: a model that writes to its input
    writes to that.

    `cut`: it runs without gradients, since with them it fails.
    """

    def __init__(self, of: nn.Module, cut: bool = False) -> None:
        super().__init__()
        self.of, self.cut = of, cut

    def forward(self, x: Tensor) -> Tensor:
        """(N, *D) -> (N, K)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cut):
            result: Tensor = self.of((x.detach() if self.cut else x).clone())
        return result


class InHalf(nn.Module):
    """A network of half precision that is asked and answers in single precision: it rounds its
    input itself.
    """

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        """(N, *D) -> (N, K)."""
        own = next(
            (p.dtype for p in [*self.of.parameters(), *self.of.buffers()] if p.is_floating_point()),
            x.dtype,
        )
        z: Tensor = self.of(x.to(own))
        return (
            z.to(torch.promote_types(z.dtype, torch.float32))
            if isinstance(z, Tensor) and z.is_floating_point()
            else z
        )


def cure(module: nn.Module) -> str:
    """Return what may help a model that fails on the points it was given."""
    if any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in module.modules()):
        return (
            "It looks token ids up in an embedding, and no ball surrounds a word. Measure it on "
            "embedded points, in a module whose forward takes embeddings (for transformers: "
            "model(inputs_embeds=x)); or on one-hot letters, x @ embedding.weight, with "
            "calipers.Substitutions."
        )
    return (
        "Check the shape (images are N, C, H, W) and that the model takes a single batch of inputs."
    )
