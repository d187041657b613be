"""The arithmetic that a certifier's claims are about.

Either real arithmetic, or the network as it is executed; a tool's repr says so where it is the
latter.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from calipers.bounds.float32_execution import check_executed
from calipers.bounds.rounding import Arithmetic
from calipers.errors import BadInput
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.problem.problem import Problem
from calipers.threats.ball import Region


def posed(problem: Problem, arithmetic: Arithmetic) -> tuple[Graph, Region]:
    """Return the network and the regions in the arithmetic of the bounds.

    For bounds about an execution the layers are kept as they run: merged ones would hide what
    overflows, or is lost, between them. Raises `BadInput` where the bounds should be about the
    execution, but cannot be.
    """
    graph = graph_of(problem.classifier, problem.x)
    graph = graph if arithmetic.executed is None else graph.apart or graph
    check_executed(problem, graph, arithmetic)
    graph = graph.to(arithmetic.dtype)
    return graph, problem.threat.region(problem.x.to(arithmetic.dtype), outward=True)


def stated(tool: Any) -> str:
    """Return a tool's repr, by which it is identified in records.

    Its settings, and `guarantee` and `refine` only where these differ from their defaults.
    """
    unusual = [
        f.name
        for f in fields(tool)
        if f.name in ("guarantee", "refine")
        and f.default is not MISSING
        and getattr(tool, f.name) != f.default
    ]
    shown = [f.name for f in fields(tool) if f.repr or f.name in unusual]
    return (
        f"{type(tool).__name__}({', '.join(f'{name}={getattr(tool, name)!r}' for name in shown)})"
    )


def check_proofs(arithmetic: Arithmetic, *, proofs: bool) -> None:
    """Raise `BadInput` for proof files that no checker could prove."""
    if proofs and arithmetic.executed is not None:
        raise BadInput(
            "proof files are about real arithmetic: measure without proofs, or without the "
            f"guarantee {arithmetic.guarantee}"
        )
