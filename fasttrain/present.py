"""What a micro-batch out of the pipeline becomes: the images that the network sees, and the Batch for the losses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fasttrain.batch import Batch, Output, at_least_float32
from fasttrain.config import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.kernels.mix import mix
from fasttrain.losses.mean_teacher import mixed_targets
from fasttrain.pipelines.plan import Plan

Network = Callable[[Tensor], Output]


@dataclass(frozen=True)
class Present:
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

    def __call__(self, step: int, micro: int, pixels: Tensor, numbers: Tensor) -> tuple[Tensor, Batch]:
        """Images [rows, 3, H, W] in channels_last and their Batch, for `Images` of micro-batch `micro` of `step`."""
        plan, labels = self.plan, self.labels[numbers]
        params, mixing = plan.mix_params(step, micro)
        own = to_device(labels.repeat(plan.views) if plan.views > 1 else labels, self.device)
        mixed = mix(pixels, to_device(torch.from_numpy(params), self.device), IMAGENET_MEAN, IMAGENET_STD, self.dtype)
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
        epoch, progress = step / plan.steps_per_epoch, step / plan.steps
        return images, Batch(own, own[partner], lam, mixing, told, plan.views, probs, epoch, progress)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
