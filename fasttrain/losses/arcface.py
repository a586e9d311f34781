"""ArcFace: cross entropy over a cosine head, with an angular margin on the right class."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.base import Batch, Loss, Output, Term, over_both_labels


@dataclass(frozen=True)
class ArcFace(Loss):
    """Cross entropy over scaled cosines, with an angular margin on the right class.

    Mean over the batch of λ·L(a) + (1−λ)·L(b), where L is cross entropy (without smoothing) of scale·cosine, and the
    right class's cos θ is replaced by cos(θ + margin_rad). Where θ + margin exceeds π, the cosine would rise again and
    cos θ − margin·sin(margin) is used. The cosines come from a head without bias that exists in training only.
    Gradients are finite at cos θ = ±1. Computed in float32. Deng et al. 2019 (arXiv 1801.07698), section 2; DeepBlueAI
    report, section II-B.
    """

    scale: float = 30.0
    """Factor of the cosines; above 0."""
    margin_rad: float = 0.5
    """Angular margin in radians, in [0, π)."""
    weight: float = 1.0
    """Factor of this loss."""

    name: ClassVar[str] = "arcface"
    classifies: ClassVar[bool] = False
    fine_tunes: ClassVar[bool] = True
    cosine_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, not {self.scale}")
        if not 0 <= self.margin_rad < math.pi:
            raise ValueError(f"margin_rad must be in [0, π), not {self.margin_rad}")

    def __call__(self, output: Output, batch: Batch) -> Term:
        if output.cosine is None:
            raise ValueError("ArcFace needs a network with a cosine head, in training mode")
        return Term(self.weight * over_both_labels(partial(self._against, output.cosine), batch).mean())

    def _against(self, cosine: Tensor, labels: Tensor) -> Tensor:
        own = cosine.gather(1, labels[:, None])
        square = 1 - own.square()
        inside = square > 0
        sine = torch.where(inside, torch.where(inside, square, 1).sqrt(), 0)
        moved = own * math.cos(self.margin_rad) - sine * math.sin(self.margin_rad)
        past = own < -math.cos(self.margin_rad)  # θ > π − margin
        moved = torch.where(past, own - self.margin_rad * math.sin(self.margin_rad), moved)
        logits = self.scale * cosine.scatter(1, labels[:, None], moved)
        return F.cross_entropy(logits, labels, reduction="none")
