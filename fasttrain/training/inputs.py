"""From a micro-batch of the pipeline to the images that the network sees, and the Batch for the losses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.index import Index
from fasttrain.kernels.mix import mix
from fasttrain.losses.base import Batch, Classes, Loss, Output
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan
from fasttrain.utils.tensors import to_device

Network = Callable[[Tensor], Output]


class HostBatch(NamedTuple):
    """A micro-batch with everything that the host adds to it.

    pixels: uint8 [rows, H, W, 3], on the pipeline's device. labels: int64 [B], of the rows to train on. mix_params:
    float32 [rows, 7], the mix kernel's parameters. Labels and mix_params are on the CPU until `to`. mixed: whether the
    step mixes images.
    """

    pixels: Tensor
    labels: Tensor
    mix_params: Tensor
    mixed: bool

    def to(self, device: torch.device) -> "HostBatch":
        """The same, with everything on the device; does not wait for it."""
        labels, mix_params = to_device(self.labels, device), to_device(self.mix_params, device)
        return self._replace(labels=labels, mix_params=mix_params)


class StepScalars(NamedTuple):
    """What changes from step to step besides the images: `Batch.epoch`, `Batch.progress` and the learning rate.

    Python numbers, with the learning rate in the optimizer's groups (lr is None). With CUDA graphs all three are
    float32 scalars on the device.
    """

    epoch: float | Tensor
    progress: float | Tensor
    lr: Tensor | None = None


@dataclass
class InputBuilder:
    """Builds the network's input and the Batch.

    index: the training images. dtype: of the images, and of autocast. teacher: answers for
    the rows that the network sees (knowledge distillation). ema: answers for the plan's ema_views (mean teacher).
    losses: those that the batch is for. Raises UserError where one names a class that the images do not have.
    """

    plan: Plan
    index: Index
    device: torch.device
    dtype: torch.dtype
    teacher: Network | None = None
    ema: Network | None = None
    losses: tuple[Loss, ...] = ()
    labels: Tensor = field(init=False)
    class_weights: Tensor | None = field(init=False)
    log_shares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        images = np.bincount(self.index.labels, minlength=len(self.index.classes)).astype(np.float64)
        shares = torch.from_numpy(self.plan.class_shares(self.index))
        classes = Classes(self.index.classes, torch.from_numpy(images), shares)
        weights = [found for loss in self.losses if (found := loss.class_weights_for(classes)) is not None]
        self.labels = torch.from_numpy(self.index.labels)
        self.class_weights = weights[0].to(self.device) if weights else None
        self.log_shares = shares.log().float().to(self.device)

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """The context in which networks compute; does nothing for float32."""
        return nullcontext if self.dtype == torch.float32 else partial(torch.autocast, self.device.type, self.dtype)

    def scalars(self, step: int) -> StepScalars:
        """StepScalars of a step, as Python numbers."""
        return StepScalars(step / self.plan.steps_per_epoch, step / self.plan.steps)

    def on_host(self, step: int, micro: int, images: Images) -> HostBatch:
        """Add labels and mix parameters to micro-batch `micro` of `step`."""
        labels = self.labels[images.indices]
        params, mixed = self.plan.mix_params(step, micro)
        rows = labels.repeat(self.plan.views) if self.plan.views > 1 else labels
        return HostBatch(images.pixels, rows, torch.from_numpy(params), mixed)

    def __call__(self, batch: HostBatch, scalars: StepScalars) -> tuple[Tensor, Batch]:
        """Images [B, 3, H, W] in channels_last and their Batch, from a HostBatch on the device."""
        plan, labels = self.plan, batch.labels
        all_rows = mix(batch.pixels, batch.mix_params, IMAGENET_MEAN, IMAGENET_STD, self.dtype)
        rows = len(labels)
        images, partner, lam = [each[:rows] for each in all_rows] if plan.ema_views else all_rows
        teacher_logits = self._logits(self.teacher, images)
        ema_logits = self._logits(self.ema, all_rows.images[rows:])
        return images, Batch(
            labels=labels,
            labels_mixed=labels[partner],
            lam=lam,
            mixed=batch.mixed,
            partner=partner,
            views=plan.views,
            teacher_logits=teacher_logits,
            ema_logits=ema_logits,
            class_weights=self.class_weights,
            log_shares=self.log_shares,
            epoch=scalars.epoch,
            progress=scalars.progress,
        )

    @torch.no_grad()
    def _logits(self, network: Network | None, images: Tensor) -> Tensor | None:
        if network is None:
            return None
        with self.autocast():
            return network(images).logits
