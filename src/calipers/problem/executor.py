"""Executors: where the jobs of a certifier run.

A certifier divides its work into jobs and hands them to the executor of its problem. The results
do not depend on the executor, nor on the number of its workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from calipers.errors import BadInput
from calipers.problem.interrupts import Limit, limited

Job = TypeVar("Job")
Result = TypeVar("Result")

_CPU = torch.device("cpu")


class Executor(Protocol):
    """Where jobs run that do not depend on one another."""

    def map(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        *,
        device: torch.device = _CPU,
    ) -> Iterator[Result]:
        """Yield the result of every job, in the order of the jobs.

        Args:
            function: Called once with each job. It runs within the limits of the caller
                (`interrupts`), and what it changes in its job may be changed in a copy.
            jobs: What to do, one job for each call.
            device: Where the jobs compute.

        Raises:
            Exception: What a job raises, where its result would come; what comes after it is
                dropped.
            KeyboardInterrupt: After Ctrl-C and after the end of a limit (`OutOfTime`): the other
                jobs are stopped, and the results of those that had ended by then come first.
        """


@dataclass(frozen=True)
class LocalThreads:
    """Threads of this process, each with a job of its own.

    Bounds are made of many short operations: a core for each batch of points keeps all of them
    busy, while several cores for one operation mostly wait for one another. So torch computes with
    one thread inside each worker. On an accelerator jobs run one after the other.

    Args:
        workers: How many jobs run at once; None: as many as torch uses threads.

    Raises:
        BadInput: If there is less than one worker.

    Example:
        >>> list(LocalThreads(workers=2).map(abs, [-3, 2, -1]))
        [3, 2, 1]
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise BadInput(f"LocalThreads takes workers >= 1 or None, got {self.workers}")

    def map(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        *,
        device: torch.device = _CPU,
    ) -> Iterator[Result]:
        """Yield the result of every job, in order (see `Executor`).

        A caller that stops iterating stops the threads.
        """
        threads = torch.get_num_threads()
        workers = self.workers or threads
        if device.type != "cpu" or workers == threads == 1:
            yield from map(function, jobs)
            return
        stop, waiting = Limit(lambda: 0.0, 1.0), deque[Future[Result]]()
        with limited(stop):
            context = copy_context()
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for job in jobs:
                waiting.append(pool.submit(context.copy().run, function, job))
            while waiting:
                result = waiting[0].result()
                waiting.popleft()
                yield result
        except KeyboardInterrupt:
            # only what had ended before the stop: a job that notices it may have done less
            ended = [job for job in waiting if job.done() and job.exception() is None]
            stop.ends = 0.0
            yield from (job.result() for job in ended)
            raise
        finally:
            stop.ends = 0.0
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
