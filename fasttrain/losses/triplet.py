"""Batch-hard triplet loss over the pooled features of the whole global batch."""

import math
from dataclasses import dataclass
from typing import ClassVar

from fasttrain.distributed.collectives import gather_rows, rank_of_world, total
from fasttrain.kernels.triplet import batch_hard_triplet
from fasttrain.losses.base import Batch, Loss, Output, Term

_STUCK = 0.02  # share of the margin within which a loss counts as stuck at it


@dataclass(frozen=True)
class Triplet(Loss):
    """Batch-hard triplet loss over the whole global batch; steps that mix images have none.

    Mean of max(0, margin + d⁺ − d⁻) over the anchors that have a positive and a negative: d⁺ is the distance to the
    farthest image of the same class, d⁻ the distance to the nearest image of another class. Distances are Euclidean,
    between the features that enter the classifier, not normalized. Each rank's images are anchors; the candidates are
    those of all ranks. Averaged over the ranks, as DDP does, loss and gradients are those of one process with the
    global batch. A mixed image has no single class, so a step that mixes has no term. Hermans et al. 2017 (arXiv
    1703.07737); `fasttrain.kernels.triplet` does the mining.
    """

    margin: float = 0.3
    """Margin between d⁻ and d⁺; 0 or more."""
    soft_margin: bool = False
    """Use ln(1 + exp(d⁺ − d⁻)) instead of the margin."""
    weight: float = 1.0
    """Factor of this loss."""

    name: ClassVar[str] = "triplet"
    classifies: ClassVar[bool] = False
    unmixed: ClassVar[bool] = True
    fine_tunes: ClassVar[bool] = True
    groups: ClassVar[bool] = True
    stats: ClassVar[tuple[str, ...]] = ("active", "d_ap", "d_an")

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(f"margin must be 0 or more, not {self.margin}")

    def __call__(self, output: Output, batch: Batch) -> Term | None:
        if batch.mixed:
            return None
        rank, world = rank_of_world()
        features = output.features
        mined = batch_hard_triplet(
            features,
            batch.labels,
            candidates=gather_rows(features) if world > 1 else None,
            candidate_labels=gather_rows(batch.labels) if world > 1 else None,
            self_offset=rank * len(features),
            margin=None if self.soft_margin else self.margin,
        )
        # DDP averages over the ranks, which may have different numbers of valid anchors.
        valid = mined.valid.to(mined.loss.dtype)
        share = world * valid / total(valid).clamp(min=1)
        stats = {
            "active": mined.active * share,
            "d_ap": mined.mean_pos * share,
            "d_an": mined.mean_neg * share,
        }
        return Term(self.weight * share * mined.loss, stats)

    def collapsed(self, losses: list[float]) -> bool:
        """All features have become one point: every distance is 0, so the loss stays at the margin."""
        stuck = self.weight * (math.log(2) if self.soft_margin else self.margin)
        return bool(losses) and stuck > 0 and all(abs(loss - stuck) <= _STUCK * stuck for loss in losses)
