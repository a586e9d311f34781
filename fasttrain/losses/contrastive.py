"""Contrastive regularization: two views of an image should be nearer to each other than to other images."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.distributed.collectives import gather_rows, rank_of_world
from fasttrain.losses.base import Batch, Loss, Output, Term, at_least_float32


@dataclass(frozen=True)
class Contrastive(Loss):
    """InfoNCE (NT-Xent) between two views of each image, over the global batch; steps that mix images have none.

    Mean of −ln(exp(s⁺/τ) / Σ exp(s/τ)) over all rows as anchors: s are the cosines of the anchor's embedding with those
    of all other rows, s⁺ is the cosine with the other view of the same image, τ is the temperature. With N images in
    two views an anchor has one positive and 2N − 2 negatives. Each rank's rows are anchors; the candidates are those of
    all ranks. Averaged over the ranks, as DDP does, loss and gradients are those of one process with the global batch.
    A mixed image is not one image, so a step that mixes has no term. Computed in float32, also under autocast.

    Chen et al. 2020 (arXiv 2002.05709), section 2.1. Attract-and-Repulse (arXiv 2206.06168) has such a term; its
    constants are not public, and these are our own.
    """

    temperature: float = 0.2
    """Temperature τ; above 0."""
    weight: float = 0.5
    """Factor of this loss."""
    decay: str = "none"
    """The weight over the run: none (constant) or cosine (falls to 0 along half a cosine)."""
    mask_same_class: bool = False
    """Leave other images of the anchor's class out of its negatives."""

    name: ClassVar[str] = "contrastive"
    classifies: ClassVar[bool] = False
    unmixed: ClassVar[bool] = True
    projection_head: ClassVar[bool] = True
    views: ClassVar[int] = 2
    # Mean cosine with the positive; share of anchors that are nearer to it than to any negative.
    stats: ClassVar[tuple[str, ...]] = ("positive", "accuracy")

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.decay not in ("none", "cosine"):
            raise ValueError(f"decay must be none or cosine, not {self.decay!r}")

    def __call__(self, output: Output, batch: Batch) -> Term | None:
        if batch.mixed:
            return None
        if output.embedding is None:
            raise ValueError("Contrastive needs a network with a projection head, in training mode")
        if batch.views != self.views:
            raise ValueError(f"Contrastive needs {self.views} views of each image, not {batch.views}")
        with torch.autocast(output.embedding.device.type, enabled=False):
            return self._term(at_least_float32(output.embedding), batch)

    def _term(self, anchors: Tensor, batch: Batch) -> Term:
        rank, world = rank_of_world()
        rows = len(anchors)
        here = torch.arange(rows, device=anchors.device)
        own = here + rank * rows
        positive = (here + rows // 2) % rows + rank * rows
        candidates = gather_rows(anchors) if world > 1 else anchors
        cosines = anchors @ candidates.T  # [B, world · B]

        out = torch.zeros_like(cosines, dtype=torch.bool)
        if self.mask_same_class:
            labels = gather_rows(batch.labels) if world > 1 else batch.labels
            out = (batch.labels[:, None] == labels).scatter(1, positive[:, None], False)
        out = out.scatter(1, own[:, None], True)
        loss = F.cross_entropy((cosines / self.temperature).masked_fill(out, -math.inf), positive)

        with torch.no_grad():
            own_image = cosines.gather(1, positive[:, None])
            others = cosines.masked_fill(out.scatter(1, positive[:, None], True), -math.inf)
            nearest = own_image[:, 0] > others.amax(1)
            stats = {"positive": own_image.mean(), "accuracy": nearest.to(cosines.dtype).mean()}
        return Term(self._weight_at(batch.progress) * loss, stats)

    def _weight_at(self, progress: float | Tensor) -> float | Tensor:
        if self.decay == "none":
            return self.weight
        return self.weight * 0.5 * (1 + torch.cos(math.pi * torch.as_tensor(progress, dtype=torch.float32)))
