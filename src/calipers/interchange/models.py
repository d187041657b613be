"""How do models come in from files? Python files, exported programs, state dicts, ONNX."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calipers import data
from calipers.errors import BadInput, BadModel
from calipers.interchange.archives import Archive
from calipers.interchange.files import existing
from calipers.interchange.onnx_files import is_onnx, load_onnx
from calipers.interchange.pt2 import load_exported
from calipers.problem.classifier import Classifier


def load_model(
    source: str,
    *,
    builder: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Classifier:
    """Return the classifier that `source` names, in evaluation mode as its author left it.

    `file.py:function` (called without arguments, returns a module or a Classifier), `net.onnx` (or
    `.onnx.gz`), `model.pt2` (from torch.export.save), `weights.pt`, `.pth` or `.safetensors` (a
    state dict, with `builder` naming the `file.py:function` that makes the module), or the name of
    an embedded network. Only `file.py` executes code; pickled objects are refused.
    """
    made = _load(source, builder)
    if isinstance(made, Classifier):
        if mean is not None or std is not None:
            raise BadInput(
                f"{source} returns a Classifier, which holds its own mean and std: leave --mean "
                "and --std out"
            )
        return made
    if not isinstance(made, nn.Module):
        raise BadModel(
            f"{source} gave {type(made).__name__}, not a torch.nn.Module. Let the function return "
            "the module itself."
        )
    return Classifier(made, mean, std)


def _load(source: str, builder: str | None) -> Any:
    if source in data.NAMES:
        return data.build(source)
    if ".py:" in source:
        return _call(source)
    path = existing(source, "a model")
    if is_onnx(path):
        return load_onnx(path)
    if path.suffix == ".pt2":
        return load_exported(path)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        if builder is None:
            raise BadInput(
                f"{source} holds weights only: name the code that builds the module, --builder "
                "file.py:function"
            )
        return _with_weights(_call(builder), path)
    raise BadInput(
        f"{source} is no model that can be read. Give file.py:function, an .onnx, a .pt2, weights "
        f"(.pt, .pth, .safetensors) with --builder, or one of {', '.join(data.NAMES)}."
    )


def _call(source: str) -> Any:
    """Import `file.py`, with its folder importable as it would be for `python file.py`, and call
    the function.
    """
    file, _, name = source.rpartition(":")
    path = existing(file, "a model").resolve()
    spec = importlib.util.spec_from_file_location(f"calipers_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{file} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    if not callable(getattr(module, name, None)):
        found = [
            k
            for k, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", None) == module.__name__
        ]
        raise BadInput(
            f"{file} defines no function {name!r}; it defines {', '.join(found) or 'none'}"
        )
    return getattr(module, name)()


def _with_weights(module: Any, path: Path) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise BadModel(f"the builder gave {type(module).__name__}, not a torch.nn.Module")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            if zipfile.is_zipfile(path):
                Archive(path).close()  # whose sizes are looked at before torch unpacks it
            state = torch.load(path, weights_only=True, map_location="cpu")
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as plain weights ({type(error).__name__}). Save them with "
            "torch.save(module.state_dict(), path) or safetensors."
        ) from error
    try:
        module.load_state_dict(state.get("state_dict", state) if isinstance(state, dict) else state)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise BadInput(
            f"the weights in {path} do not fit the module that the builder makes: {why}"
        ) from error
    return module
