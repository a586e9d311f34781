"""Cross entropy with label smoothing, class weights and logit adjustment."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.base import Batch, Classes, Loss, Output, Term, at_least_float32, over_both_labels
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross entropy with label smoothing.

    Mean over the batch of λ·w_a·L(a) + (1−λ)·w_b·L(b), where L is cross entropy against smoothed labels and w_y the
    weight of class y. The smoothed label of class y among K is 1−ε at y and ε/(K−1) elsewhere (DeepBlueAI report,
    section II-B). torch and timm spread ε/K over all K classes; with ε' = εK/(K−1) theirs is the same function.

    Class weights by the effective number of images: Cui et al. 2019, section 3. Logit adjustment: Menon et al. 2021,
    section 5. Computed in float32 (in float64 for float64 logits).
    """

    smoothing: float = 0.1
    """Label smoothing ε, spread as ε/(K−1) over the other classes; in [0, 1)."""
    weight: float = 1.0
    """Factor of this loss."""
    class_weights: str | dict[str, float] = "none"
    """Factors of the classes' losses: none, auto (by the effective number of images), or a table such as {cat = 2}."""
    effective_beta: float = 0.999
    """β of class_weights=auto: n images count as (1 − β^n) / (1 − β); 0: all classes alike, towards 1: as n."""
    logit_adjustment: float = 0.0
    """τ of logit adjustment: training adds τ·log(the class's share of the images drawn) to the logits; 0: none."""

    name: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing}")
        if isinstance(self.class_weights, str) and self.class_weights not in ("none", "auto"):
            raise ValueError(f"class_weights must be none, auto or a table of classes, not {self.class_weights!r}")
        if isinstance(self.class_weights, dict):
            for class_name, weight in self.class_weights.items():
                if not 0 < weight <= 1e6:
                    raise ValueError(f"class_weights.{printable(class_name)} must be above 0, not {weight}")
        if not 0 <= self.effective_beta < 1:
            raise ValueError(f"effective_beta must be in [0, 1), not {self.effective_beta}")
        if not 0 <= self.logit_adjustment <= 10:
            raise ValueError(f"logit_adjustment must be in [0, 10], not {self.logit_adjustment}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        logits = output.logits
        if self.logit_adjustment and batch.log_shares is not None:
            logits = at_least_float32(logits) + self.logit_adjustment * batch.log_shares
        weights = None if self.class_weights == "none" else batch.class_weights
        return Term(self.weight * against_soft(logits, batch, self.smoothing, weights))

    def against_imbalance(self) -> list[str]:
        """See `Loss`."""
        ways = [] if self.class_weights == "none" else ["weighted by losses.cross_entropy.class_weights"]
        if self.logit_adjustment:
            ways.append(f"adjusted by losses.cross_entropy.logit_adjustment={self.logit_adjustment:g}")
        return ways

    def class_weights_for(self, classes: Classes) -> Tensor | None:
        """The classes' weights, scaled so that their mean over the images that are drawn is 1: the learning rate keeps
        its meaning. Float32 [K]."""
        if self.class_weights == "none":
            return None
        if isinstance(self.class_weights, dict):
            unknown = [name for name in self.class_weights if name not in classes.names]
            if unknown:
                some = ", ".join(map(printable, classes.names[:5])) + ", …" * (len(classes.names) > 5)
                raise UserError(
                    f"losses.cross_entropy.class_weights names {printable(unknown[0])!r}, which is not a class of the "
                    f"images; they have {some}"
                )
            weights = torch.tensor([self.class_weights.get(name, 1.0) for name in classes.names], dtype=torch.float64)
        else:
            weights = (1 - self.effective_beta) / (1 - self.effective_beta**classes.images)
        return (weights / (weights * classes.shares).sum()).float()


def against_soft(logits: Tensor, batch: Batch, smoothing: float, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy of logits [B, K] against a batch's smoothed and mixed labels, a scalar. weights: [K], factors
    of the labels' losses.

    Without weights, both labels of a row go into one row of probabilities, because cross entropy is linear in its
    target. That takes fewer operations than two cross entropies.
    """
    if weights is not None:
        logp, others = log_probs(logits), smoothing / (logits.shape[1] - 1) if smoothing else 0.0

        def weighted(labels: Tensor) -> Tensor:
            own = logp.gather(1, labels[:, None])[:, 0]
            return -weights[labels].to(logp.dtype) * ((1 - smoothing - others) * own + others * logp.sum(1))

        return over_both_labels(weighted, batch).mean()
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
