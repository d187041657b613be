"""Calls of a model that do not depend on the caller's settings.

With gradients, on a tensor of its own, as its own Python code.
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
    """Turn gradients on and inference mode off.

    Whatever the caller has set: evaluation code usually runs inside `torch.no_grad()`. Also
    decorates functions. Not for generators: what is set inside one is set for its caller
    as well, until the next value is asked for.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def normal(x: Tensor) -> Tensor:
    """Return the tensor, copied if it was made in inference mode.

    Inference tensors take no part in gradients.
    """
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled parts of a model as the Python code they were made of.

    Their compiled backward passes may be run only once. Where nothing was compiled the compiler is
    not even loaded.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def undressed(module: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile` or `DataParallel`.

    The module itself where it is not wrapped.
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
    """A network that gets a copy of its input at every call.

    So a model that writes to its input writes to the copy. `cut`: it runs without gradients, since
    with them it fails.
    """

    def __init__(self, of: nn.Module, cut: bool = False) -> None:
        super().__init__()
        self.of, self.cut = of, cut

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output: (N, *D) -> (N, K)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cut):
            result: Tensor = self.of((x.detach() if self.cut else x).clone())
        return result


class InHalf(nn.Module):
    """A half-precision network with inputs and outputs in float32.

    It rounds its input itself.
    """

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output: (N, *D) -> (N, K)."""
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
    """Return a remedy for a model that fails on the points it was given."""
    if any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in module.modules()):
        return (
            "It looks token ids up in an embedding, and no ball surrounds a word. Measure it on "
            "embedded points, in a module whose forward takes embeddings (for transformers: "
            "model(inputs_embeds=x)); or on one-hot symbols, x @ embedding.weight, with "
            "calipers.Substitutions."
        )
    return (
        "Check the shape (images are N, C, H, W) and that the model takes a single batch of inputs."
    )
