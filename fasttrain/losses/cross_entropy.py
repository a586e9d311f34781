"""Cross entropy with label smoothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.base import Batch, Loss, Output, Term, at_least_float32


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross entropy with label smoothing.

    Mean over the batch of λ·L(a) + (1−λ)·L(b), where L is cross entropy against smoothed labels. The smoothed label of
    class y among K is 1−ε at y and ε/(K−1) elsewhere (DeepBlueAI report, section II-B). torch and timm spread ε/K over
    all K classes; with ε' = εK/(K−1) theirs is the same function. Computed in float32 (in float64 for float64 logits).
    """

    smoothing: float = 0.1
    """Label smoothing ε, spread as ε/(K−1) over the other classes; in [0, 1)."""
    weight: float = 1.0
    """Factor of this loss."""

    name: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        return Term(self.weight * against_soft(output.logits, batch, self.smoothing))


def against_soft(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross entropy of logits [B, K] against a batch's smoothed and mixed labels, a scalar.

    Cross entropy is linear in its target, so both labels of a row go into one row of probabilities, which takes fewer
    operations than two cross entropies.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, soft_labels(batch, logits.shape[1], smoothing, logits.dtype))


def soft_labels(batch: Batch, classes: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """[B, classes]: λ times the smoothed own label plus 1−λ times the smoothed label that was mixed in."""
    others = smoothing / (classes - 1) if smoothing else 0.0
    labels = batch.labels[:, None]
    targets = torch.full((len(labels), classes), others, dtype=dtype, device=labels.device)
    if not batch.mixed:
        return targets.scatter_(1, labels, 1 - smoothing)
    own = batch.lam.to(dtype)[:, None] * (1 - smoothing - others)
    targets.scatter_add_(1, labels, own)
    return targets.scatter_add_(1, batch.labels_mixed[:, None], (1 - smoothing - others) - own)


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax of logits [B, K], in float32, or in float64 for float64 logits."""
    return F.log_softmax(at_least_float32(logits), dim=1)
