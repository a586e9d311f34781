"""Work that may kill its process, shared among processes."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from fasttrain.utils.errors import UserError

T = TypeVar("T")


def groups(items: Sequence[T], most: int, cost: Callable[[T], int], most_cost: int) -> Iterator[list[T]]:
    """The items in order, in groups of at most `most`, which cost at most so much unless one item alone does."""
    group: list[T] = []
    spent = 0
    for item in items:
        if group and (len(group) == most or spent + cost(item) > most_cost):
            yield group
            group, spent = [], 0
        group.append(item)
        spent += cost(item)
    if group:
        yield group


Work = Callable[[Sequence[Any]], Sequence[T]]


def in_processes(work: Work[T], chunks: Iterator[list[Any]], workers: int) -> Iterator[tuple[Any, T | None]]:
    """Each item of the chunks with what `work` says of it, in the order in which processes finish their chunks.

    When a process dies, its pool is lost. The chunks that were under way are then done again one item at a time, and
    an item whose process dies again has None. UserError where a process dies with nothing to do.
    """
    waiting, pool = chunks, None
    running: dict[Future[Sequence[T]], list[Any]] = {}
    try:
        while True:
            for chunk in islice(waiting, 2 * workers - len(running)):
                pool = pool or _pool(work, workers)
                try:
                    running[pool.submit(work, chunk)] = chunk
                except BrokenProcessPool as error:
                    future: Future[Sequence[T]] = Future()
                    future.set_exception(error)
                    running[future] = chunk
            if not running or not pool:
                return
            broken = []
            for future in wait(running, return_when="FIRST_COMPLETED").done:
                chunk = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    broken.append(chunk)
                else:
                    yield from zip(chunk, future.result(), strict=True)
            if broken:
                # The rest of `running` fails too; what is done already is only done again.
                items = [item for chunk in [*broken, *running.values()] for item in chunk]
                running.clear()
                pool.shutdown(cancel_futures=True)
                pool = None
                for item in items:
                    pool = pool or _pool(work, 1)
                    try:
                        yield item, pool.submit(work, [item]).result()[0]
                    except BrokenProcessPool:
                        pool.shutdown()
                        pool = None
                        yield item, None
                if pool:
                    pool.shutdown()
                    pool = None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _pool(work: Work[T], workers: int) -> ProcessPoolExecutor:
    # An interrupt of the terminal goes to all processes, and the first one ends the others.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, ignore)
    try:
        pool.submit(work, []).result()
    except BrokenProcessPool:
        raise UserError("the processes that decode do not start; is there too little memory?") from None
    return pool
