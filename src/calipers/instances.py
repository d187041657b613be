"""Does the network in one file have the property in another one? ONNX and VNN-LIB in, a verdict out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calipers.errors import BadInput, CaptureError, UnsupportedOp
from calipers.interchange import load_instances, load_onnx, load_vnnlib
from calipers.measurement.plan import Stage
from calipers.measurement.verify import OutOfTimeError, Verdict, limited
from calipers.measurement.verify import verify as decide
from calipers.problem.classifier import Classifier


@dataclass(frozen=True)
class Listed:
    """One instance of a list: its line of the answer, whether it is decided, and what was wrong with it, if anything."""

    line: str
    decided: bool
    error: str = ""


def listed(source: str | Path, timeout: float | None = None, seed: int = 0) -> Iterator[Listed]:
    """Yield the answers to a list of instances, one after another; one that cannot be read is an error in its line, and the others go on."""
    for one in load_instances(source):
        begun = time.monotonic()
        try:
            found = verify(one.network, one.specification, timeout=timeout if one.timeout is None else one.timeout, seed=seed)
            yield Listed(f"{','.join(one.names)},{found.answer},{found.seconds:.2f}", found.decided)
        except (BadInput, UnsupportedOp, CaptureError) as error:
            yield Listed(f"{','.join(one.names)},error,{time.monotonic() - begun:.2f}", False, f"{','.join(one.names)}: {error}")


def verify(
    network: str | Path,
    specification: str | Path,
    *,
    timeout: float | None = None,
    seed: int = 0,
    tools: Sequence[Stage] | None = None,
    proofs: bool = False,
) -> Verdict:
    """Return the verdict on an ONNX network and a VNN-LIB property, by default with the tools of `presets.VERIFY`; files may be packed (.gz).

    With `proofs` an unsat one comes with a proof file for each box of the property, which the checker proves again by itself.
    The seconds count from here on, reading included. Raises `BadInput` where the files cannot be read or do not belong together, `UnsupportedOp` for an
    operation that cannot be bounded.
    """
    if timeout is not None and not 0 <= timeout < math.inf:
        raise BadInput(f"the timeout is a number of seconds, at least 0; got {timeout:g}")
    begun = time.monotonic()
    try:
        with limited(timeout):
            net = load_onnx(network, paired=True)  # first: a network is read in no time, a property may be of megabytes
            asked = load_vnnlib(specification)
    except OutOfTimeError:
        return Verdict("timeout", time.monotonic() - begun, notes=("the time was over before both files were read",))
    shape = net.program.point_shape
    if (asked.inputs, asked.outputs) != (math.prod(shape), net.outputs):
        raise BadInput(
            f"{Path(specification).name} is about {asked.inputs} inputs and {asked.outputs} outputs, but {Path(network).name} has {math.prod(shape)} and "
            f"{net.outputs}: do the files belong together?"
        )
    if tools is None:
        from calipers.presets import VERIFY

        tools = VERIFY
    if proofs:
        tools = [stage.proving() for stage in tools]
    left = None if timeout is None else timeout - (time.monotonic() - begun)
    found = decide(Classifier(net), asked.queries, shape, tools, timeout=left, seed=seed)
    return dataclasses.replace(found, seconds=time.monotonic() - begun, notes=(*asked.notes, *found.notes))
