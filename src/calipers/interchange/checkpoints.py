"""Weights from files, under the names that training scripts give them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import BadInput, BadModel
from calipers.interchange.archives import Archive

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
_INSIDE = ("state_dict", "model_state_dict", "model", "net", "weights")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
_INSTEAD = (
    "Where the model is built: torch.save(model.state_dict(), 'weights.pt'), then name the code "
    "that builds it, builder='file.py:function' (--builder); or torch.export.save("
    "torch.export.export(model, (x,)), 'net.pt2')."
)


def check_weights(path: Path) -> None:
    """Raise `BadInput`, with a remedy, where a file holds more than weights."""
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with Archive(path) as archive:  # checks the sizes before torch unpacks anything
            members = archive.names
        if any(name.endswith("/constants.pkl") for name in members):
            raise BadInput(
                f"{path} is a TorchScript program. Open it yourself if you trust it, and hand over "
                f"what you get: calipers.measure(torch.jit.load({path.name!r}), x, y, threat)."
            )
        if _runs_code(path):
            raise BadInput(
                f"{path} is a whole pickled object (torch.save(model)), which runs code when it is "
                f"opened, so it is not read. {_INSTEAD}"
            )


def _runs_code(path: Path) -> bool:
    """Return whether a pickle names anything but the classes of tensors."""
    try:
        return bool(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # torch raises anything for damaged files; reading them says more
        return False


def with_weights(module: Any, path: Path) -> nn.Module:
    """Return the module with the weights of a state dict or checkpoint.

    The prefixes that `DataParallel`, `torch.compile` and Lightning put before the keys are removed.
    """
    if not isinstance(module, nn.Module):
        raise BadModel(f"the builder gave {type(module).__name__}, not a torch.nn.Module")
    state = plain_tensors(path)
    try:
        module.load_state_dict(_fitting(_weights_in(state), module))
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise BadInput(
            f"the weights in {path} do not fit the module that the builder makes: {why}"
        ) from error
    return module


def plain_tensors(path: Path) -> Any:
    """Return what a file of tensors holds, in whatever containers.

    Nothing in the file is executed.
    """
    check_weights(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as plain tensors ({type(error).__name__}). {_INSTEAD}"
        ) from error


def _weights_in(state: Any) -> Any:
    """Return the state dict, wherever a checkpoint keeps it."""
    if isinstance(state, Mapping) and not any(isinstance(v, Tensor) for v in state.values()):
        for name in _INSIDE:
            if isinstance(state.get(name), Mapping):
                return _weights_in(state[name])
    return state


def _fitting(state: Any, module: nn.Module) -> Any:
    """Return the state dict without prefixes that the module's keys lack."""
    wanted = set(module.state_dict())
    while isinstance(state, Mapping) and state and not wanted & set(state):
        prefix = next((p for p in _WRAPPERS if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k[len(prefix) :]: v for k, v in state.items()}
    return state
