"""Collective operations on tensors inside losses: they need no `Ranks`, only torch's process group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_of_world() -> tuple[int, int]:
    """(rank, world size) of this process in its process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, as a new tensor without gradient."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows [B, ...] in the ranks' order, [world · B, ...]; B must be the same on all ranks.

    Differentiable: the gradient of a rank's rows is the sum of what all ranks send back for them.
    """
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.size
        return gradient[start : start + ctx.size]
