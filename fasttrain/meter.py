"""What a run shows and keeps: sums that stay on the device, log.jsonl, a progress bar, TensorBoard."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fasttrain.dataset import shown
from fasttrain.distributed import Ranks
from fasttrain.predictions import Scores


class Meter:
    """Means of the loss and its terms between two log points. Adding never waits for the device; reading does."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.shares = [0.0] * len(names)

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        """Add one micro-batch's terms (scalars on the device), the micro-batch being `share` of its step."""
        for at, name in enumerate(self.names):
            if name in terms:
                self.sums[at].add_(terms[name].detach(), alpha=share)
                self.shares[at] += share

    def state(self) -> list[list[float]]:
        """[sums, shares] so far, as plain numbers; waits for the device."""
        return [self.sums.tolist(), self.shares]

    def restore(self, states: list[list[list[float]]], ranks: Ranks) -> None:
        """Go on from the states of a run's ranks: its own, or their mean where there were more or fewer of them."""
        own = [states[ranks.rank]] if len(states) == ranks.world else states
        self.sums.copy_(torch.tensor([sums for sums, _ in own]).mean(0))
        self.shares = list(own[0][1])

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Mean of each term over all ranks and over the steps since the last reading that had it; start afresh."""
        sums = ranks.mean(self.sums).tolist()
        means = {n: total / share for n, total, share in zip(self.names, sums, self.shares, strict=True) if share}
        self.sums.zero_()
        self.shares = [0.0] * len(self.names)
        return means


class Log:
    """log.jsonl (one JSON object a line), the progress bar on stderr and, where installed, TensorBoard.

    Only rank 0 has an open log; on the others every call but `skip` does nothing.
    """

    def __init__(self, out: Path, ranks: Ranks, *, start_step: int, steps: int, batch_size: int) -> None:
        self.open, self.rank = ranks.first, ranks.rank
        self.path = out / "log.jsonl"
        self.steps, self.batch_size = steps, batch_size
        self.last_step, self.last_time = start_step, time.perf_counter()
        if not self.open:
            return
        self.file = self.path.open("a", encoding="utf-8")
        self.board = _tensorboard(out)
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)

    def event(self, event: str, **values: Any) -> None:
        if self.open:
            self.file.write(json.dumps({"event": event, **values}) + "\n")
            self.file.flush()

    def skip(self, skip: tuple[str, str, str]) -> None:
        """An image that is not trained on (see `faults.Skip`). Every rank tells its own."""
        path, reason, substitute = map(shown, skip)
        line = json.dumps({"event": "skip", "rank": self.rank, "path": path, "reason": reason, "instead": substitute})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        tqdm.write(f"skipping {path}: {reason}; instead: {substitute}", file=sys.stderr)

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
        self.last_step, self.last_time = step, now
        loss = means["loss"]
        terms = {name: each for name, each in means.items() if name != "loss" and "/" not in name}
        stats = {name: each for name, each in means.items() if "/" in name}
        told = {"terms": terms, "stats": stats} if stats else {"terms": terms}
        self.event("train", epoch=epoch, step=step, lr=lr, loss=loss, **told, images_per_s=round(rate, 1))
        line = f"loss {loss:.3f} lr {lr:.4f} {rate:.0f} img/s"
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(line)
        if not self.on_terminal:
            print(f"step {step} of {self.steps}: epoch {epoch} {line}", file=sys.stderr)
        self._scalars(step, {"lr": lr, "images_per_s": rate, "loss": loss})
        self._scalars(step, {f"loss/{name}": each for name, each in (terms | stats).items()})

    def evaluation(self, epoch: int, step: int, scores: Scores, averaged: Scores | None) -> None:
        """Scores of the weights and, where the run averages them, of the averaged ones."""
        if not self.open:
            return
        ema = {"ema": averaged._asdict()} if averaged else {}
        self.event("eval", epoch=epoch, step=step, **scores._asdict(), **ema)
        of_ema = f"; averaged weights: {averaged.top1:.2%}, {averaged.top5:.2%}" if averaged else ""
        self.say(f"epoch {epoch}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images{of_ema}")
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
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.open:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))
