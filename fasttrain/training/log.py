"""A run's log: log.jsonl, a progress bar, experiment trackers."""

import errno
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.metrics import NAMES, Scores
from fasttrain.training.trackers import Trackers
from fasttrain.utils.errors import RunError
from fasttrain.utils.progress_bar import in_notebook, progress_bar
from fasttrain.utils.text import printable

_MOST_CLASSES = 1000  # whose precision and recall are logged
_LOGGED_CHANGE = 0.1  # of the number of steps of a run that ends by time; smaller changes are not logged


class Log:
    """log.jsonl (one JSON object per line), the progress bar on stderr, and trackers.

    Only rank 0 has an open log; on other ranks every call except `skip` does nothing. A line that cannot be written
    raises RunError; with `tolerant` it is lost, which is reported once. steps: of the run; None where they are not
    known yet. tensorboard, track: see `MachineConfig`. config: the recipe as plain values, for the trackers.
    """

    def __init__(
        self,
        out: Path,
        ranks: Ranks,
        *,
        start_step: int,
        steps: int | None,
        batch_size: int,
        tolerant: bool = False,
        tensorboard: bool = True,
        track: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        self.open, self.rank, self.tolerant = ranks.first, ranks.rank, tolerant
        self.path = out / "log.jsonl"
        self.losing_lines = self.ends_in_part = self.finished = False
        self.steps, self.batch_size = steps, batch_size
        self.device = ranks.device
        self.logged_steps = 0  # see `fitted`
        if not self.open:
            return
        self.trackers = Trackers(out, tensorboard=tensorboard, track=track, config=config or {}, say=self.say)
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.has_bar = sys.stderr.isatty() or in_notebook()
        self.bar = progress_bar(total=steps, initial=start_step, unit="step")

    def event(self, event: str, **values: Any) -> None:
        """Write a line to log.jsonl."""
        if self.open:
            self._append({"event": event, **values})

    def say(self, line: str) -> None:
        """Print a line to stderr, above the progress bar."""
        if self.open:
            tqdm.write(line, file=sys.stderr)

    def skip(self, skip: tuple[str, str, str]) -> None:
        """Report an image that is replaced (see `decode_errors.Skip`). Every rank reports its own."""
        path, reason, substitute = map(printable, skip)
        self._append({"event": "skip", "rank": self.rank, "path": path, "reason": reason, "instead": substitute})
        tqdm.write(f"skipping {path}: {reason}; instead: {substitute}", file=sys.stderr)

    def _append(self, values: dict[str, Any]) -> None:
        """Append a whole line in one write; if the file ends in a part of a line, start a new one first."""
        content = b"\n" * self.ends_in_part + (json.dumps(values, allow_nan=False) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                written = file.write(content)
                self.ends_in_part = (self.ends_in_part and not written) or 0 < written < len(content)
                if written < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.losing_lines = False
        except OSError as error:
            if not self.tolerant:
                raise RunError(f"cannot write {printable(self.path)}: {error.strerror}") from None
            if not self.losing_lines:
                tqdm.write(f"cannot write {printable(self.path)}: {error.strerror}; lines are lost", file=sys.stderr)
            self.losing_lines = True

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.open:
            self.bar.update()

    def train(self, epoch: int, step: int, lr: float, means: dict[str, float]) -> None:
        """A log point after `step` steps. means: `loss`, `grad_norm`, each loss by name and its stats as `loss/stat`.
        Images per second are those since the last point."""
        if not self.open:
            return
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch_size / (now - self.last_time)
        self.last_step, self.last_time = step, now
        memory = {"memory_gib": round(_peak_gib(self.device), 2)} if self.device.type == "cuda" else {}
        totals = {name: means.get(name) for name in ("loss", "grad_norm")}
        terms = {name: mean for name, mean in means.items() if name not in totals and "/" not in name}
        stats = {name: mean for name, mean in means.items() if "/" in name}
        parts = {"terms": terms, "stats": stats} if stats else {"terms": terms}
        self.event("train", epoch=epoch, step=step, lr=lr, **totals, **parts, images_per_s=round(rate, 1), **memory)
        loss = means.get("loss", math.nan)  # missing if no step since the last point was finite
        line = f"loss {loss:.3f} lr {lr:.4f} {rate:.0f} img/s"
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(line)
        if not self.has_bar:
            print(f"step {step}{self.of_steps}: epoch {epoch} {line}", file=sys.stderr)
        scalars = {"lr": lr, "images_per_s": rate, **{n: mean for n, mean in totals.items() if mean is not None}}
        self.trackers.log(step, scalars | {f"loss/{name}": mean for name, mean in (terms | stats).items()})

    @property
    def of_steps(self) -> str:
        return f" of {self.steps}" if self.steps else ""

    def fitted(self, step: int, steps: int, seconds_left: float) -> None:
        """The number of steps of a run that ends by time, as fitted after `step` steps."""
        if not self.open:
            return
        first, self.steps, self.bar.total = self.steps is None, steps, steps
        if abs(steps - self.logged_steps) > _LOGGED_CHANGE * steps:
            self.logged_steps = steps
            self.event("fitted", step=step, steps=steps, seconds_left=round(seconds_left, 1))
        if first:
            self.say(f"{steps} steps fit into the time: {describe(seconds_left)} are left after step {step}")

    def failed(self, step: int, failures: dict[int, dict[str, Any]]) -> None:
        """Steps up to `step` whose loss or gradient was not finite, with their values, by step from 0."""
        if not self.open:
            return
        self.event("not_finite", step=step, steps=[{"step": n + 1, **values} for n, values in failures.items()])
        numbers = ", ".join(str(n + 1) for n in list(failures)[:5]) + (", …" if len(failures) > 5 else "")
        self.say(f"loss or gradient not finite in step {numbers}, which changed nothing")

    def evaluation(self, epoch: int, step: int, scores: Scores, averaged: Scores | None) -> None:
        """Scores of the weights and, where the run averages them, of the averaged ones."""
        if not self.open:
            return
        ema = {"ema": averaged.to_dict()} if averaged else {}
        of_classes = (averaged or scores).per_class
        classes = {"per_class": of_classes.to_dict()} if of_classes and len(of_classes.count) <= _MOST_CLASSES else {}
        self.event("eval", epoch=epoch, step=step, **scores.to_dict(), **ema, **classes)
        of_ema = f"; averaged weights: {averaged.top1:.2%}, {averaged.top5:.2%}" if averaged else ""
        self.say(f"epoch {epoch}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images{of_ema}")
        bad, bad_of_ema = scores.not_finite, averaged.not_finite if averaged else 0
        if bad or bad_of_ema:
            of_ema = f" (averaged weights: {bad_of_ema})" if averaged else ""
            self.say(
                f"epoch {epoch}: the outputs for {bad} of {scores.images} images{of_ema} are not finite and count as "
                "wrong; the network has diverged or overflows in its precision"
            )
        found = {
            f"{prefix}{name}": getattr(of, name, None)
            for prefix, of in (("", scores), ("ema/", averaged))
            for name in NAMES
        }
        self.trackers.log(step, {name: value for name, value in found.items() if value is not None})

    def end(self, step: int, best: float | None, **used: float) -> None:
        """The run has reached its end. used: see `Usage.so_far`."""
        self.event("end", step=step, best=best, **used)
        self.finished = True

    def resume_clock(self) -> None:
        """Leave the time since the last log point (evaluation, a checkpoint) out of the next rate."""
        self.last_time = time.perf_counter()

    def close(self) -> None:
        if self.open:
            self.bar.close()
            self.trackers.close(self.finished)


def describe(seconds: float) -> str:
    """A duration as text, such as 1 h 5 min or 40 s."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _peak_gib(device: torch.device) -> float:
    """The most memory that torch has reserved on a GPU so far, in GiB. DALI's memory is not included."""
    return torch.cuda.max_memory_reserved(device) / 2**30
