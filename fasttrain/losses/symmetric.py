"""Symmetric cross entropy: cross entropy plus its reverse, with labels and predictions swapped."""

from dataclasses import dataclass
from typing import ClassVar

from fasttrain.losses.base import Batch, Loss, Output, Term, at_least_float32, over_both_labels
from fasttrain.losses.cross_entropy import against_soft


@dataclass(frozen=True)
class SymmetricCrossEntropy(Loss):
    """Cross entropy plus its reverse, which is bounded, so that wrong labels weigh less.

    Mean over the batch of λ·L(a) + (1−λ)·L(b), where L = alpha·CE + beta·RCE. CE is `CrossEntropy`. RCE =
    −Σ_k p_k·max(ln q_k, floor) swaps the network's probabilities p and the one-hot label q: ln 0 becomes the floor, so
    RCE = −floor·(1 − p_y). Computed in float32 (in float64 for float64 logits). Wang et al. 2019 (arXiv 1908.06112)
    call the floor A; alpha, beta and floor are our own, for "attract_repulse".
    """

    alpha: float = 1.0
    """Factor of the cross entropy."""
    beta: float = 0.1
    """Factor of the reverse cross entropy."""
    floor: float = -4.0
    """Value for ln 0 in the reverse; below 0."""
    smoothing: float = 0.0
    """Label smoothing of the cross entropy, in [0, 1)."""
    weight: float = 1.0
    """Factor of this loss."""

    name: ClassVar[str] = "symmetric_cross_entropy"

    def __post_init__(self) -> None:
        for key in ("alpha", "beta"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} must be 0 or more, not {getattr(self, key)}")
        if not self.alpha + self.beta > 0:
            raise ValueError("alpha must be above 0 if beta is 0")
        if not self.floor < 0:
            raise ValueError(f"floor must be below 0, not {self.floor}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        known = at_least_float32(output.logits).softmax(1)
        right = over_both_labels(lambda labels: known.gather(1, labels[:, None])[:, 0], batch).mean()
        forward = against_soft(output.logits, batch, self.smoothing)
        return Term(self.weight * (self.alpha * forward - self.beta * self.floor * (1 - right)))
