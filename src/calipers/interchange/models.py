"""Models from files, modules, builders, estimators, sessions, functions."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calipers import data
from calipers.errors import BadInput, BadModel
from calipers.interchange.checkpoints import SUFFIXES, check_weights, with_weights
from calipers.interchange.estimators import from_estimator, from_session, is_estimator, is_session
from calipers.interchange.files import existing
from calipers.interchange.onnx_files import is_onnx, read_or_ask
from calipers.interchange.pt2 import load_exported
from calipers.models.classifier import Classifier, in_training
from calipers.models.wrappers import BlackBox, Kind

_Statistics = float | Sequence[float] | Tensor


def load(
    source: Any,
    *,
    builder: str | Callable[[], nn.Module] | None = None,
    mean: _Statistics | None = None,
    std: _Statistics | None = None,
    output: str | int | None = None,
    shape: Sequence[int] | None = None,
    kind: Kind | None = None,
    classes: int | None = None,
) -> Classifier:
    """Return a classifier from a file, a module, an estimator or a function.

    Files are `file.py:function` (called without arguments), `net.onnx` (or `.onnx.gz`), `net.pt2`
    (from `torch.export.save`), weights (`.pt`, `.pth`, `.ckpt`, `.safetensors`, with the `builder`
    that makes their module) and the embedded networks, "mnist-plain" and "mnist-robust". Only
    `file.py` executes code; whole pickled models are refused.

    In Python a source may also be a module, a function that builds one, a fitted scikit-learn
    classifier, an onnxruntime session, or any function of arrays whose `kind` is given. The last
    three are only called, so attacks without gradients apply. Modules that are built here are put
    into evaluation mode.

    Args:
        source: The model, or the file that it is in.
        builder: Makes the module that weights belong to: `file.py:function`, or the function.
        mean: Mean by which the inputs were standardised when the model was trained, one number or
            one for each channel; points, box and radius are then in native units.
        std: Standard deviation, likewise.
        output: Name or number of the logits, where the model returns several things.
        shape: Shape of one point, where an ONNX file leaves more sizes free than the batch's.
        kind: What a function, an estimator or a session returns: "scores", "probabilities" or
            "labels".
        classes: Number of classes of a function that returns labels.

    Returns:
        A `Classifier`.

    Raises:
        BadInput: Where nothing can be read; the message says what to do.
        BadModel: For what is no model; the message says how to make it one.
        UnsupportedOp: For an operation of an ONNX file that can be neither bounded nor run.

    Example:
        >>> from torch import nn
        >>> load(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))).dtype
        torch.float32
        >>> load("mnist-robust").dtype
        torch.float32
    """
    if isinstance(source, str | Path):
        made = _from_file(str(source), builder, output, shape)
        output = None if is_onnx(Path(source)) else output  # read_or_ask has chosen it already
    elif builder is not None:
        raise BadInput("a builder makes the module for a file of weights: leave it out here")
    else:
        made = source() if kind is None and _is_builder(source) else source
    if isinstance(made, Classifier):
        if any(value is not None for value in (mean, std, output, kind)):
            raise BadInput(
                f"{source if isinstance(source, str) else 'this'} returns a Classifier, which "
                "holds its own mean, std and output: leave them out"
            )
        return made
    module = _module(made, kind, classes)
    active = in_training(module) if made is not source else []
    if made is not source:
        module.eval()
    classifier = Classifier(module, mean, std, output=output)
    if active:
        classifier.origin = "it was built in training mode, and put into evaluation mode"
    return classifier


def _module(made: Any, kind: Kind | None, classes: int | None) -> nn.Module:
    """Return as a module whatever can be called."""
    if isinstance(made, nn.Module):
        if kind is not None:
            raise BadInput("kind says what a function answers, and this is a torch.nn.Module")
        return made
    if isinstance(made, type):
        raise BadModel(
            f"{made.__name__} is a class; give a model made of it: {made.__name__}(...).eval()"
        )
    if is_session(made):
        return from_session(made, kind or "scores", classes=classes)
    if is_estimator(made):
        return from_estimator(made, kind)
    if not callable(made):
        raise BadModel(
            f"{type(made).__name__} is no model. Give a torch.nn.Module, a fitted estimator, a "
            "function with its kind, or the name of a file: calipers.load('net.onnx')."
        )
    if kind is not None:
        return BlackBox(made, kind, classes=classes)
    raise BadModel(
        f"the function {_called(made)} takes arguments, so it builds no model. If it answers "
        "arrays of points, say with what: calipers.load(function, kind='scores'), 'probabilities' "
        "or 'labels'. If it is made of torch, wrap it in a module whose forward calls it, which "
        "keeps its gradients."
    )


def _is_builder(value: Any) -> bool:
    """Return whether this is a function without arguments that builds a model.

    Modules, classes, estimators and sessions are not.
    """
    if isinstance(value, nn.Module | Classifier | type) or not callable(value):
        return False
    if is_estimator(value) or is_session(value):
        return False
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # of functions that are not written in Python
        return False
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in optional for p in parameters)


def _called(function: object) -> str:
    """Return the name of a function, for messages."""
    return str(getattr(function, "__name__", type(function).__name__))


def _from_file(
    source: str,
    builder: str | Callable[[], Any] | None,
    output: str | int | None,
    shape: Sequence[int] | None,
) -> Any:
    """Return what a file holds: a module, a Classifier or a function's result."""
    if shape is not None and not is_onnx(Path(source)):
        raise BadInput(f"shape settles the free sizes of an ONNX file, and {source} is none")
    if builder is not None and not source.endswith(SUFFIXES):
        raise BadInput(
            f"a builder makes the module for weights ({', '.join(SUFFIXES)}), and {source} is none "
            "of these: leave --builder out"
        )
    if source in data.NAMES:
        return data.build(source)
    if ".py:" in source:
        return _call(source)
    path = existing(source, "a model")
    if is_onnx(path):
        return read_or_ask(path, output=output, shape=shape)
    if path.suffix == ".pt2":
        return load_exported(path)
    if path.suffix in SUFFIXES:
        if builder is None:
            check_weights(path)
            raise BadInput(
                f"{source} holds weights only: name the code that builds the module, --builder "
                "file.py:function"
            )
        made = builder() if callable(builder) else _call(builder)
        return with_weights(made, path)
    raise BadInput(
        f"{source} is no model that can be read. Give file.py:function, an .onnx, a .pt2, weights "
        f"({', '.join(SUFFIXES)}) with --builder, or one of {', '.join(data.NAMES)}."
    )


def _call(source: str) -> Any:
    """Import `file.py` and call its function.

    While it is imported, its folder is on the search path, as it would be for `python file.py`.
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
