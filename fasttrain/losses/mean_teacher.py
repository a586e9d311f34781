"""Mean teacher: the network shall say what its own averaged weights say of another view of the same image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.base import Batch, Loss, Output, Term
from fasttrain.losses.cross_entropy import log_probs


@dataclass(frozen=True)
class MeanTeacher(Loss):
    """Mean over the batch of KL(target ‖ softmax(logits)), where the target is `Batch.averaged_probs`: without
    gradient, and mixed as the rows are. A probability of 0 in it adds nothing.

    The weight is ramped up over the first ramp_epochs, as weight·exp(−5(1−x)²) with x the share of them that is done;
    with ramp_epochs=0 it is there at once. Computed in float32 (in float64 for float64 logits). Tarvainen & Valpola
    2017 (arXiv 1703.01780), whose consistency is the squared difference, with KL as their alternative; weight and ramp
    are our own for "attract_repulse".
    """

    weight: float = 1.0
    ramp_epochs: float = 5.0

    name: ClassVar[str] = "mean_teacher"
    classifies: ClassVar[bool] = False
    averaged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.ramp_epochs >= 0:
            raise ValueError(f"ramp_epochs must be 0 or more, not {self.ramp_epochs}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        if batch.averaged_probs is None:
            raise ValueError("MeanTeacher needs the averaged network's probabilities")
        known = log_probs(output.logits)
        target = batch.averaged_probs.detach().to(known.dtype)
        return Term(self._weight_at(batch.epoch) * F.kl_div(known, target, reduction="batchmean"))

    def _weight_at(self, epoch: float | Tensor) -> float | Tensor:
        if not self.ramp_epochs:
            return self.weight
        left = torch.relu(1 - torch.as_tensor(epoch, dtype=torch.float32) / self.ramp_epochs)
        return self.weight * torch.exp(-5 * left.square())


def mixed_targets(probs: Tensor, partner: Tensor, lam: Tensor, views: int) -> Tensor:
    """`Batch.averaged_probs` [V·N, K] of N images in V views: λ·p(own image) + (1−λ)·p(image mixed in).

    probs: [N, K], of the images. partner: int32 or int64 [V·N], the row that each row has mixed in; rows are view 0 of
    each image, then view 1 of each … lam: [V·N], the own image's share.
    """
    own, other = probs.repeat(views, 1), probs[partner % len(probs)]
    return lam[:, None] * own + (1 - lam[:, None]) * other
