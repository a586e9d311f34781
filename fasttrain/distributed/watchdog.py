"""Notices that a rank hangs, and says which: the others wait for it in a collective, which does not say."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from fasttrain.distributed.ranks import Ranks

T = TypeVar("T")
ACTIVITIES = ("waiting for images", "training", "evaluating", "saving")  # in the order in which a step does them
WAITING, TRAINING, EVALUATING, SAVING = range(len(ACTIVITIES))
_KEY = "fasttrain/watch"


class Beat(NamedTuple):
    """What a rank reports: its step and activity, a number that grows while its process lives, and the number of times
    that it made progress."""

    step: int
    activity: int
    number: int
    calls: int


class Watch:
    """While this context is open, a thread reports to the other ranks where this one is.

    If no rank makes progress for `timeout` seconds, one of them prints which rank is behind, and every rank's process
    ends with status 1. With one rank, or a timeout of 0, it does nothing.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.ranks, self.timeout = ranks, timeout
        self.position = (0, WAITING)
        self.calls = 0
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def at(self, step: int, activity: int) -> None:
        """Report progress: this rank begins an activity (an index of `ACTIVITIES`) of a step, counted from 0."""
        self.position = (step, activity)
        self.calls += 1

    def each(self, step: int, activity: int, items: Iterable[T]) -> Iterator[T]:
        """The items; reports progress at each."""
        for item in items:
            self.at(step, activity)
            yield item

    def __enter__(self) -> "Watch":
        if self.ranks.world > 1 and self.timeout:
            # A connection of its own: the main thread may be waiting on the group's.
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def _run(self) -> None:
        interval = min(5.0, self.timeout / 4)
        seen, since, number = -1, time.monotonic(), 0
        try:
            while not self.ended.wait(interval):
                number += 1
                self._report(number)
                if self.calls != seen:
                    seen, since = self.calls, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    number = self._end(interval, number)
                    since = time.monotonic()
        except RuntimeError:  # the store is gone, and the launcher ends the ranks
            return

    def _report(self, number: int) -> None:
        self.store.set(f"{_KEY}/{self.ranks.rank}", json.dumps([*self.position, number, self.calls]))

    def _end(self, interval: float, number: int) -> int:
        """End the process, unless a rank makes progress meanwhile. Returns the last number reported."""
        before = self._beats()
        for _ in range(3):  # long enough for other ranks to report that they live
            if self.ended.wait(interval):
                return number
            number += 1
            self._report(number)
        after = self._beats()
        if any(rank in before and beat.calls != before[rank].calls for rank, beat in after.items()):
            return number
        if self.store.add(f"{_KEY}/said", 1) == 1:
            silent = [rank for rank, beat in after.items() if beat == before.get(rank)]
            line = verdict(after, silent, self.ranks.world, self.timeout)
            print(f"fasttrain: {line}", file=sys.stderr, flush=True)
        # The main thread may never return from where it is.
        os._exit(1)

    def _beats(self) -> dict[int, Beat]:
        """The last report of each rank that has made one."""
        beats: dict[int, Any] = {}
        for rank in range(self.ranks.world):
            if self.store.check([f"{_KEY}/{rank}"]):
                beats[rank] = Beat(*json.loads(self.store.get(f"{_KEY}/{rank}")))
        return beats


def verdict(beats: dict[int, Beat], silent: list[int], world: int, timeout: float) -> str:
    """Which ranks hold up a run, as one line. silent: ranks whose process no longer reports."""
    missing = sorted({*range(world)} - beats.keys() | {*silent})
    positions = {rank: beat[:2] for rank, beat in beats.items()}
    first, last = min(positions.values(), default=(0, 0)), max(positions.values(), default=(0, 0))
    lagging = [rank for rank, position in positions.items() if position == first] if first != last else []
    behind = missing or lagging
    resumes = "the same command resumes from the last checkpoint"
    if not behind:
        where = f"{ACTIVITIES[first[1]]} at step {first[0] + 1}"
        return f"no progress for {timeout:g} s: all {world} ranks are {where}, and none is behind; {resumes}"
    names = ", ".join(f"rank {rank}" for rank in behind[:8]) + (", …" if behind[8:] else "")
    if missing:
        status = "does not respond" if len(behind) == 1 else "do not respond"
    else:
        status = f"{'is' if len(behind) == 1 else 'are'} still {ACTIVITIES[first[1]]} at step {first[0] + 1}"
    others = f"the others are {ACTIVITIES[last[1]]} at step {last[0] + 1}"
    return (
        f"no progress for {timeout:g} s: {names} {status}, while {others}; look at that process and machine; {resumes}"
    )
