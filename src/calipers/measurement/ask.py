"""Questions to tools, and the referee's rulings on their answers.

Every loop that runs a tool for the record does it here, so that no answer bypasses the referee.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from calipers.errors import CalipersError, ToolFailed, typed
from calipers.measurement.plan import Stage
from calipers.measurement.referee import Referee, Ruling
from calipers.problem.grid import on_grid
from calipers.problem.interrupts import relayed
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim

Answer = Attempt | Claim
Made = TypeVar("Made")


def answers(stage: Stage, problem: Problem, seed: int) -> Iterator[Answer]:
    """Yield what a stage's tool proposes, without the referee.

    It is for callers that judge the answers by their own rules. Where the threat model has a grid
    of values, attempts are moved onto it first. Whatever ends a certifier besides the errors of
    this package (out of memory, say) is raised as `ToolFailed`, so that the results of attacks are
    not lost with it.
    """
    try:
        proposed: Iterator[Answer] = stage.tool(problem, seed=seed)
        if getattr(problem.threat, "grid", None) is None:
            yield from proposed
        else:
            yield from (on_grid(problem, a) if isinstance(a, Attempt) else a for a in proposed)
    except CalipersError:
        raise
    except Exception as error:
        if stage.kind == "attack":
            raise
        name = type(stage.tool).__name__
        raise ToolFailed(f"{name} ended on an error of its own ({typed(error)})") from error


def ask(
    stage: Stage,
    problem: Problem,
    use: Callable[[Answer, Ruling], Made | None],
    *,
    seed: int = 0,
    name: str = "",
) -> Iterator[Made]:
    """Run a stage's tool on a problem, and yield what `use` makes of it.

    `use` is called with each answer and the referee's ruling on it; what it returns is yielded,
    except None. Evidence is filed under `name`, by default the stage's own. The seconds of a ruling
    are those of the tool and the referee, not of `use`. After an interrupt inside `use` it is
    called again with the same answer (see `relayed`), so `use` must change nothing before it is
    sure to end. Raises `Contradiction` where a claim is certainly wrong.
    """
    referee, everywhere = Referee(problem), torch.arange(len(problem), device=problem.x.device)
    name, begun = name or stage.name, time.perf_counter()

    def rule(answer: Answer) -> Made | None:
        nonlocal begun
        seconds = time.perf_counter() - begun
        told = (everywhere, name, seconds)
        made = use(
            answer,
            referee.attempt(answer, *told)
            if isinstance(answer, Attempt)
            else referee.claim(answer, *told, seed),
        )
        begun = time.perf_counter()
        return made

    yield from relayed(answers(stage, problem, seed), rule)
