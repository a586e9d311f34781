"""Groups tensors by dtype, flattens lists of tensors, and copies tensors to the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors as one list per dtype, in their order, so that one `torch._foreach_…` call can take a list."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor [total] with the values of all tensors, which have one dtype."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten_into(values: Tensor, tensors: Sequence[Tensor]) -> None:
    """The inverse of `flatten`: copy its values into tensors of the same shapes."""
    parts = values.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
