"""Symmetric cross entropy: cross entropy, and the same with labels and predictions in each other's place."""

from dataclasses import dataclass
from typing import ClassVar

from fasttrain.losses.base import Batch, Loss, Output, Term, at_least_float32, over_both_labels
from fasttrain.losses.cross_entropy import against_soft


@dataclass(frozen=True)
class SymmetricCrossEntropy(Loss):
    """Mean over the batch of λ·L(a) + (1−λ)·L(b), where L = alpha·CE + beta·RCE.

    CE is that of `CrossEntropy`, with its smoothing. The reverse, RCE = −Σ_k p_k·max(ln q_k, floor), has the network's
    probabilities p as the target of the label q, which is one-hot: ln 0 becomes the floor, and RCE = −floor·(1 − p_y).
    It is bounded, so a label that is hard to learn asks for less. Computed in float32 (in float64 for float64 logits).
    Wang et al. 2019 (arXiv 1908.06112), whose A is the floor; alpha, beta and floor are our own for "attract_repulse".
    """

    alpha: float = 1.0
    beta: float = 0.1
    floor: float = -4.0
    smoothing: float = 0.0
    weight: float = 1.0

    name: ClassVar[str] = "symmetric_cross_entropy"

    def __post_init__(self) -> None:
        for key in ("alpha", "beta"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} must be 0 or more, not {getattr(self, key)}")
        if not self.alpha + self.beta > 0:
            raise ValueError("alpha must be above 0 where beta is 0")
        if not self.floor < 0:
            raise ValueError(f"floor must be below 0, not {self.floor}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        known = at_least_float32(output.logits).softmax(1)
        right = over_both_labels(lambda labels: known.gather(1, labels[:, None])[:, 0], batch).mean()
        forward = against_soft(output.logits, batch, self.smoothing)
        return Term(self.weight * (self.alpha * forward - self.beta * self.floor * (1 - right)))
