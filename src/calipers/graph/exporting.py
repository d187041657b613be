"""How is a module exported as a program, and why can it not be?"""

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
    """Return the program of a network, with a free batch size or for a `single` point.

    Raises `CaptureError` where it cannot be exported. Cost: about a second for a small network.
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
    """Return the program without operations in place, and in fewer different ones."""
    with _as_refusals():
        written: torch.export.ExportedProgram = program.run_decompositions(_STEP_BY_STEP)
        return written


@contextmanager
def _as_refusals() -> Iterator[None]:
    """Say in our words why a program cannot be exported; transformer layers are exported as their
    parts, not as one fused kernel.
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
"""Recurrent layers are written out, one time step after the other."""


class _OneArgument(nn.Module):
    """Gives every network the same signature, so that the free batch size can be declared."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x)
        return result
