"""Checkpoints written beside the training: the loop waits for a copy in memory, and a thread for the disk."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import CheckpointConfig
from fasttrain.training.log import Log
from fasttrain.training.state import State
from fasttrain.utils.errors import RunError


class Saver:
    """Saves a run's checkpoints into `out`, one at a time, and logs each once it is on disk.

    Where the disk does not take one, settings.on_error decides: RunError from the next call of any method, or a line
    and an event in the log; `lost` is then true until it is set to False. As a context manager it waits for what is
    being written. alive: called each second meanwhile.
    """

    def __init__(
        self, out: Path, settings: CheckpointConfig, log: Log, alive: Callable[[], object] = lambda: None
    ) -> None:
        self.out, self.settings, self.log, self.alive = out, settings, log, alive
        self.done = threading.Event()  # not the thread's end: a join that Ctrl-C interrupts marks that, too early
        self.lost = False
        self.waited = 0.0  # seconds for the disk, since the last save
        self.snapshot = checkpoint.Snapshot()
        self.thread: threading.Thread | None = None
        self.written: dict[str, Any] = {}
        self.error: Exception | None = None

    def save(self, step: int, state: State, epoch: int, **how: Any) -> None:
        """Begin to save the state after `step` steps; how: the rest of `checkpoint.save`'s arguments."""
        self.finish()
        began = time.perf_counter()
        self.snapshot.take(state)
        self.written = {"held_s": round(self.waited + time.perf_counter() - began, 4)}
        self.waited = 0.0
        self.done.clear()
        # Not a daemon's: an interpreter that ends waits for it, so that what was begun is whole.
        self.thread = threading.Thread(target=self._write, args=(step, epoch, how), name="saver")
        self.thread.start()

    def _write(self, step: int, epoch: int, how: dict[str, Any]) -> None:
        began = time.perf_counter()
        try:
            path = checkpoint.save(self.out, step, self.snapshot, keep=self.settings.keep, **how)
            took = round(time.perf_counter() - began, 4)
            self.written |= {"epoch": epoch, "step": step, "path": str(path.relative_to(self.out)), "write_s": took}
        except Exception as error:  # for the loop, which would not hear of it
            self.error = error
        finally:
            self.done.set()

    def poll(self) -> None:
        """Log what has been written meanwhile; does not wait."""
        if self.thread is not None and self.done.is_set():
            self.finish()

    def finish(self, last: bool = False) -> None:
        """Wait until what was begun is written. last: no checkpoint comes after it, so an error is raised."""
        if self.thread is None:
            return
        began = time.perf_counter()
        self._wait()
        self.waited += time.perf_counter() - began
        self.thread = None
        if self.error is None:
            self.log.event("checkpoint", **self.written)
            return
        error, self.error = self.error, None
        if last or self.settings.on_error == "stop" or not isinstance(error, RunError):
            raise error
        self.lost = True
        self.log.event("save_failed", reason=str(error))
        self.log.say(f"{error}; training goes on, since checkpoint.on_error is go_on")

    def _wait(self) -> None:
        while not self.done.wait(1):
            self.alive()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread is not None:  # something else has ended the run
            self._wait()
            if self.error is None:
                self.log.event("checkpoint", **self.written)
