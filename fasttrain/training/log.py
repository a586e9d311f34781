"""What a run shows and keeps: log.jsonl, a progress bar, TensorBoard."""

import errno
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.predictions import Scores
from fasttrain.utils.errors import RunError
from fasttrain.utils.text import printable


class Log:
    """log.jsonl (one JSON object a line), the progress bar on stderr and, where installed, TensorBoard.

    Only rank 0 has an open log; on the others every call but `skip` does nothing. A line that the disk does not take
    raises RunError, or, where `tolerant`, is lost, which is said once.
    """

    def __init__(
        self,
        out: Path,
        ranks: Ranks,
        *,
        start_step: int,
        steps: int,
        batch_size: int,
        tolerant: bool = False,
        tensorboard: bool = True,
    ) -> None:
        self.open, self.rank, self.tolerant = ranks.first, ranks.rank, tolerant
        self.path = out / "log.jsonl"
        self.losing = self.torn = False
        self.steps, self.batch_size = steps, batch_size
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.device = ranks.device
        if not self.open:
            return
        self.board = _tensorboard(out) if tensorboard else None
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)

    def event(self, event: str, **values: Any) -> None:
        if self.open:
            self._append({"event": event, **values})

    def skip(self, skip: tuple[str, str, str]) -> None:
        """An image that is not trained on (see `decode_errors.Skip`). Every rank tells its own."""
        path, reason, substitute = map(printable, skip)
        self._append({"event": "skip", "rank": self.rank, "path": path, "reason": reason, "instead": substitute})
        tqdm.write(f"skipping {path}: {reason}; instead: {substitute}", file=sys.stderr)

    def _append(self, line: dict[str, Any]) -> None:
        """A whole line at the file's end, in one write; after a part of one, on a line of its own."""
        content = b"\n" * self.torn + (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                written = file.write(content)
                self.torn = (self.torn and not written) or 0 < written < len(content)
                if written < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.losing = False
        except OSError as error:
            if not self.tolerant:
                raise RunError(f"cannot write {printable(self.path)}: {error.strerror}") from None
            if not self.losing:
                tqdm.write(f"cannot write {printable(self.path)}: {error.strerror}; lines are lost", file=sys.stderr)
            self.losing = True

    def advance(self) -> None:
        if self.open:
            self.bar.update()

    def train(self, epoch: int, step: int, lr: float, means: dict[str, float]) -> None:
        """A log point of training, `step` steps done; means: `loss`, its terms by name, and what they tell of
        themselves as `term/stat`. The rate is that since the point before."""
        if not self.open:
            return
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch_size / (now - self.last_time)
        memory = {"memory_gib": round(_peak_gib(self.device), 2)} if self.device.type == "cuda" else {}
        self.last_step, self.last_time = step, now
        loss = means.get("loss", math.nan)  # nothing is there when no step since the point before was good
        apart = ("loss", "grad_norm")
        terms = {name: each for name, each in means.items() if name not in apart and "/" not in name}
        stats = {name: each for name, each in means.items() if "/" in name}
        told = {"terms": terms, "stats": stats} if stats else {"terms": terms}
        whole = {name: means.get(name) for name in apart}
        self.event("train", epoch=epoch, step=step, lr=lr, **whole, **told, images_per_s=round(rate, 1), **memory)
        line = f"loss {loss:.3f} lr {lr:.4f} {rate:.0f} img/s"
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(line)
        if not self.on_terminal:
            print(f"step {step} of {self.steps}: epoch {epoch} {line}", file=sys.stderr)
        self._scalars(step, {"lr": lr, "images_per_s": rate, **{n: means[n] for n in apart if n in means}})
        self._scalars(step, {f"loss/{name}": each for name, each in (terms | stats).items()})

    def failed(self, step: int, failed: dict[int, dict[str, Any]]) -> None:
        """Steps (from 0) up to `step` whose loss or gradient was not finite, with their values."""
        if not self.open:
            return
        self.event("not_finite", step=step, steps=[{"step": each + 1, **told} for each, told in failed.items()])
        few = ", ".join(str(each + 1) for each in list(failed)[:5]) + (", …" if len(failed) > 5 else "")
        self.say(f"loss or gradient not finite in step {few}: it changed nothing")

    def evaluation(self, epoch: int, step: int, scores: Scores, averaged: Scores | None) -> None:
        """Scores of the weights and, where the run averages them, of the averaged ones."""
        if not self.open:
            return
        ema = {"ema": averaged.told()} if averaged else {}
        self.event("eval", epoch=epoch, step=step, **scores.told(), **ema)
        of_ema = f"; averaged weights: {averaged.top1:.2%}, {averaged.top5:.2%}" if averaged else ""
        self.say(f"epoch {epoch}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images{of_ema}")
        bad = [scores.not_finite, averaged.not_finite if averaged else 0]
        if any(bad):
            of_ema = f" (averaged weights: {bad[1]})" if averaged else ""
            line = f"the answers to {bad[0]} of {scores.images} images{of_ema} are not finite and count as wrong"
            self.say(f"epoch {epoch}: {line}; the network has diverged or overflows in its precision")
        self._scalars(step, {"top1": scores.top1, "top5": scores.top5})
        if averaged:
            self._scalars(step, {"ema/top1": averaged.top1, "ema/top5": averaged.top5})

    def resume_clock(self) -> None:
        """Leave the time since the last log point (evaluation, a checkpoint) out of the rate."""
        self.last_time = time.perf_counter()

    def say(self, line: str) -> None:
        if self.open:
            tqdm.write(line, file=sys.stderr)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self.board:
            try:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
            except OSError as error:  # log.jsonl has it all
                self.board = None
                self.say(f"TensorBoard's file cannot be written: {error.strerror}; nothing more goes there")

    def close(self) -> None:
        if self.open:
            self.bar.close()
            if self.board:
                with suppress(OSError):
                    self.board.close()


def _peak_gib(device: torch.device) -> float:
    """The most memory that torch has held on a GPU since the process began, in GiB; DALI's is its own."""
    return torch.cuda.max_memory_reserved(device) / 2**30


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(out / "tensorboard"))
    except OSError:
        return None  # log.jsonl says whether the disk takes anything
