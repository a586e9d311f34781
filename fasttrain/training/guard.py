"""Keeps values that are not finite out of a network, without waiting for the device."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.data.index import Index
from fasttrain.pipelines.plan import Plan
from fasttrain.training.meter import json_number
from fasttrain.utils.files import replacing
from fasttrain.utils.tensors import by_dtype
from fasttrain.utils.text import printable

REPORT = "not_finite.json"


class GradCheck(NamedTuple):
    """Scalars on the device. norm: float32, of the whole gradient, unscaled. finite: bool. failed: float32, 1 where the
    step must change nothing, else 0."""

    norm: Tensor
    finite: Tensor
    failed: Tensor


class Guard:
    """Finds gradients that are not finite, so that such a step changes nothing: no weight, momentum or buffer
    (BatchNorm's statistics).

    On several ranks the gradients are already reduced, so all ranks find the same. With float16 the scaler skips steps
    by itself while it looks for a scale; a step counts as failed only at a scale of 1 or less.
    """

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self.scaler = scaler
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.one, self.failed = torch.ones(2, device=device)
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients, by parameter
        self.buffers = [_Buffers(buffers) for buffers in by_dtype(map(_flat, model.buffers()))]

    def first_gradient(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """The gradient with which backward starts: `share`, or nan where the loss is not finite. With nan the
        parameters' gradients are not finite either, whatever the network does."""
        value = loss.detach()
        return (value - value).add_(share)  # nan − nan and ∞ − ∞ are nan, all else is 0

    @torch.no_grad()
    def check(self) -> GradCheck:
        """Check the gradients after backward. The result holds until the next call."""
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch._foreach_norm(list(grads.values()))
        self.norms = dict(zip(grads, norms, strict=True))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        finite = norm < math.inf  # False for nan
        failed = torch.logical_not(finite, out=self.failed)
        if self.scaler.is_enabled():
            scale = self.scaler.scale(self.one)
            norm, failed = norm / scale, failed * (scale <= 1)
        return GradCheck(norm, finite, failed)

    @torch.no_grad()
    def restore_buffers(self, finite: Tensor) -> None:
        """Give the network's buffers back their last good values where `finite`, a bool on the device, is False; else
        the values that they have now become the last good ones."""
        for buffers in self.buffers:
            buffers.restore(finite)

    def reset(self) -> None:
        """Take the network's buffers as they are now for good."""
        for buffers in self.buffers:
            buffers.keep()

    def worst(self) -> dict[str, Any]:
        """The last step's gradient norms that are not finite, by parameter. Waits for the device."""
        norms = torch.stack(list(self.norms.values())).tolist()
        return {
            name: json_number(norm) for name, norm in zip(self.norms, norms, strict=True) if not math.isfinite(norm)
        }


class _Buffers:
    """A network's buffers of one dtype, each as a vector, and a copy of their last good values."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers, self.good = buffers, torch.cat(buffers)
        self.parts = self.good.split([len(buffer) for buffer in buffers])

    def keep(self) -> None:
        torch.cat(self.buffers, out=self.good)

    def restore(self, finite: Tensor) -> None:
        torch.where(finite, torch.cat(self.buffers), self.good, out=self.good)
        torch._foreach_copy_(self.buffers, self.parts)


def _flat(buffer: Tensor) -> Tensor:
    """A buffer as a vector that shares its memory, in memory order."""
    return buffer.permute(sorted(range(buffer.ndim), key=buffer.stride, reverse=True)).view(-1)


class Diverged(Exception):
    """Too many steps in a row were not finite.

    steps_done: steps done. plan: the plan that they followed. rewinds: how often the run had gone back before. best:
    its best top-1. failures: the values of the failed steps, by step from 0. norms: see `Guard.worst`.
    """

    def __init__(
        self,
        steps_done: int,
        plan: Plan,
        rewinds: int,
        best: float | None,
        failures: dict[int, dict[str, Any]],
        norms: dict[str, Any],
    ) -> None:
        super().__init__(
            f"loss or gradient was not finite in step {steps_done} and the steps before it, which changed nothing"
        )
        self.steps_done, self.plan, self.rewinds, self.best = steps_done, plan, rewinds, best
        self.failures, self.norms = failures, norms

    def shift(self, step: int) -> int:
        """The plan's shift for a run that resumes from `step` with the images after those of the failed steps."""
        return self.plan.shift + self.steps_done - step

    def report(self, out: Path, index: Index) -> None:
        """Write what is known of the failed steps to OUT/not_finite.json. Raises RunError if it cannot be written."""
        plans = [replace(self.plan, rank=rank) for rank in range(self.plan.world)]
        steps = []
        for step, values in self.failures.items():
            indices = [n for plan in plans for micro in range(plan.micro_batches) for n in plan.images(step, micro)]
            steps.append({"step": step + 1, **values, "images": [printable(index.paths[number]) for number in indices]})
        content = {"step": self.steps_done, "rewinds": self.rewinds, "gradient_norms": self.norms, "steps": steps}
        with replacing(out / REPORT) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
