"""Additional heads, which only training uses."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.base import at_least_float32

TRAINING_HEADS = ("cosine.", "projection.")  # prefixes of the names of their tensors


class CosineHead(nn.Module):
    """Cosines [B, K] of the angles between features [B, D] and K weights, in float32 even under autocast."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        with _no_autocast(features):
            directions = F.normalize(at_least_float32(features), eps=1e-6)
            return F.linear(directions, F.normalize(self.weight, eps=1e-6)).clamp(-1, 1)


class ProjectionHead(nn.Module):
    """Projects features [B, D] to unit vectors [B, dimensions], or to 0 where the projection is 0. Returns
    float32 even under autocast. Two linear layers, D wide in between, with a ReLU (Chen et al. 2020, arXiv
    2002.05709)."""

    def __init__(self, features: int, dimensions: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, features)
        self.out = nn.Linear(features, dimensions)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.out(F.relu(self.hidden(features)))
        with _no_autocast(features):
            return F.normalize(at_least_float32(projected), eps=1e-6)


def _no_autocast(values: Tensor) -> AbstractContextManager[object]:
    """Disables autocast, which the meta device does not have."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)


def tie(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors unchanged; if only one of them gets a gradient, the other one gets zeros.

    A loss that uses the embedding may skip a step. But DDP waits for the gradient of each parameter, or expects the
    same parameters in every step, and SGD skips parameters without a gradient, with their momentum and decay.
    """
    return _Tie.apply(one, other)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return one.view_as(one), other.view_as(other)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients
