"""A thread that computes a pipeline's inputs before the pipeline asks for them."""

import threading
from collections.abc import Callable
from queue import Full, Queue
from types import SimpleNamespace
from typing import Any


class PrefetchedSource:
    """A source for DALI's external_source (`batch_info=True`) that prepares up to `depth` batches ahead.

    source: returns the batch `info.iteration`, counted from 0, and raises StopIteration at the end. If it raises an
    error, the call for that batch raises it. The thread ends with the source, and on `close`.
    """

    def __init__(self, source: Callable[[Any], Any], depth: int) -> None:
        self.source = source
        self.ready: Queue[tuple[Any, BaseException | None]] = Queue(depth)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._fill, name="fasttrain-ahead", daemon=True)
        self.thread.start()

    def __call__(self, info: Any) -> Any:
        """The next batch. DALI asks for all batches in order."""
        batch, error = self.ready.get()
        if error is not None:
            self.ready.put((None, error))  # for any later call
            raise error
        return batch

    def __enter__(self) -> "PrefetchedSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _fill(self) -> None:
        number = 0
        while not self.closed.is_set():
            try:
                item: tuple[Any, BaseException | None] = self.source(SimpleNamespace(iteration=number)), None
            except BaseException as error:
                item = None, error
            while not self.closed.is_set():
                try:
                    self.ready.put(item, timeout=0.1)
                    break
                except Full:
                    continue
            if item[1] is not None:
                return
            number += 1
