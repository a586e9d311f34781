"""Mean teacher: the network should agree with its own averaged weights about another view of the same image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.base import Batch, Loss, Output, Term, at_least_float32
from fasttrain.losses.cross_entropy import log_probs


@dataclass(frozen=True)
class MeanTeacher(Loss):
    """KL divergence from the averaged network's answers to another view of each image.

    Mean over the batch of KL(target ‖ softmax(logits)). The target is the softmax of `Batch.ema_logits`, without
    gradient, mixed as the rows are (see `mixed_targets`). A probability of 0 in it adds nothing.

    Over the first ramp_epochs the weight rises as weight·exp(−5(1−x)²), x being the share of them that is done.
    Computed in float32 (in float64 for float64 logits). Tarvainen & Valpola 2017 (arXiv 1703.01780) use the squared
    difference, with KL as their alternative. The weight and the ramp are our own, for "attract_repulse".
    """

    weight: float = 1.0
    """Factor of this loss."""
    ramp_epochs: float = 5.0
    """Epochs over which the weight rises; 0: no ramp."""

    name: ClassVar[str] = "mean_teacher"
    classifies: ClassVar[bool] = False
    reads_ema: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.ramp_epochs >= 0:
            raise ValueError(f"ramp_epochs must be 0 or more, not {self.ramp_epochs}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        if batch.ema_logits is None or batch.partner is None:
            raise ValueError("MeanTeacher needs the averaged network's logits and the rows' partners")
        with torch.no_grad():
            probs = at_least_float32(batch.ema_logits).softmax(1)
            target = mixed_targets(probs, batch.partner, batch.lam, batch.views)
        student = log_probs(output.logits)
        divergence = F.kl_div(student, target.to(student.dtype), reduction="batchmean")
        return Term(self._weight_at(batch.epoch) * divergence)

    def _weight_at(self, epoch: float | Tensor) -> float | Tensor:
        if not self.ramp_epochs:
            return self.weight
        left = torch.relu(1 - torch.as_tensor(epoch, dtype=torch.float32) / self.ramp_epochs)
        return self.weight * torch.exp(-5 * left.square())


def mixed_targets(probs: Tensor, partner: Tensor, lam: Tensor, views: int) -> Tensor:
    """Targets [V·N, K] for the rows of N images in V views: λ·p(own image) + (1−λ)·p(image mixed in).

    probs: [N, K], of the images. partner: int32 or int64 [V·N], the row that was mixed into each row; rows are view 0
    of each image, then view 1 of each, and so on. lam: [V·N], the share of the row's own image.
    """
    own, other = probs.repeat(views, 1), probs[partner % len(probs)]
    return lam[:, None] * own + (1 - lam[:, None]) * other
