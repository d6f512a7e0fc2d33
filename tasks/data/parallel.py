"""One function over many batches by several processes: results in order, and never more than a few in memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

MOST_PROCESSES = 8
ROWS_A_PROCESS = 25_000  # below, starting a process costs more than it gains

In = TypeVar("In")
Out = TypeVar("Out")
_function: Callable[[Any], Any]


def processes_for(rows: int) -> int:
    """How many processes are worth their start for so many rows, on the processors that this process may use."""
    return max(1, min(_processors(), MOST_PROCESSES, rows // ROWS_A_PROCESS))


def in_order(function: Callable[[In], Out], items: Iterable[In], processes: int) -> Iterator[Out]:
    """`function(item)` of every item, in the items' order, whatever the number of processes."""
    if processes == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take the parent's threads' locks along
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(function,)) as pool:
        waiting: deque[Future[Out]] = deque()
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(function: Callable[[Any], Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processors are shared out already
    global _function  # noqa: PLW0603  sent once to each process, not with every item
    _function = function


def _call(item: Any) -> Any:
    return _function(item)
