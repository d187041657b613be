"""Verification of ONNX networks against VNN-LIB properties."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calipers.certificates.proof_writer import as_arrays, differs
from calipers.errors import BadInput, CalipersError, CaptureError, UnsupportedOp
from calipers.graph.capture import graph_of
from calipers.graph.onnx.network import OnnxNet
from calipers.graph.serialise import described
from calipers.interchange import load, load_instances, load_onnx, load_vnnlib
from calipers.interchange.files import content, existing
from calipers.interchange.onnx_files import ask_onnx, is_onnx
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.verify import Verdict, time_limit
from calipers.measurement.verify import verify as decide
from calipers.models.classifier import Classifier
from calipers.models.wrappers import BlackBox
from calipers.problem.agreement import confirm
from calipers.problem.interrupts import OutOfTime
from calipers.record.checker import prove, said
from calipers.record.proofs import about, contents, model_digest
from calipers.threats.ball import Ball


@dataclass(frozen=True)
class Listed:
    """The answer to one instance of a list.

    Args:
        line: Its line of output: network, property, verdict, seconds.
        decided: Whether the verdict is sat or unsat.
        error: Why the instance could not be answered; empty if it could.
    """

    line: str
    decided: bool
    error: str = ""


def listed(source: str | Path, timeout: float | None = None, seed: int = 0) -> Iterator[Listed]:
    """Yield the answers to the instances of a list, one after another.

    An instance that cannot be read or bounded gives "error" in its line, and the others go on.
    """
    _check(timeout)
    for one in load_instances(source):
        begun = time.monotonic()
        try:
            found = verify(
                one.network,
                one.specification,
                timeout=timeout if one.timeout is None else one.timeout,
                seed=seed,
            )
            yield Listed(f"{','.join(one.names)},{found.answer},{found.seconds:.2f}", found.decided)
        except (BadInput, UnsupportedOp, CaptureError) as error:
            yield Listed(
                f"{','.join(one.names)},error,{time.monotonic() - begun:.2f}",
                False,
                f"{','.join(one.names)}: {error}",
            )


def verify(
    network: str | Path,
    specification: str | Path,
    *,
    timeout: float | None = None,
    seed: int = 0,
    tools: Sequence[Stage] | None = None,
    proofs: bool = False,
) -> Verdict:
    """Decide a VNN-LIB property of an ONNX network.

    Attacks look for an input that satisfies the property, which describes what would be unsafe;
    certifiers, at last branch and bound, prove that there is none. Where an operation cannot be
    bounded the network is only run, by onnxruntime or ONNX's reference: unsafe inputs may be found,
    but nothing is proven, and the notes say so.

    Args:
        network: The network, .onnx or .onnx.gz.
        specification: The property, .vnnlib or .vnnlib.gz.
        timeout: Limit in seconds, reading of the files included; None for no limit.
        seed: Seed of all random starts.
        tools: The stages to run, in order, on each box of the property; by default
            `presets.VERIFY`.
        proofs: Whether an unsat verdict comes with a proof file for each box of the property, which
            the independent checker can verify.

    Returns:
        A verdict with `answer` ("sat", "unsat", "unknown" or "timeout"), `seconds`, `tool`,
        `witness` (for sat), `notes` and `proofs` (for unsat, where asked for: bytes for each box,
        or None where its tool writes none).

    Raises:
        BadInput: Where the files cannot be read or do not belong together, or the timeout is no
            number of seconds.
        UnsupportedOp: For an operation that can be neither bounded nor run.
        CaptureError: For a network that can be neither turned into a graph nor run.

    Example:
        >>> import calipers, onnx, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> x, y = (onnx.helper.make_tensor_value_info(name, 1, [1, 1]) for name in "xy")
        >>> node = onnx.helper.make_node("Relu", ["x"], ["y"])
        >>> graph = onnx.helper.make_graph([node], "net", [x], [y])
        >>> opset = [onnx.helper.make_opsetid("", 17)]
        >>> onnx.save(onnx.helper.make_model(graph, opset_imports=opset), folder / "net.onnx")
        >>> box = "(declare-const X_0 Real) (assert (>= X_0 -1)) (assert (<= X_0 1))"
        >>> unsafe = "(declare-const Y_0 Real) (assert (>= Y_0 2))"
        >>> _ = (folder / "safe.vnnlib").write_text(f"{box} {unsafe}")
        >>> calipers.verify(folder / "net.onnx", folder / "safe.vnnlib", timeout=60).answer
        'unsat'
    """
    _check(timeout)
    begun = time.monotonic()
    try:
        with time_limit(timeout):
            # first, since a network is read quickly and a property may have megabytes
            net = _opened(network)
            asked = load_vnnlib(specification)
            net = net.echoing(asked.echoed)
    except OutOfTime:
        return Verdict(
            "timeout",
            time.monotonic() - begun,
            notes=("the time was over before both files were read",),
        )
    shape = net.shape
    if (asked.inputs, asked.outputs) != (math.prod(shape), net.outputs):
        raise BadInput(
            f"{Path(specification).name} is about {asked.inputs} inputs and {asked.outputs} "
            f"outputs, but {Path(network).name} has {math.prod(shape)} and {net.outputs}: do the "
            "files belong together?"
        )
    together: Sequence[Stage] = ()
    if tools is None:
        tools, together = net.stages(proofs=proofs)
    if proofs:
        tools = [stage.proving() for stage in tools]
    left = None if timeout is None else max(timeout - (time.monotonic() - begun), 0.0)
    plan = Plan("verify", tuple(tools), seconds=left, seed=seed)
    found = decide(Classifier(net.module), asked.queries, shape, plan, together)
    named = {"network": Path(network).name, "property": Path(specification).name}
    kept = tuple(data and about(data, **named, box=str(i)) for i, data in enumerate(found.proofs))
    return dataclasses.replace(
        found,
        seconds=time.monotonic() - begun,
        notes=(*net.notes, *asked.notes, *found.notes),
        proofs=kept,
    )


class _Opened(NamedTuple):
    """A network to be verified; `notes` say why it can only be run, if so."""

    module: nn.Module
    shape: tuple[int, ...]
    outputs: int
    notes: tuple[str, ...] = ()

    def echoing(self, inputs: tuple[int, ...]) -> _Opened:
        """Return the same network with some inputs appended to its outputs."""
        if not inputs:
            return self
        if isinstance(self.module, OnnxNet):
            return self._replace(module=self.module.echoing(inputs))
        assert isinstance(self.module, BlackBox)
        ask, places = self.module.function, list(inputs)

        def both(x: NDArray[Any]) -> NDArray[np.float64]:
            return np.hstack([ask(x)[:, -self.outputs :], x.reshape(len(x), -1)[:, places]])

        name, dtype = f"{self.module.name}, inputs {places}", self.module.anchor.dtype
        return self._replace(module=BlackBox(both, name=name, dtype=dtype).eval())

    def stages(self, *, proofs: bool) -> tuple[Sequence[Stage], Sequence[Stage]]:
        """Return the tools for each box, and those for all boxes together."""
        from calipers.presets import VERIFY, VERIFY_ASKING, VERIFY_TOGETHER

        if self.notes:
            return VERIFY_ASKING, ()
        return VERIFY, () if proofs else VERIFY_TOGETHER


def _opened(network: str | Path) -> _Opened:
    """Return the network.

    Where an operation of it cannot be bounded, it can only be run; notes say why.
    """
    try:
        net = load_onnx(network, paired=True)
        return _Opened(net, net.program.point_shape, net.outputs)
    except (UnsupportedOp, CaptureError) as refused:
        try:
            asked = ask_onnx(network, paired=True)
        except CalipersError:
            raise refused from None
        told = (
            f"{refused} Without bounds nothing can be proved: unsafe inputs were looked for by "
            "asking onnxruntime, or ONNX's reference"
        )
        return _Opened(asked.module, asked.point_shape, asked.outputs, (told,))


def _check(timeout: float | None) -> None:
    if timeout is not None and not 0 <= timeout < math.inf:
        raise BadInput(f"the timeout is a number of seconds, at least 0; got {timeout:g}")


def proved_again(
    source: str | Path,
    model: str | None = None,
    specification: str | Path | None = None,
    load: Callable[[str], Classifier] = load,
) -> tuple[bool, str]:
    """Return whether a proof file proves its claim, and a message about it.

    With a model the proof has to be about that model, and with an ONNX network and a property about
    one of the property's boxes: the numbers in the file are compared with those of the question,
    not names or hashes that the file holds. `load` opens models that are not ONNX files.
    """
    data = content(existing(source, "a proof"))
    if specification is not None and model is None:
        raise BadInput("name the network that the property is about, --model net.onnx")
    verdict = prove(data)
    if not verdict.proved or model is None:
        return verdict.proved, said(verdict) + (
            "\n  compared with no network: --model net.onnx --property spec.vnnlib"
            if verdict.proved
            else ""
        )
    wrong = (
        _of_another_network(data, model, load)
        if specification is None
        else _of_another_question(data, model, specification)
    )
    which = "network" if specification is None else "question"
    return (
        not wrong,
        f"{said(verdict)}\n  "
        f"{f'but not about this {which}: {wrong}' if wrong else f'about this {which}'}",
    )


def _of_another_question(data: bytes, network: str, specification: str | Path) -> str:
    """Return what in a proof is not about these files; empty if all is."""
    asked = load_vnnlib(specification)
    net = load_onnx(network, paired=True)
    net = net.echoing(asked.echoed) if asked.echoed else net
    shape, classifier = net.program.point_shape, Classifier(net)
    if (asked.inputs, asked.outputs) != (math.prod(shape), net.outputs):
        return f"{Path(specification).name} and {Path(network).name} do not belong together"
    wrong = [differs(query.posed(classifier, shape), 0, data) for query in asked.queries]
    return (
        "" if "" in wrong else wrong[0] if len(wrong) == 1 else "it is none of the property's boxes"
    )


def _of_another_network(data: bytes, model: str, load: Callable[[str], Classifier]) -> str:
    """Return how a proof's network differs from this model; empty if not.

    A network with a single logit is compared as one with two.
    """
    header, arrays = contents(data)
    classifier = Classifier(load_onnx(model, paired=True)) if is_onnx(Path(model)) else load(model)
    x = torch.as_tensor(arrays["x"]).to(classifier.dtype)[None]
    classifier.check(x)
    confirm(classifier, x, Ball("linf", 0.1, box=None))
    network, held = described(graph_of(classifier, x))
    return (
        ""
        if model_digest(network, as_arrays(held)) == header["model"]
        else f"its network {header['model'][:12]} is not that of {Path(model).name}"
    )
