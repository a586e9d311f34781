"""Runs work that may kill its process in a pool of processes."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from fasttrain.utils.errors import UserError

T = TypeVar("T")


def split_by_cost(items: Iterable[T], max_items: int, cost: Callable[[T], int], max_cost: int) -> Iterator[list[T]]:
    """Split the items, in their order, into groups of at most `max_items` items and at most `max_cost` in total. An
    item that alone costs more is a group of its own."""
    group: list[T] = []
    group_cost = 0
    for item in items:
        if group and (len(group) == max_items or group_cost + cost(item) > max_cost):
            yield group
            group, group_cost = [], 0
        group.append(item)
        group_cost += cost(item)
    if group:
        yield group


Work = Callable[[Sequence[Any]], Sequence[T]]


def map_in_processes(work: Work[T], chunks: Iterator[list[Any]], workers: int) -> Iterator[tuple[Any, T | None]]:
    """Each item of the chunks with its result from `work`, in the order in which processes finish their chunks.

    When a process dies, the pool is lost. The chunks that were running are then done again, one item at a time; the
    result of an item whose process dies again is None. Raises UserError where a process dies before it has any items.
    """
    pool = None
    running: dict[Future[Sequence[T]], list[Any]] = {}
    try:
        while True:
            for chunk in islice(chunks, 2 * workers - len(running)):
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
                # The rest of `running` fails too. Chunks of it that are already done are done again.
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
    # Ctrl-C in a terminal interrupts all processes; workers ignore it, and the main process ends them.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, ignore)
    try:
        pool.submit(work, []).result()
    except BrokenProcessPool:
        raise UserError("the decoder processes do not start; the machine may have too little memory") from None
    return pool
