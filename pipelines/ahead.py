"""A thread that works out what a pipeline's source gives, before the pipeline asks for it."""

import threading
from collections.abc import Callable
from queue import Full, Queue
from types import SimpleNamespace
from typing import Any


class Ahead:
    """A source of DALI's external_source (`batch_info=True`), up to `depth` batches ahead of the calls.

    source: gives batch number `info.iteration`, from 0 on; it ends with StopIteration. What it raises is raised by the
    call for that batch. The thread ends with the source, and on `close`.
    """

    def __init__(self, source: Callable[[Any], Any], depth: int) -> None:
        self.source = source
        self.ready: Queue[tuple[Any, BaseException | None]] = Queue(depth)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._work, name="fasttrain-ahead", daemon=True)
        self.thread.start()

    def __call__(self, info: Any) -> Any:
        """The next batch; DALI asks for all of them, in order."""
        batch, error = self.ready.get()
        if error is not None:
            self.ready.put((None, error))  # for whoever asks again
            raise error
        return batch

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _work(self) -> None:
        number = 0
        while not self.closed.is_set():
            try:
                made: tuple[Any, BaseException | None] = self.source(SimpleNamespace(iteration=number)), None
            except BaseException as error:
                made = None, error
            while not self.closed.is_set():
                try:
                    self.ready.put(made, timeout=0.1)
                    break
                except Full:
                    continue
            if made[1] is not None:
                return
            number += 1
