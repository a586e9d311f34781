"""Asynchronous checkpoints: the loop waits for a copy in memory, and a thread writes it to the disk."""

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
    """Saves a run's checkpoints into `out`, one at a time, and logs each once it is on the disk.

    If one cannot be written, settings.on_error decides: the next call of any method raises RunError, or the log says so
    and `lost` is True until the caller sets it to False. Leaving the context waits for the write. alive: called once a
    second while the loop waits.
    """

    def __init__(
        self, out: Path, settings: CheckpointConfig, log: Log, alive: Callable[[], object] = lambda: None
    ) -> None:
        self.out, self.settings, self.log, self.alive = out, settings, log, alive
        self.done = threading.Event()  # not Thread.join: when Ctrl-C interrupts it, the thread counts as ended
        self.lost = False
        self.waited = 0.0  # seconds that the loop waited for the disk since the last save
        self.snapshot = checkpoint.Snapshot()
        self.thread: threading.Thread | None = None
        self.written: dict[str, Any] = {}
        self.error: Exception | None = None

    def save(self, step: int, state: State, epoch: int, **options: Any) -> None:
        """Start to save the state after `step` steps. options: the rest of `checkpoint.save`'s arguments."""
        self.finish()
        began = time.perf_counter()
        self.snapshot.take(state)
        self.written = {"held_s": round(self.waited + time.perf_counter() - began, 4)}
        self.waited = 0.0
        self.done.clear()
        # Not a daemon thread: Python waits for it at exit, so that the checkpoint is completed.
        self.thread = threading.Thread(target=self._write, args=(step, epoch, options), name="saver")
        self.thread.start()

    def _write(self, step: int, epoch: int, options: dict[str, Any]) -> None:
        began = time.perf_counter()
        try:
            path = checkpoint.save(self.out, step, self.snapshot, keep=self.settings.keep, **options)
            took = round(time.perf_counter() - began, 4)
            self.written |= {"epoch": epoch, "step": step, "path": str(path.relative_to(self.out)), "write_s": took}
        except Exception as error:  # raised by `finish`, in the loop's thread
            self.error = error
        finally:
            self.done.set()

    def poll(self) -> None:
        """Log the checkpoint if it has been written; does not wait."""
        if self.thread is not None and self.done.is_set():
            self.finish()

    def finish(self, last: bool = False) -> None:
        """Wait until the checkpoint is written. last: no other follows, so an error is raised whatever on_error is."""
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
        self.log.say(f"{error}; training continues, because checkpoint.on_error is go_on")

    def _wait(self) -> None:
        while not self.done.wait(1):
            self.alive()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread is not None:  # an error has ended the run
            self._wait()
            if self.error is None:
                self.log.event("checkpoint", **self.written)
