"""What does a tool answer, and what of it counts? Every loop that puts a question to a tool does it
here: no answer passes by the referee.
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
from calipers.problem.tools import Attempt, Claim

Answer = Attempt | Claim
Made = TypeVar("Made")


def answers(stage: Stage, problem: Problem, seed: int) -> Iterator[Answer]:
    """Yield what a stage's tool proposes, for a caller that judges the answers by its own rules.

    Whatever ends a certifier beside the errors of this package (no memory, say) is raised as
    `ToolFailed`: attacks must not be lost with it.
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
    """Put the problem to a stage's tool, and yield what `use` makes of each answer and the
    referee's ruling on it, None left out.

    Evidence goes by `name`, usually the stage's own. The seconds of a ruling are those of the tool
    and the referee, not of `use`. An interrupt inside `use` lets it begin again with the same
    answer (see `relayed`), so `use` changes nothing before it is sure to end. Raises
    `Contradiction` where a claim is wrong beyond doubt.
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
