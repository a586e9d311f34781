"""Noticing that a rank hangs, and saying which: the others wait for it in an exchange, where nothing else tells."""

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
DOING = ("waiting for images", "training", "evaluating", "saving")  # in the order in which a step does them
WAITING, TRAINING, EVALUATING, SAVING = range(len(DOING))
_KEY = "fasttrain/watch"


class Beat(NamedTuple):
    """What a rank tells the others: where it is, a number that grows while its process lives, and one that grows as it
    makes progress."""

    step: int
    doing: int
    number: int
    calls: int


class Watch:
    """While it is open, a thread tells the other ranks where this one is. When `at` has not been called for `timeout`
    seconds, and no other rank makes progress either, one of the ranks says who is behind; then every rank's process
    ends, with status 1. With one rank, or a timeout of 0, it does nothing."""

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.ranks, self.timeout = ranks, timeout
        self.place = (0, WAITING)
        self.calls = 0
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def at(self, step: int, doing: int) -> None:
        """Progress: this rank begins `doing` (one of `DOING`) in a step, which counts from 0."""
        self.place = (step, doing)
        self.calls += 1

    def each(self, step: int, doing: int, items: Iterable[T]) -> Iterator[T]:
        """The items, with progress at each."""
        for item in items:
            self.at(step, doing)
            yield item

    def __enter__(self) -> "Watch":
        if self.ranks.world > 1 and self.timeout:
            # A connection of its own: on the group's one the main thread may be waiting.
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
                self._tell(number)
                if self.calls != seen:
                    seen, since = self.calls, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    number = self._end(interval, number)
                    since = time.monotonic()
        except RuntimeError:  # the store is gone, and with it the ranks' launcher, which ends them
            return

    def _tell(self, number: int) -> None:
        self.store.set(f"{_KEY}/{self.ranks.rank}", json.dumps([*self.place, number, self.calls]))

    def _end(self, interval: float, number: int) -> int:
        """Ends the process, unless a rank makes progress meanwhile; gives the number told last."""
        before = self._beats()
        for _ in range(3):  # long enough for another rank that lives to tell so
            if self.ended.wait(interval):
                return number
            number += 1
            self._tell(number)
        after = self._beats()
        if any(rank in before and beat.calls != before[rank].calls for rank, beat in after.items()):
            return number
        if self.store.add(f"{_KEY}/said", 1) == 1:
            silent = [rank for rank, beat in after.items() if beat == before.get(rank)]
            line = verdict(after, silent, self.ranks.world, self.timeout)
            print(f"fasttrain: {line}", file=sys.stderr, flush=True)
        # The main thread may never come back from where it is.
        os._exit(1)

    def _beats(self) -> dict[int, Beat]:
        """What each rank that has told anything told last."""
        found: dict[int, Any] = {}
        for rank in range(self.ranks.world):
            if self.store.check([f"{_KEY}/{rank}"]):
                found[rank] = Beat(*json.loads(self.store.get(f"{_KEY}/{rank}")))
        return found


def verdict(beats: dict[int, Beat], silent: list[int], world: int, timeout: float) -> str:
    """Which ranks hold a run up, as a line. silent: ranks whose process gives no sign any more."""
    missing = sorted({*range(world)} - beats.keys() | {*silent})
    places = {rank: beat[:2] for rank, beat in beats.items()}
    first, last = min(places.values(), default=(0, 0)), max(places.values(), default=(0, 0))
    behind = missing or ([rank for rank, place in places.items() if place == first] if first != last else [])
    goes_on = "the same command goes on from the last checkpoint"
    if not behind:
        where = f"{DOING[first[1]]} at step {first[0] + 1}"
        return f"no progress for {timeout:g} s: all {world} ranks are {where}, and none is behind; {goes_on}"
    told = ", ".join(f"rank {rank}" for rank in behind[:8]) + (", …" if behind[8:] else "")
    if missing:
        how = "gives no sign of life" if len(behind) == 1 else "give no sign of life"
    else:
        how = f"{'is' if len(behind) == 1 else 'are'} still {DOING[first[1]]} at step {first[0] + 1}"
    others = f"the others are {DOING[last[1]]} at step {last[0] + 1}"
    return f"no progress for {timeout:g} s: {told} {how}, while {others}; look at that process and machine; {goes_on}"
