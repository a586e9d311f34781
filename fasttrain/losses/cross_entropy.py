"""Cross entropy with the report's label smoothing."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.batch import Batch, Loss, Output, Term, over_both_labels


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Mean over the batch of λ·L(a) + (1−λ)·L(b), where L is cross entropy against smoothed labels.

    The smoothed label of class y among K is 1−ε at y and ε/(K−1) elsewhere (DeepBlueAI report, section II-B). torch
    and timm spread ε/K over all K classes instead; theirs with ε' = εK/(K−1) is the same function. Computed in
    float32 (in float64 for float64 logits).
    """

    smoothing: float = 0.1
    weight: float = 1.0

    name: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        known = log_probs(output.logits)
        return Term(self.weight * over_both_labels(partial(smoothed, known, self.smoothing), batch).mean())


def log_probs(logits: Tensor) -> Tensor:
    """The logarithms [B, K] of the probabilities, in float32, or float64 where logits [B, K] are."""
    return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def smoothed(log_probs: Tensor, smoothing: float, labels: Tensor) -> Tensor:
    """Cross entropy [B] of `log_probs` [B, K] against labels int64 [B], smoothed as `CrossEntropy` says."""
    own = -log_probs.gather(1, labels[:, None])[:, 0]
    if not smoothing:
        return own
    others = -log_probs.sum(1) - own
    return (1 - smoothing) * own + smoothing / (log_probs.shape[1] - 1) * others
