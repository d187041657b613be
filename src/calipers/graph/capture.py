"""How does a module become a graph? Exported, translated op by op, and only believed when both give the same numbers.

`torch.export` traces the classifier's network (standardisation and class expansion included) on a float64 copy with a free batch size;
`run_decompositions({})` makes it functional but keeps linear, convolution and batch norm whole. Constants are folded. At the end graph and module run
on the given points and on random ones, in float64, and must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from calipers.errors import CaptureError, UnsupportedOp
from calipers.graph.activations import ACTIVATIONS
from calipers.graph.affine import AFFINE, SHAPES, Call
from calipers.graph.fusion import fused
from calipers.graph.ir import Graph, Node, Op
from calipers.graph.products import SELECTIONS

_AGREEMENT = 1e-9  # relative; two float64 evaluations of the networks we measured differ by less than 1e-12


_UNCHANGED = frozenset(
    "aten.clone.default aten.alias.default aten.detach.default aten.contiguous.default aten.dropout.default aten.lift_fresh_copy.default".split()
)


_USES_BATCH_SIZE = "the model computes with the batch size at {}: its answer for one point would depend on the others. Process points independently."


class _Batch:
    """Stands for the batch size in an argument; replaced by the actual one at each call."""


@dataclass(frozen=True)
class _Result:
    """A number of the graph, with the shape the export recorded."""

    number: int
    shape: tuple[int, ...]


class Freezable(Protocol):
    """A model that can be held still while it is looked at."""

    @property
    def network(self) -> nn.Module:
        """The whole map from native inputs to logits."""

    def frozen(self) -> AbstractContextManager[None]:
        """Hold evaluation mode and random state inside the context."""

    def state(self) -> object:
        """Return what changes whenever a weight does."""


_captured: weakref.WeakKeyDictionary[Freezable, tuple[object, Graph]] = weakref.WeakKeyDictionary()


def graph_of(classifier: Freezable, x: Tensor) -> Graph:
    """Return the classifier's graph, captured once for each state of its weights: a certificate about older weights would be worth nothing."""
    state = (classifier.state(), tuple(x.shape[1:]))
    if classifier not in _captured or _captured[classifier][0] != state:
        _captured[classifier] = (state, capture(classifier, x))
    return _captured[classifier][1]


def capture(classifier: Freezable, x: Tensor) -> Graph:
    """Return the graph of the classifier's network in float64; x (N, *D) are points to compare on.

    Raises `UnsupportedOp` (an operation without facts: its name, module path and source line) or `CaptureError` (cannot be exported, mixes points of
    a batch, or graph and module disagree). Cost: about a second for a small network.
    """
    with classifier.frozen():
        network = copy.deepcopy(classifier.network).double().requires_grad_(False)
        sample = x[:3].double() if len(x) > 2 else torch.cat([x[:1].double()] * 3)
        graph = fused(_graph(network, sample))
        _compare(graph, network, sample)
    return graph


@runtime_checkable
class Carrier(Protocol):
    """A module that knows its own graph, in the precision of its buffers: what it was read from said so."""

    def graph(self) -> Graph:
        """Return the graph of what `forward` computes."""


def _graph(network: nn.Module, sample: Tensor) -> Graph:
    """Return a carried graph; of a sequence with a carrier in it, the parts' graphs one after another; of anything else, what the export shows."""
    if isinstance(network, Carrier):
        return network.graph()
    if isinstance(network, nn.Sequential) and any(isinstance(part, Carrier) for part in network):
        parts = []
        for part in network:
            parts.append(_graph(part, sample))
            sample = part(sample).detach()
        return reduce(_then, parts)
    return _Translator(_export(network, sample), sample).run()


def _then(first: Graph, second: Graph) -> Graph:
    """Return the graph that hands the first one's result to the second."""
    last = len(first.nodes)
    behind = [dataclasses.replace(node, inputs=tuple(i + last for i in node.inputs)) for node in second.nodes]
    return Graph(first.input_shape, (*first.nodes, *behind))


def _export(network: nn.Module, sample: Tensor) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = ({0: torch.export.Dim("batch", min=2)},)
            wrapped = _OneArgument(network)
            program: torch.export.ExportedProgram = torch.export.export(wrapped, (sample,), dynamic_shapes=shapes, strict=False).run_decompositions({})
            return program
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"the model cannot be exported as a graph ({type(error).__name__}: {first}). "
            "Usual causes: Python decisions that depend on the data, or code that fixes the batch size. "
            "Rewrite those with torch.where; attacks work without a graph."
        ) from error


class _OneArgument(nn.Module):
    """Gives every network the same signature, so that the free batch size can be declared."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x)
        return result


class _Translator:
    """Walks the exported program once; `known` maps each of its nodes to a constant, a number of the graph, or the batch size."""

    def __init__(self, program: torch.export.ExportedProgram, sample: Tensor) -> None:
        self.program, self.sample = program, sample
        given = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs)
        self.batch = str(given.meta["val"].shape[0])
        self.known: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []

    def run(self) -> Graph:
        constants = self._constants()
        for fx_node in self.program.graph.nodes:
            if fx_node.op == "placeholder":
                self.known[fx_node] = constants.get(fx_node.name, _Result(0, tuple(self.sample.shape[1:])))
            elif fx_node.op == "call_function":
                self.known[fx_node] = self._translate(fx_node)
            elif fx_node.op == "output":
                last = self.known[fx_node.args[0][0]]
        if not isinstance(last, _Result) or not self.nodes:
            raise CaptureError("the model's output does not depend on its input: nothing to bound")
        if last.number != len(self.nodes):
            self.nodes.append(Node(AFFINE["aten.view.default"](self._call("output", None, (last,), last.shape)), (last.number,), last.shape, "output"))  # type: ignore[arg-type]
        return Graph(tuple(self.sample.shape[1:]), tuple(self.nodes))

    def _constants(self) -> dict[str, Tensor]:
        signature, found = self.program.graph_signature, {}
        tensors = {**self.program.state_dict, **self.program.constants}
        for spec in signature.input_specs:
            if spec.target is not None and spec.target in tensors:
                found[spec.arg.name] = tensors[spec.target].detach()
        return found

    def _translate(self, fx_node: fx.Node) -> Any:
        name, args = str(fx_node.target), self._arguments(fx_node)
        if name == "aten.sym_size.int" and isinstance(args[0], _Result):
            return _Batch() if args[1] == 0 else args[0].shape[args[1] - 1]
        if name.startswith("aten._assert"):
            return None
        if name == "<built-in function getitem>":
            return args[0] if args[1] == 0 else None
        if name in _UNCHANGED:
            return args[0]
        variable = [a for a in _flatten(args) if isinstance(a, _Result)]
        if not variable:
            return self._fold(fx_node, args)
        shape = self._shape(fx_node)
        op = self._op(name, fx_node, args, shape)
        if op is None:
            raise UnsupportedOp(
                f"no bounds for {name} at {_where(fx_node)}. Rewrite that line with supported operations, or add the op's facts in calipers/graph; "
                "attacks work without them."
            )
        self.nodes.append(Node(op, tuple(v.number for v in variable), shape, _where(fx_node)))
        return _Result(len(self.nodes), shape)

    def _arguments(self, fx_node: fx.Node) -> tuple[Any, ...]:
        """Return positional arguments with keyword ones put in their places, and every node replaced by what is known of it."""
        args = list(fx_node.args)
        schema = getattr(fx_node.target, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema is not None else ()):
            if place >= len(args) and fx_node.kwargs and not argument.kwarg_only:
                args.append(fx_node.kwargs.get(argument.name, argument.default_value))
        return tuple(fx.node.map_arg(tuple(args), lambda n: self.known[n]))

    def _fold(self, fx_node: fx.Node, args: tuple[Any, ...]) -> Any:
        if any(isinstance(a, _Batch) for a in _flatten(args)):
            raise CaptureError(_USES_BATCH_SIZE.format(_where(fx_node)))
        return fx_node.target(*args, **fx_node.kwargs)  # type: ignore[operator]

    def _shape(self, fx_node: fx.Node) -> tuple[int, ...]:
        value = fx_node.meta["val"]
        value = value[0] if isinstance(value, (tuple, list)) else value
        free = not value.shape or str(value.shape[0]) != self.batch
        if free or any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
            raise CaptureError(
                f"the model mixes points of a batch at {_where(fx_node)} (a result of shape {tuple(value.shape)}). Keep the batch as the first axis."
            )
        return tuple(value.shape[1:]) or (1,)  # one number a point is a vector of one to the bounds

    def _call(self, name: str, target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> Call:
        flat = [a for a in _flatten(args) if isinstance(a, _Result)]
        places = tuple(i for i, a in enumerate(args) if isinstance(a, _Result))
        return Call(name, _bind(target, args), args, places, tuple(a.shape for a in flat), shape, self.sample.dtype, self.sample.device)

    def _op(self, name: str, fx_node: fx.Node, args: tuple[Any, ...], shape: tuple[int, ...]) -> Op | None:
        if name in ACTIVATIONS:
            return ACTIVATIONS[name]((*args, *_options(fx_node).values()))
        if name in SELECTIONS:
            return SELECTIONS[name](args, args[0].shape, shape)
        if name not in AFFINE or _unread(fx_node):
            return None
        if name not in SHAPES and any(isinstance(a, _Batch) for a in _flatten(args)):
            raise CaptureError(_USES_BATCH_SIZE.format(_where(fx_node)))
        return AFFINE[name](self._call(name, fx_node.target, args, shape))


def _bind(target: Any, args: tuple[Any, ...]) -> Callable[..., Tensor]:
    """Return the operation as a function of the tensors that depend on the point."""

    def run(*tensors: Tensor) -> Tensor:
        left = iter(tensors)

        def fill(a: Any) -> Any:
            if isinstance(a, (list, tuple)):
                return [fill(item) for item in a]
            return next(left) if isinstance(a, _Result) else len(tensors[0]) if isinstance(a, _Batch) else a

        result: Tensor = target(*[fill(a) for a in args])
        return result

    return run


def _options(fx_node: fx.Node) -> dict[str, Any]:
    """Return the keyword-only arguments of a call, defaults filled in, without those that change no result."""
    schema = getattr(fx_node.target, "_schema", None)
    options = {a.name: fx_node.kwargs.get(a.name, a.default_value) for a in (schema.arguments if schema is not None else ()) if a.kwarg_only}
    return {name: value for name, value in options.items() if name not in ("memory_format", "dtype", "layout", "device", "pin_memory")}


def _unread(fx_node: fx.Node) -> bool:
    """Does the call set a keyword-only option (such as the alpha of add) that changes its result, and that builders do not see?"""
    schema = getattr(fx_node.target, "_schema", None)
    defaults = {a.name: a.default_value for a in (schema.arguments if schema is not None else ()) if a.kwarg_only}
    return any(value != defaults[name] for name, value in _options(fx_node).items())


def _flatten(args: Any) -> list[Any]:
    return [leaf for a in args for leaf in _flatten(a)] if isinstance(args, (list, tuple)) else [args]


def _where(fx_node: fx.Node) -> str:
    """Name the module path and the last source line outside torch, as far as the export recorded them."""
    stack = fx_node.meta.get("nn_module_stack") or {}
    path = [str(value[0]) for value in stack.values()]
    module = (path[-1] if path else "").removeprefix("network").lstrip(".") or "the model"
    files = [line.strip() for line in (fx_node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    own = [line for line in files if "/torch/" not in line]
    place = (own or files or [""])[-1].removeprefix("File ").replace('"', "").replace(", line ", ":").split(", in ")[0]
    return f"{module} ({place})" if place else module


def _compare(graph: Graph, network: nn.Module, sample: Tensor) -> None:
    """Run both on the sample and on noise around it, a batch of another size included, and refuse any difference beyond rounding."""
    generator = torch.Generator().manual_seed(0)
    spread = sample.std().clamp_min(0.1)
    noise = torch.randn(5, *sample.shape[1:], generator=generator, dtype=torch.float64).to(sample.device) * spread
    for points in (sample, noise + sample.mean(0)):
        with torch.no_grad():
            expected, got = torch.cat([network(point) for point in points.split(1)]), graph.values(points)[-1]  # a model that mixes points shows here
        difference = (expected - got).abs().max()
        if expected.shape != got.shape or not bool(difference <= _AGREEMENT * (1 + expected.abs().max())):
            raise CaptureError(
                f"graph and model disagree by {float(difference):.3g} in float64: the model does something the export does not show "
                "(state, randomness, the batch, or a fixed dtype). "
                "Attacks work without a graph."
            )
