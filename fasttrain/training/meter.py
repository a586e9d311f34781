"""What a run shows and keeps: values that wait on the device, log.jsonl, a progress bar, TensorBoard."""

import errno
import json
import math
import os
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.predictions import Scores
from fasttrain.utils.errors import RunError
from fasttrain.utils.text import printable


class Reading(NamedTuple):
    """What a meter says at a log point. means: by name, over all ranks and over the good steps since the last reading
    that had it. failed: values by name of the steps since then that failed, by their number from 0. streak: how many
    steps in a row have failed up to now; unbroken: values of those of them that this process has taken."""

    means: dict[str, float]
    failed: dict[int, dict[str, Any]]
    streak: int
    unbroken: dict[int, dict[str, Any]]


class Row(NamedTuple):
    """What a step tells, before it is in the table: float32 scalars on the device, one a column, and how much of the
    step each value is of."""

    values: list[Tensor]
    shares: list[float]


class Meter:
    """What steps tell: their loss, its terms and what those tell, and the gradient's norm. A step writes a row of a
    table on the device and waits for nothing; reading brings the rows over. kept: how many rows there are, at least as
    many as steps between two readings."""

    def __init__(self, names: list[str], device: torch.device, kept: int) -> None:
        self.names = [*names, "grad_norm"]
        self.device = device
        self._zero = torch.zeros((), device=device)
        self._table = torch.zeros(kept, len(self.names) + 1, device=device)  # the last column: whether the step failed
        self._rows = self._table.unbind()
        self._written = 0
        self._unread: deque[tuple[int, list[float]]] = deque(maxlen=kept)  # a step of each row, and the values' shares
        self._begin()
        self.streak = 0  # as of the last row that was brought over
        self._new_failures: dict[int, dict[str, Any]] = {}
        self._failure_streak: dict[int, dict[str, Any]] = {}
        self._clear()

    def _begin(self) -> None:
        self.values: list[Tensor] = []  # of the step under way
        self._shares = [0.0] * (len(self.names) - 1)  # how much of that step each value is of

    def _clear(self) -> None:
        self.sums, self.shares = [0.0] * len(self.names), [0.0] * len(self.names)

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        """Add one micro-batch's terms (float32 scalars on the device), the micro-batch being `share` of its step."""
        names = self.names[:-1]
        values = [terms[name].detach() if name in terms else self._zero for name in names]
        if share != 1:
            values = list(torch._foreach_mul(values, share))
        self.values = list(torch._foreach_add(self.values, values)) if self.values else values
        self._shares = [had + share * (name in terms) for had, name in zip(self._shares, names, strict=True)]

    def row(self, norm: Tensor, failed: Tensor) -> Row:
        """What was added since the last one, and what the guard gave. Its values do not count in any mean unless the
        norm is finite."""
        made = Row([*self.values, norm, failed], [*self._shares, 1.0])
        self._begin()
        return made

    def commit(self, step: int, row: Row) -> None:
        """The step (from 0) is done: one launch."""
        torch.stack(row.values, out=self._rows[self._written % len(self._rows)])
        self._unread.append((step, row.shares))
        self._written += 1

    def _bring(self) -> None:
        """Take up all rows that were not brought over yet; waits for the device."""
        table = self._table.tolist()
        first = self._written - len(self._unread)
        for row, (step, shares) in enumerate(self._unread, first):
            *values, failed = table[row % len(table)]
            if math.isfinite(values[-1]):
                self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
                self.shares = [total + share for total, share in zip(self.shares, shares, strict=True)]
            if failed:
                self.streak += 1
                told = dict(zip(self.names, map(plain, values), strict=True))
                self._new_failures[step] = self._failure_streak[step] = told
            else:
                self.streak, self._failure_streak = 0, {}
        self._unread.clear()

    def state(self) -> dict[str, list[float]]:
        """{name: [sum, share]} since the last reading, as plain numbers; waits for the device."""
        self._bring()
        return {name: list(each) for name, *each in zip(self.names, self.sums, self.shares, strict=True)}

    def restore(self, states: list[dict[str, list[float]]], streak: int, ranks: Ranks) -> None:
        """Go on from the states of a run's ranks: its own, or their mean where there were more or fewer of them."""
        self.streak = streak
        own = [states[ranks.rank]] if len(states) == ranks.world else states
        if own:
            sums = [[state.get(name, [0.0, 0.0]) for name in self.names] for state in own]
            self.sums, self.shares = np.array(sums).mean(0).T.tolist()

    def read(self, ranks: Ranks) -> Reading:
        """What there is to say since the last reading; starts afresh. Waits for the device and the other ranks."""
        self._bring()
        own = torch.tensor([self.sums, self.shares], dtype=torch.float64, device=self.device)
        means = {
            n: total / share for n, total, share in zip(self.names, *ranks.sum(own).tolist(), strict=True) if share
        }
        fresh, self._new_failures = self._new_failures, {}
        self._clear()
        finite = {name: each for name, each in means.items() if math.isfinite(each)}
        return Reading(finite, fresh, self.streak, dict(self._failure_streak))


def plain(value: float) -> float | str:
    """A number as JSON has it, which knows neither nan nor infinities: those as text."""
    return value if math.isfinite(value) else str(value)


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
