"""Capture of a PyTorch module as a graph, compared with the module.

`torch.export` traces the classifier's network (standardisation and class expansion included) on a
float64 copy with a free batch size, and each exported operation is translated. Where that does not
succeed, `run_decompositions` makes the program functional but keeps linear, convolution and batch
norm whole. Constants are folded. At the end graph and module run on the given points and on random
ones in float64, and the capture is refused unless both give the same numbers.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import reduce
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, fx, nn

from calipers.errors import CaptureError, UnsupportedOp, typed
from calipers.graph.call_builder import USES_BATCH_SIZE, WHOLE, Asked, BatchSize, bind, build
from calipers.graph.calls import (
    leaves,
    options,
    place_of,
    rounded_often,
    unread,
)
from calipers.graph.compositions import CHOICES, Condition
from calipers.graph.exporting import exported, in_fewer
from calipers.graph.fusion import fused
from calipers.graph.ir import Graph
from calipers.graph.node_writer import NodeResult, Writer

_AGREEMENT = (
    1e-9  # relative; float64 evaluations of the networks we measured differ by less than 1e-12
)


_UNCHANGED = frozenset(
    "aten.clone.default aten.alias.default aten.detach.default aten.contiguous.default "
    "aten.dropout.default aten.lift_fresh_copy.default".split()
)


class Freezable(Protocol):
    """A model whose state can be held fixed while it is captured."""

    def precisely(self) -> AbstractContextManager[nn.Module]:
        """Hold the model fixed and yield a float64 copy of it.

        The copy maps native inputs to logits.
        """

    @property
    def network(self) -> nn.Module:
        """Return the same map, sharing the model's parameters."""

    def state(self) -> object:
        """Return a value that changes whenever a weight does."""


_captured: weakref.WeakKeyDictionary[Freezable, tuple[object, Graph]] = weakref.WeakKeyDictionary()
_traced: weakref.WeakKeyDictionary[Freezable, tuple[object, Trace]] = weakref.WeakKeyDictionary()


def graph_of(classifier: Freezable, x: Tensor, *, live: bool = False) -> Graph:
    """Return the classifier's graph, captured once per state of its weights.

    A certificate about older weights would be worth nothing, so the graph is captured anew when a
    weight has changed.

    With `live` the graph is made of the model's own parameters, in the dtype and on the device of
    x, so that bounds are differentiable with respect to them. The model is traced once; each call
    binds its parameters and buffers as they are now, in evaluation mode. Call it again after each
    optimiser step and after each backward pass:

        optimiser.zero_grad()
        graph = graph_of(classifier, x, live=True)
        state = relax(graph, region, arithmetic, refine=False)
        (-margin_bounds(state, rows).amin(1)).clamp(min=-1).mean().backward()
        optimiser.step()

    Raises as `capture`, and with `live` also where the model was read from a file, whose numbers
    are constants.
    """
    if live:
        return _bound_to(classifier, x)
    state = (classifier.state(), tuple(x.shape[1:]))
    if classifier not in _captured or _captured[classifier][0] != state:
        _captured[classifier] = (state, capture(classifier, x))
    return _captured[classifier][1]


def capture(classifier: Freezable, x: Tensor) -> Graph:
    """Return the graph of the classifier's network in float64.

    `x` (N, *D) are points on which graph and module are compared.

    Raises `UnsupportedOp` for an operation without known facts (its name, module path and source
    line are given), and `CaptureError` where the model cannot be copied or exported, mixes points
    of a batch, or disagrees with its graph, and for any other error during the capture. Cost: about
    a second for a small network.
    """
    with _as_capture_errors(), classifier.precisely() as network:
        sample = _sample(x)
        graph = fused(_graph(network, sample))
        _compare(graph, network, sample)
    return graph


def _sample(x: Tensor) -> Tensor:
    return x[:3].double() if len(x) > 2 else torch.cat([x[:1].double()] * 3)


@contextmanager
def _as_capture_errors() -> Iterator[None]:
    try:
        yield
    except (CaptureError, UnsupportedOp):
        raise
    except Exception as error:
        raise CaptureError(
            f"the model cannot be turned into a graph ({typed(error)}); attacks work without a "
            "graph"
        ) from error


def _bound_to(classifier: Freezable, x: Tensor) -> Graph:
    """Return the graph of the model's current parameters.

    The model is traced if that has not been done.
    """
    network = classifier.network
    named = [*network.named_parameters(), *network.named_buffers()]
    form = (repr(network), tuple(x.shape[1:]), tuple((name, t.shape) for name, t in named))
    if classifier not in _traced or _traced[classifier][0] != form:
        _traced[classifier] = (form, _trace(classifier, x))
    live = {
        f"network.{name}": t
        for held in (network.named_parameters, network.named_buffers)
        for name, t in held(remove_duplicate=False)
    }
    return fused(_traced[classifier][1].graph(x[:1], live))


def _trace(classifier: Freezable, x: Tensor) -> Trace:
    """Export the model in float64 and compare its graph, as `capture` does."""
    with _as_capture_errors(), classifier.precisely() as network:
        if any(map(_carries, network.modules())):
            raise CaptureError(
                "a model that was read from a file has no parameters to train: its numbers are "
                "constants. Train a module of torch, and measure it from there."
            )
        sample = _sample(x)
        graph, trace = _exported(network, sample)
        _compare(fused(graph), network, sample)
        return trace


@runtime_checkable
class Carrier(Protocol):
    """A module that knows its own graph, since it was read from a file.

    The graph is in the precision of the module's buffers.
    """

    def graph(self) -> Graph:
        """Return the graph of what `forward` computes."""


def _graph(network: nn.Module, sample: Tensor) -> Graph:
    """Return the graph of a network, its own where the module carries one.

    For a sequence with a carrier in it the graphs of the parts are joined one after another;
    anything else is exported.
    """
    for module in network.modules():
        known = getattr(module, "no_graph", "")  # why there is none, where the module says so
        if isinstance(known, str) and known:
            raise UnsupportedOp(known)
    if _carries(network):
        return network.graph()
    inner = getattr(network, "of", None)  # the network inside a wrapper that copies its input
    if isinstance(inner, nn.Module) and any(map(_carries, inner.modules())):
        return _graph(inner, sample)
    if isinstance(network, nn.Sequential) and any(map(_carries, network)):
        parts = []
        for part in network:
            parts.append(_graph(part, sample))
            sample = part(sample).detach()
        return reduce(_then, parts)
    return _exported(network, sample)[0]


def _carries(network: object) -> TypeGuard[Carrier]:
    """Return whether the module knows its own graph.

    An exported program has an attribute of that name too, which is something else.
    """
    return isinstance(network, Carrier) and callable(network.graph)


class Trace(NamedTuple):
    """A program that could be translated, and whether it is for one point."""

    program: torch.export.ExportedProgram
    single: bool = False

    def graph(self, sample: Tensor, live: Mapping[str, Tensor] | None = None) -> Graph:
        """Return the graph of the program; `live` parameters replace its own.

        They are matched by name.
        """
        return _Translator(self.program, sample, single=self.single, live=live).run()


def _exported(network: nn.Module, sample: Tensor) -> tuple[Graph, Trace]:
    """Return the exported graph and the program it was translated from.

    The program is exported with a free batch size; where the batch does not remain the first axis,
    it is exported for a single point instead.

    Most programs can be translated as exported; decomposing one into fewer kinds of operations
    takes four times as long as its export, so that is done only for the others. A graph captured
    for one point may come from a model that mixes the points of a batch. Running the module on
    several points shows this, and then the first error is raised.
    """
    try:
        trace = Trace(exported(network, sample))
        with suppress(CaptureError, UnsupportedOp):
            return trace.graph(sample), trace
        trace = Trace(in_fewer(trace.program))
        return trace.graph(sample), trace
    except (CaptureError, UnsupportedOp) as refused:
        try:
            trace = Trace(in_fewer(exported(network, sample, single=True)), single=True)
            graph = trace.graph(sample)
        except UnsupportedOp:
            # the operation is unsupported for any batch size: report this, not the first error
            raise
        except CaptureError:
            raise refused from None
        if not _keeps_points_apart(network, sample):
            raise refused from None
        return graph, trace


def _keeps_points_apart(network: nn.Module, sample: Tensor) -> bool:
    with torch.no_grad():
        together, alone = network(sample), torch.cat([network(point) for point in sample.split(1)])
    return together.shape == alone.shape and bool(
        (together - alone).abs().max() <= _AGREEMENT * (1 + alone.abs().max())
    )


def _then(first: Graph, second: Graph) -> Graph:
    """Return the graph that feeds the result of the first to the second."""
    last = len(first.nodes)
    behind = [
        dataclasses.replace(node, inputs=tuple(i + last for i in node.inputs))
        for node in second.nodes
    ]
    return Graph(
        first.input_shape, (*first.nodes, *behind), computed=first.computed or second.computed
    )


class _Translator:
    """A translator of an exported program, in one pass over its nodes.

    `known` maps each of its nodes to a constant, a result of the graph, or the batch size.
    `single`: the program was exported for one point, and its batch axis of size 1 is an axis like
    all others.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        sample: Tensor,
        *,
        single: bool = False,
        live: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.program, self.sample, self.single, self.live = program, sample, single, live
        given = next(
            n
            for n in program.graph.nodes
            if n.op == "placeholder" and n.name in program.graph_signature.user_inputs
        )
        self.batch = str(given.meta["val"].shape[0])
        self.known: dict[fx.Node, Any] = {}
        self.computed = ""
        self.writer = Writer(sample.dtype, sample.device, int(single))

    def run(self) -> Graph:
        constants, shape = self._constants(), tuple(self.sample.shape[1:])
        for fx_node in self.program.graph.nodes:
            if fx_node.op == "placeholder" and fx_node.name in constants:
                self.known[fx_node] = constants[fx_node.name]
            elif fx_node.op == "placeholder":
                given = NodeResult(0, shape)
                self.known[fx_node] = (
                    self.writer.reshape(given, (1, *shape)) if self.single else given
                )
            elif fx_node.op == "call_function":
                self.writer.where = place_of(fx_node)
                self.known[fx_node] = self._translate(fx_node)
            elif fx_node.op == "get_attr":
                # an inner program: blocks of no_grad or autocast are inlined when the program is
                # decomposed
                raise UnsupportedOp(
                    f"a part of the model is a program of its own ({fx_node.target}), at "
                    f"{place_of(fx_node)}: a branch or a loop on data"
                )
            elif fx_node.op == "output":
                last = self.known[fx_node.args[0][0]]
        if (
            not isinstance(last, NodeResult)
            or not last.number
            or len(self.writer.nodes) == int(self.single)
        ):
            raise CaptureError("the model's output does not depend on its input: nothing to bound")
        last = self.writer.reshape(last, last.shape[1:]) if self.single else last
        if last.number != len(self.writer.nodes):
            self.writer.move("output", lambda x: x, last, diagonal=True)
        return Graph(shape, tuple(self.writer.nodes), computed=self.computed)

    def _constants(self) -> dict[str, Tensor]:
        signature, found = self.program.graph_signature, {}
        tensors = {**self.program.state_dict, **self.program.constants}
        for spec in signature.input_specs:
            if spec.target is not None and spec.target in tensors:
                held = tensors[spec.target].detach()
                if self.live is not None:
                    held = self.live.get(spec.target, held)
                    dtype = self.sample.dtype if held.is_floating_point() else held.dtype
                    held = held.to(self.sample.device, dtype)
                found[spec.arg.name] = held
        return found

    def _translate(self, fx_node: fx.Node) -> Any:
        name, args = str(fx_node.target), self._arguments(fx_node)
        if name == "aten.sym_size.int" and isinstance(args[0], NodeResult):
            return BatchSize() if args[1] == 0 else args[0].shape[args[1] - 1]
        if name.startswith("aten._assert"):
            return None
        if name == "<built-in function getitem>":
            return (
                args[0][args[1]]
                if isinstance(args[0], (list, tuple))
                else args[0]
                if args[1] == 0
                else None
            )
        if name in _UNCHANGED:
            return args[0]
        compared = [a for a in leaves(args) if isinstance(a, Condition)]
        if compared and name not in CHOICES:
            raise UnsupportedOp(f"{name} at {place_of(fx_node)}: {compared[0].refused()}")
        if not compared and not any(isinstance(a, NodeResult) for a in leaves(args)):
            return self._fold(fx_node, args)
        if name in _SEVERAL:
            return self._parts(fx_node, args)
        shape = self._shape(fx_node.meta["val"], place_of(fx_node))
        try:
            result = self._written(name, fx_node, args, shape)
        except UnsupportedOp as refused:
            raise UnsupportedOp(f"{name} at {place_of(fx_node)}: {refused}") from refused
        if result is None:
            raise UnsupportedOp(
                f"no bounds for {name} at {place_of(fx_node)}{_STEPS.get(name, '')}. Rewrite that "
                "line with supported operations, or add the op's facts in calipers/graph; attacks "
                "work without them."
            )
        return result

    def _parts(self, fx_node: fx.Node, args: tuple[Any, ...]) -> list[NodeResult]:
        """Write each result of an operation that splits a tensor."""
        run, name = bind(self.writer, fx_node.target, args), str(fx_node.target)  # type: ignore[arg-type]
        shapes = [self._shape(value, place_of(fx_node)) for value in fx_node.meta["val"]]

        def part(k: int, shape: tuple[int, ...]) -> Callable[..., Tensor]:
            return lambda x: run(x)[k].reshape(len(x), *shape)

        return [self.writer.move(name, part(k, shape), args[0]) for k, shape in enumerate(shapes)]

    def _arguments(self, fx_node: fx.Node) -> tuple[Any, ...]:
        """Return the positional arguments, including those given by keyword.

        Every node among them is replaced by what is known of it.
        """
        args = list(fx_node.args)
        schema = getattr(fx_node.target, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema is not None else ()):
            if place >= len(args) and fx_node.kwargs and not argument.kwarg_only:
                args.append(fx_node.kwargs.get(argument.name, argument.default_value))
        return tuple(fx.node.map_arg(tuple(args), lambda n: self.known[n]))

    def _fold(self, fx_node: fx.Node, args: tuple[Any, ...]) -> Any:
        if any(isinstance(a, BatchSize) for a in leaves(args)):
            raise CaptureError(USES_BATCH_SIZE.format(place_of(fx_node)))
        made = fx_node.target(*args, **fx_node.kwargs)  # type: ignore[operator]
        if not self.computed and rounded_often(str(fx_node.target), args, made):
            self.computed = place_of(fx_node)
        return made

    def _shape(self, value: Any, where: str) -> tuple[int, ...]:
        value = value[0] if isinstance(value, (tuple, list)) else value
        if self.single:
            return tuple(value.shape)
        free = not value.shape or str(value.shape[0]) != self.batch
        if free or any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
            raise CaptureError(
                f"the model mixes points of a batch at {where} (a result of shape "
                f"{tuple(value.shape)}). Keep the batch as the first axis."
            )
        return tuple(value.shape[1:]) or (1,)  # bounds see one number per point as a vector

    def _written(
        self, name: str, fx_node: fx.Node, args: tuple[Any, ...], shape: tuple[int, ...]
    ) -> Any:
        """Write the call as operations of the graph.

        For a program of a single point, operations that treat the first axis as the batch get the
        leading axis of size 1 removed before, and restored afterwards.
        """
        writer, keywords = self.writer, options(fx_node)
        chosen = {k: v for k, v in keywords.items() if k in fx_node.kwargs}

        def build_on(args: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
            return build(
                writer,
                Asked(name, fx_node.target, args, shape, keywords, chosen, unread(fx_node)),  # type: ignore[arg-type]
            )

        first = args[0]
        if writer.lead and name in WHOLE and isinstance(first, NodeResult) and first.shape[0] == 1:
            writer.lead = 0
            result = build_on((writer.reshape(first, first.shape[1:]), *args[1:]), shape[1:])
            writer.lead = 1
            return None if result is None else writer.reshape(result, shape)
        return build_on(args, shape)


_SEVERAL = frozenset(
    "aten.split.Tensor aten.split_with_sizes.default aten.chunk.default aten.unbind.int "
    "aten.tensor_split.sections".split()
)
_STEPS = dict.fromkeys(
    [f"aten.{name}.default" for name in ("sign", "heaviside", "floor", "ceil", "round", "trunc")],
    ", a step: its value jumps, and no line through the jump bounds it usefully",
)


def _compare(graph: Graph, network: nn.Module, sample: Tensor) -> None:
    """Raise `CaptureError` where graph and module differ beyond rounding.

    Both run on the sample and on noise around it, which includes a batch of another size.
    """
    generator = torch.Generator().manual_seed(0)
    spread = sample.std().clamp_min(0.1)
    noise = (
        torch.randn(5, *sample.shape[1:], generator=generator, dtype=torch.float64).to(
            sample.device
        )
        * spread
    )
    for points in (sample, noise + sample.mean(0)):
        with torch.no_grad():
            # point by point: a model that mixes points differs here
            expected, got = (
                torch.cat([network(point) for point in points.split(1)]),
                graph.values(points)[-1],
            )
        difference = (expected - got).abs().max()
        if expected.shape != got.shape or not bool(
            difference <= _AGREEMENT * (1 + expected.abs().max())
        ):
            raise CaptureError(
                f"graph and model disagree by {float(difference):.3g} in float64: the model does "
                "something the export does not show (state, randomness, the batch, or a fixed "
                "dtype). Attacks work without a graph."
            )
