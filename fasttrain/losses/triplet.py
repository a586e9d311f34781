"""Batch-hard triplet loss over the pooled features of the whole global batch."""

import math
from dataclasses import dataclass
from typing import ClassVar

from fasttrain.distributed.ranks import gather_rows, rank_of_world, total
from fasttrain.kernels.triplet import batch_hard_triplet
from fasttrain.losses.base import Batch, Loss, Output, Term

_STUCK = 0.02  # share of the margin within which a loss counts as stuck at it


@dataclass(frozen=True)
class Triplet(Loss):
    """Mean over the anchors that have a positive and a negative of max(0, margin + d⁺ − d⁻), d⁺ the distance to the
    farthest image of the same class and d⁻ that to the nearest of another; with soft_margin of ln(1 + exp(d⁺ − d⁻)).

    Distances are Euclidean, between features as they enter the classifier, not normalised. Each rank's images are
    anchors and those of all ranks are candidates; loss and gradients, once averaged over the ranks as DDP does, are
    those of one process with the global batch. On a step that mixes images there is no term: a mixed image has no one
    identity. Hermans et al. 2017 (arXiv 1703.07737); mining is `fasttrain.kernels.triplet`.
    """

    margin: float = 0.3
    soft_margin: bool = False
    weight: float = 1.0

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
        # DDP takes the mean over ranks; anchors without a pair may be unequally many on them.
        valid = mined.valid.to(mined.loss.dtype)
        share = world * valid / total(valid).clamp(min=1)
        stats = {
            "active": mined.active * share,
            "d_ap": mined.mean_pos * share,
            "d_an": mined.mean_neg * share,
        }
        return Term(self.weight * share * mined.loss, stats)

    def collapsed(self, losses: list[float]) -> bool:
        """All features in one point: every distance is 0, and the loss stays where that puts it."""
        stuck = self.weight * (math.log(2) if self.soft_margin else self.margin)
        return bool(losses) and stuck > 0 and all(abs(each - stuck) <= _STUCK * stuck for each in losses)
