"""Keeping what is not finite out of a network, without waiting for the device."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.data.index import Index
from fasttrain.pipelines.plan import Plan
from fasttrain.training import optim
from fasttrain.training.meter import plain
from fasttrain.utils.files import replacing
from fasttrain.utils.tensors import by_dtype
from fasttrain.utils.text import printable

REPORT = "not_finite.json"


class Guard:
    """Takes an optimizer's step only where the gradient is finite; else weights, momentum and buffers (BatchNorm's
    statistics) stay what they were. All of it is decided on the device.

    With float16 the scaler skips steps of its own while it looks for a scale; a step counts as failed only once the
    scale is down to 1.

    On several ranks the gradients have been exchanged before, so that all come to the same answer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
    ) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.one, self.failing = torch.ones(2, device=device)  # the second: whether the step under way fails, 0 or 1
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients, by parameter, where it had one
        self.buffers = [_Buffers(each) for each in by_dtype(map(_flat, model.buffers()))]

    def seed(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """The gradient of a loss with which backward has to begin: `share`, or nan where the loss is not finite, so
        that whatever the network makes of it the gradient is not finite either, on any rank."""
        value = loss.detach()
        return (value - value).add_(share)  # nan − nan and ∞ − ∞ are nan, all else is 0

    @torch.no_grad()
    def step(self, lr: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The optimizer's step with the gradients that are there, or nothing. lr: as `optim.step` has it.

        Gives the gradient's norm and whether the step failed, 1 or 0: float32 scalars on the device.
        """
        graded = {name: each.grad for name, each in self.parameters.items() if each.grad is not None}
        norms = torch._foreach_norm(list(graded.values()))
        self.norms = dict(zip(graded, norms, strict=True))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        good = norm < math.inf  # nan is not either
        failed = torch.logical_not(good, out=self.failing)
        if self.scaler.is_enabled():
            scale = self.scaler.scale(self.one)
            norm, failed = norm / scale, failed * (scale <= 1)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            optim.step(self.optimizer, failed, lr)
        for buffers in self.buffers:
            buffers.keep(good)
        return norm, failed

    def reset(self) -> None:
        """The network's buffers are whole as they are now."""
        for buffers in self.buffers:
            buffers.take()

    def worst(self) -> dict[str, Any]:
        """Gradient norms of the last step, by parameter: those that are not finite."""
        norms = torch.stack(list(self.norms.values())).tolist()
        return {name: plain(norm) for name, norm in zip(self.norms, norms, strict=True) if not math.isfinite(norm)}


class _Buffers:
    """A network's buffers of one dtype, given flat, and a copy of them that is whole."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers, self.whole = buffers, torch.cat(buffers)
        self.parts = self.whole.split([each.numel() for each in buffers])

    def take(self) -> None:
        """They are whole as they are now."""
        torch.cat(self.buffers, out=self.whole)

    def keep(self, good: Tensor) -> None:
        """They are whole where `good`, a bool on the device; else they become what they were."""
        torch.where(good, torch.cat(self.buffers), self.whole, out=self.whole)
        torch._foreach_copy_(self.buffers, self.parts)


def _flat(buffer: Tensor) -> Tensor:
    """All of a buffer as a vector that shares its memory, in the order in which it lies there."""
    return buffer.permute(sorted(range(buffer.ndim), key=buffer.stride, reverse=True)).view(-1)


class Diverged(Exception):
    """Too many steps in a row were not finite. done: steps done; plan: the one that they followed; rewinds: how often
    the run had gone back before; best: its best top-1; failed and norms: as `Guard.failed` and `Guard.worst` give
    them."""

    def __init__(
        self,
        done: int,
        plan: Plan,
        rewinds: int,
        best: float | None,
        failed: dict[int, dict[str, Any]],
        norms: dict[str, Any],
    ) -> None:
        super().__init__(f"loss or gradient was not finite in step {done} and those before it, which changed nothing")
        self.done, self.plan, self.rewinds, self.best = done, plan, rewinds, best
        self.failed, self.norms = failed, norms

    def shift(self, step: int) -> int:
        """The plan's shift with which a run that goes on from `step` takes the images that come next."""
        return self.plan.shift + self.done - step

    def report(self, out: Path, index: Index) -> None:
        """Write what is known of the failed steps into a run's folder. Raises RunError like `replacing`."""
        plans = [replace(self.plan, rank=rank) for rank in range(self.plan.world)]
        steps = []
        for step, values in self.failed.items():
            numbers = [n for each in plans for micro in range(each.micro_batches) for n in each.images(step, micro)]
            steps.append({"step": step + 1, **values, "images": [printable(index.paths[number]) for number in numbers]})
        content = {"step": self.done, "rewinds": self.rewinds, "gradient_norms": self.norms, "steps": steps}
        with replacing(out / REPORT) as aside:
            aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
