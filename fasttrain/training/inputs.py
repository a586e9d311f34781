"""What a micro-batch out of the pipeline becomes: the images that the network sees, and the Batch for the losses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.kernels.mix import mix
from fasttrain.losses.base import Batch, Output, at_least_float32
from fasttrain.losses.mean_teacher import mixed_targets
from fasttrain.pipelines.plan import Plan
from fasttrain.utils.tensors import to_device

Network = Callable[[Tensor], Output]


class HostBatch(NamedTuple):
    """A micro-batch before its work begins: pixels uint8 [rows, H, W, 3], labels int64 [B] of the rows that are
    trained on and mix's params float32 [rows, 7]; and whether the step mixes at all."""

    pixels: Tensor
    labels: Tensor
    params: Tensor
    mixed: bool

    def on(self, device: torch.device) -> "HostBatch":
        """All of it on the device; the pixels are there already."""
        return self._replace(labels=to_device(self.labels, device), params=to_device(self.params, device))


class StepScalars(NamedTuple):
    """What changes from step to step besides the images: `Batch.epoch` and `Batch.progress`, and the learning rate.
    They are the host's numbers; or where the step is replayed, scalars on the device, the rate among them."""

    epoch: float | Tensor
    progress: float | Tensor
    lr: Tensor | None = None


@dataclass(frozen=True)
class InputBuilder:
    """labels: int64 [N] on the CPU, of all training images. dtype: of the images, and what autocast computes in.

    teacher: what answers for the very rows that the network sees (knowledge distillation). averaged: what answers for
    the plan's views aside (a mean teacher).
    """

    plan: Plan
    labels: Tensor
    device: torch.device
    dtype: torch.dtype
    teacher: Network | None = None
    averaged: Network | None = None

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """What networks compute under: nothing in float32."""
        return nullcontext if self.dtype == torch.float32 else partial(torch.autocast, self.device.type, self.dtype)

    def now(self, step: int) -> StepScalars:
        """What `step` begins with, in the host's numbers."""
        return StepScalars(step / self.plan.steps_per_epoch, step / self.plan.steps)

    def stage(self, step: int, micro: int, pixels: Tensor, numbers: Tensor) -> HostBatch:
        """What the host has to say of `Images` of micro-batch `micro` of `step`: labels and params are on the CPU."""
        plan, labels = self.plan, self.labels[numbers]
        params, mixed = plan.mix_params(step, micro)
        rows = labels.repeat(plan.views) if plan.views > 1 else labels
        return HostBatch(pixels, rows, torch.from_numpy(params), mixed)

    def __call__(self, staged: HostBatch, now: StepScalars) -> tuple[Tensor, Batch]:
        """Images [rows, 3, H, W] in channels_last and their Batch, of what is on the device."""
        plan, own = self.plan, staged.labels
        mixed = mix(staged.pixels, staged.params, IMAGENET_MEAN, IMAGENET_STD, self.dtype)
        rows = len(own)
        images, partner, lam = [each[:rows] for each in mixed] if plan.aside else mixed
        told = probs = None
        if self.teacher is not None:
            with torch.no_grad(), self.autocast():
                told = self.teacher(images).logits
        if self.averaged is not None:
            with torch.no_grad():
                with self.autocast():
                    aside = self.averaged(mixed.images[rows:]).logits
                probs = mixed_targets(at_least_float32(aside).softmax(1), partner, lam, plan.views)
        return images, Batch(own, own[partner], lam, staged.mixed, told, plan.views, probs, now.epoch, now.progress)
