"""Many tensors as few: lists of one dtype, and one tensor that holds all of a list's values."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in a list for each dtype, in their order: what `torch._foreach_…` takes at once is of one."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for each in tensors:
        found.setdefault(each.dtype, []).append(each)
    return list(found.values())


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor [total] of all their values, one tensor after another; they are of one dtype."""
    return torch.cat([each.reshape(-1) for each in tensors])


def unflatten_into(values: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write back what `flatten` gives of tensors of the same shapes."""
    parts = values.split([each.numel() for each in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(each) for part, each in zip(parts, tensors, strict=True)])


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
