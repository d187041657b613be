"""Models without gradients, as modules: estimators and sessions.

Fitted scikit-learn classifiers and onnxruntime sessions are only called.
"""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from calipers.errors import BadInput
from calipers.models.wrappers import BlackBox, Kind

_FLOATS = {"tensor(float)": torch.float32, "tensor(double)": torch.float64}
_METHODS: dict[Kind, str] = {
    "scores": "decision_function",
    "probabilities": "predict_proba",
    "labels": "predict",
}


def is_estimator(value: object) -> bool:
    """Return whether an object has the methods of scikit-learn's classifiers."""
    return any(callable(getattr(value, method, None)) for method in _METHODS.values())


def is_session(value: object) -> bool:
    """Return whether an object has those of onnxruntime's `InferenceSession`."""
    return all(callable(getattr(value, m, None)) for m in ("get_inputs", "get_outputs", "run"))


def from_estimator(
    estimator: Any, kind: Kind | None = None, *, dtype: torch.dtype = torch.float64
) -> BlackBox:
    """Return a fitted scikit-learn classifier as a module.

    Its outputs are in the order of `estimator.classes_`. Labels of points are given as the
    estimator's own, whatever `classes_` holds, numbers or strings; targets and reports use their
    indices 0, 1, 2, ... Calls `decision_function` where there is one, else `predict_proba`, else
    `predict`; `kind` chooses. Points may have any shape: the estimator sees rows, as a frame with
    the names of its columns where it was fitted on one. Raises `BadInput` for an estimator that is
    not fitted, or does not offer that kind.
    """
    known = getattr(estimator, "classes_", None)
    if known is None:
        raise BadInput(f"{type(estimator).__name__} has no classes_: give a fitted classifier")
    have = [k for k, method in _METHODS.items() if hasattr(estimator, method)]
    if not have or (kind is not None and kind not in have):
        raise BadInput(
            f"{type(estimator).__name__} offers {', '.join(have) or 'no answers'}, not {kind}"
        )
    chosen = kind or have[0]
    ask = _by_name(estimator, getattr(estimator, _METHODS[chosen]))
    classes = np.asarray(known)
    function = (lambda rows: np.searchsorted(classes, ask(rows))) if chosen == "labels" else ask
    made = BlackBox(
        function,
        chosen,
        classes=len(classes),
        flat=True,
        name=f"{type(estimator).__name__} {_digest(estimator)}",
        dtype=dtype,
    )
    made.features = getattr(estimator, "feature_names_in_", None)
    made.labels = None if classes.tolist() == list(range(len(classes))) else classes
    return made


def _by_name(estimator: Any, ask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the method, called with frames where columns have names."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return ask
    try:
        frames: Any = importlib.import_module("pandas")
    except ImportError:
        return ask
    return lambda rows: ask(frames.DataFrame(rows, columns=names))


def from_session(
    session: Any, kind: Kind = "scores", *, classes: int | None = None, name: str | None = None
) -> BlackBox:
    """Return an onnxruntime `InferenceSession` of one input as a module.

    Its first output is the model's. `name` identifies the session in records; without it the names
    of input and output do. Raises `BadInput` for a session with more inputs, or one of another type
    than float or double.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type not in _FLOATS:
        raise BadInput(
            "the session must take one input of float or double, got "
            f"{[(i.name, i.type) for i in inputs]}"
        )
    dtype = _FLOATS[inputs[0].type]
    kind_of_number = np.float32 if dtype == torch.float32 else np.float64

    def ask(x: np.ndarray[Any, Any]) -> Any:
        return session.run([outputs[0].name], {inputs[0].name: x.astype(kind_of_number)})[0]

    return BlackBox(
        ask,
        kind,
        classes=classes,
        name=name or f"onnx {inputs[0].name} -> {outputs[0].name}",
        dtype=dtype,
    )


def _digest(value: object) -> str:
    """Return a hash of an object's state, where it can be pickled."""
    try:
        return hashlib.blake2b(pickle.dumps(value), digest_size=8).hexdigest()
    except Exception:
        return "without a digest"
