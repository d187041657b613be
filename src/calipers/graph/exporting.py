"""Export of a module as a program, and the errors where that fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._decomp import decompositions

from calipers.errors import CaptureError, typed


def exported(
    network: nn.Module, sample: Tensor, *, single: bool = False
) -> torch.export.ExportedProgram:
    """Return the program of a network, exported by `torch.export`.

    The batch size is free, or 1 for a `single` point. Raises `CaptureError` where the network
    cannot be exported. Cost: about a second for a small network.
    """
    with _as_refusals():
        shapes = None if single else ({0: torch.export.Dim("batch", min=2)},)
        return torch.export.export(
            _OneArgument(network),
            (sample[:1] if single else sample,),
            dynamic_shapes=shapes,
            strict=False,
        )


def in_fewer(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program in functional form, with fewer kinds of operations."""
    with _as_refusals():
        written: torch.export.ExportedProgram = program.run_decompositions(_STEP_BY_STEP)
        return written


@contextmanager
def _as_refusals() -> Iterator[None]:
    """Turn export errors into `CaptureError`, with the fused kernels off.

    Transformer layers are then exported as their parts, not as one fused kernel.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise CaptureError(
            f"the model cannot be exported as a graph ({typed(error)}). Usual causes: Python "
            "decisions that depend on the data, or code that fixes the batch size. Rewrite those "
            "with torch.where; attacks work without a graph."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_STEP_BY_STEP = {
    torch.ops.aten.lstm.input: decompositions.lstm_impl,
    torch.ops.aten.gru.input: decompositions.gru_impl,
}
"""Decompositions that unroll recurrent layers over the time steps."""


class _OneArgument(nn.Module):
    """A wrapper that gives every network the same signature.

    The free batch size can then be declared.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x)
        return result
