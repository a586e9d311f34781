"""Contrastive regularisation: two views of an image shall be nearer to each other than to other images."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.distributed.ranks import gather_rows, rank_of_world
from fasttrain.losses.base import Batch, Loss, Output, Term, at_least_float32


@dataclass(frozen=True)
class Contrastive(Loss):
    """Mean over all rows as anchors of −ln(exp(s⁺/τ) / Σ exp(s/τ)): s are the cosines of the anchor's embedding with
    those of all other rows, s⁺ that with the other view of the same image, τ the temperature.

    Of N images in two views each, an anchor has one positive and 2N − 2 negatives; mask_same_class leaves other images
    of its class out of them. Each rank's rows are anchors and those of all ranks are candidates; loss and gradients,
    once averaged over the ranks as DDP does, are those of one process with the global batch. On a step that mixes
    images there is no term: a mixed image has no one identity. decay="cosine": the weight falls from its value to 0
    over the run, along half a cosine. Computed in float32, whatever autocast says.

    The symmetric InfoNCE (NT-Xent) of Chen et al. 2020 (arXiv 2002.05709), section 2.1. Attract-and-Repulse (arXiv
    2206.06168) has such a term; its constants are not known to us, and these are our own.
    """

    temperature: float = 0.2
    weight: float = 0.5
    decay: str = "none"
    mask_same_class: bool = False

    name: ClassVar[str] = "contrastive"
    classifies: ClassVar[bool] = False
    unmixed: ClassVar[bool] = True
    projection_head: ClassVar[bool] = True
    views: ClassVar[int] = 2
    # The mean cosine with the positive, and the share of anchors that are nearer to it than to any negative.
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
