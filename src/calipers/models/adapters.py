"""Layers around a model that turn what it returns into logits.

They choose among several outputs, undo a last softmax, or make two logits of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calipers.errors import BadModel

_SOFTMAX = frozenset({"softmax", "_softmax", "special_softmax"})
_SIGMOID = frozenset({"sigmoid", "special_expit", "expit"})
_LAST_LAYERS: dict[type[nn.Module], str] = {nn.Softmax: "softmax", nn.Sigmoid: "sigmoid"}
_NAMES_OF_LOGITS = ("logits",)


class Standardise(nn.Module):
    """(x - mean) / std per channel, as the first layer of the model.

    Radii then stay in native units everywhere.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised inputs, (N, C, ...) or (N, d).

        The statistics have one entry, or one for each channel (feature).
        """
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


class TwoLogits(nn.Module):
    """A single logit z as the logits (0, z): class 1 wins iff z > 0."""

    weight: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([[0.0], [1.0]], dtype=dtype, device=device))

    def forward(self, z: Tensor) -> Tensor:
        """Return the two logits: (N,) or (N, 1) -> (N, 2)."""
        return nn.functional.linear(z.reshape(-1, 1), self.weight)


class LogProbabilities(nn.Module):
    """Logarithms of probabilities, as logits of the same order.

    The logarithm is increasing, so the same class wins. A single probability p becomes (log(1 - p),
    log(p)), so class 1 wins iff p > 1/2. Zeros become the smallest normal float32 number before the
    logarithm.
    """

    def forward(self, p: Tensor) -> Tensor:
        """Return the logarithms: (N, K), (N,) or (N, 1) -> (N, K) or (N, 2)."""
        if p.dim() == 1 or p.shape[1] == 1:
            p = p.reshape(-1, 1)
            p = torch.cat([1 - p, p], 1)
        return p.clamp_min(torch.finfo(torch.float32).tiny).log()


class Chosen(nn.Module):
    """One output of a network that returns several, by name or number."""

    def __init__(self, network: nn.Module, output: str | int) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, x: Tensor) -> Tensor:
        """Return the chosen output: (N, *D) -> (N, K)."""
        return picked(self.network(x), self.output)


class BeforeLast(nn.Module):
    """A network without the softmax or sigmoid that ends it.

    It returns the input of that function instead.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits: (N, *D) -> (N, K)."""
        with LastCalls() as seen:
            z = self.network(x)
        found = seen.before(z)
        if found is None:
            raise BadModel(
                "the model ends in a softmax or sigmoid in some calls and not in others; let it "
                "return logits always"
            )
        logits: Tensor = found[1]
        return logits


class LastCalls(TorchFunctionMode):
    """A mode that records the inputs of softmax and sigmoid calls.

    Of each softmax over classes and each sigmoid while a network runs.
    """

    def __init__(self) -> None:
        super().__init__()
        # results are kept alive, so that no other tensor gets the same address
        self._calls: dict[int, tuple[Tensor, str, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, and record the call if it may be a last layer."""
        result = func(*args, **(kwargs or {}))
        kind = _kind(func)
        tensors = bool(kind and args) and isinstance(result, Tensor) and isinstance(args[0], Tensor)
        if tensors and (kind == "sigmoid" or _over_classes(args, kwargs or {})):
            self._calls[id(result)] = (result, kind, args[0])
        return result

    def before(self, z: object) -> tuple[str, Tensor] | None:
        """Return "softmax" or "sigmoid" and its input, if `z` is its output."""
        call = self._calls.get(id(z))
        return None if call is None else call[1:]


def _kind(func: Any) -> str:
    """Return "softmax", "sigmoid" or "" for a torch function."""
    name = str(getattr(func, "__name__", "")).split(".")[0]
    return "softmax" if name in _SOFTMAX else "sigmoid" if name in _SIGMOID else ""


def _over_classes(args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Return whether a softmax is of a table, along its rows."""
    dim = options.get("dim", args[1] if len(args) > 1 else None)
    return bool(args[0].dim() == 2 and dim in (1, -1, None))


def without_last(network: nn.Module) -> nn.Module:
    """Return the network without its last softmax or sigmoid.

    A sequence simply loses its last layer.
    """
    layers = list(network) if type(network) is nn.Sequential else []
    if len(layers) > 1 and type(layers[-1]) in _LAST_LAYERS and not layers[-1]._forward_hooks:
        return nn.Sequential(*layers[:-1]).train(network.training)
    return BeforeLast(network)


def picked(answer: Any, output: str | int) -> Tensor:
    """Return the output of that name or number."""
    if isinstance(output, str) and not isinstance(answer, Mapping):
        answer = getattr(answer, output)
    else:
        answer = answer[output]
    result: Tensor = answer
    return result


def choice(answer: Any, output: str | int | None) -> str | int | None:
    """Return which of a model's outputs are the logits.

    None where it returns one tensor. An output called `logits` is taken by default, and so is the
    only tensor among several values. Raises `BadModel` where there is no telling, or no such
    `output`.
    """
    if isinstance(answer, Tensor):
        if output is None:
            return None
        raise BadModel(f"the model returns one tensor: there is no output {output!r} to choose")
    held = _tensors_in(answer)
    if not held:
        raise BadModel(
            f"the model must return logits of shape (N, K); it returned a {type(answer).__name__} "
            "without tensors"
        )
    told = ", ".join(f"{name!r} {tuple(t.shape)}" for name, t in list(held.items())[:8])
    if output is not None:
        if output in held:
            return output
        raise BadModel(f"the model has no output {output!r}; it returns {told}")
    for name in _NAMES_OF_LOGITS:
        if name in held:
            return name
    if len(held) == 1:
        return next(iter(held))
    raise BadModel(
        f"the model returns a {type(answer).__name__} with {told}: say which are the logits, "
        f"calipers.Classifier(model, output={next(iter(held))!r})"
    )


def _tensors_in(answer: Any) -> dict[str | int, Tensor]:
    """Return the tensors of a dict, tuple, list or object with attributes.

    By name or number.
    """
    pairs: Any
    if isinstance(answer, Mapping):
        pairs = answer.items()
    elif isinstance(answer, tuple) and hasattr(answer, "_fields"):
        pairs = zip(answer._fields, answer, strict=True)
    elif isinstance(answer, list | tuple):
        pairs = enumerate(answer)
    else:
        pairs = vars(answer).items() if hasattr(answer, "__dict__") else ()
    return {name: value for name, value in pairs if isinstance(value, Tensor)}


def check_outputs(z: object, n: int) -> None:
    """Raise `BadModel` unless a model returned logits for n points."""
    if not isinstance(z, Tensor) or z.dim() not in (1, 2) or len(z) != n:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise BadModel(
            f"the model must return logits of shape (N, K); for {n} inputs it returned {got}"
        )
    if not z.is_floating_point():
        raise BadModel(
            f"the model returns {z.dtype}, but logits are floating point numbers. A model that "
            "answers with labels goes through calipers.BlackBox(function, kind='labels', "
            "classes=K); then attacks without gradients apply."
        )
