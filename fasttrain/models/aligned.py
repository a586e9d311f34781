"""Aligned TResNets: channel counts padded to multiples of 8 for tensor cores, by channels that stay 0.

TResNet-XL is 83, 166 and 332 channels wide in its first three stages. The fast kernels for half-precision,
channels-last convolutions need channel counts that are multiples of 8 (16 bytes). 13.22 of its 15.17 G multiply-adds
per image at 224 pixels (87 %) are in convolutions where one count is not. `align` makes the widths 88, 168 and 336. The
network then has 15.61 G multiply-adds (3.0 % more) and 79.46 instead of 78.44 M parameters.

A padded channel is 0 in every activation, gradient, weight, momentum and statistic. It stays 0 during training as long
as the entire network is finite (0 · ∞ is not 0):

- Forward. The weights of the convolution that computes it are 0, so BatchNorm's input is 0. Its mean and variance are
  0. BatchNorm, with weight and bias 0, divides by √eps and not by 0, so its output is 0 · x̂ + 0 = 0. ReLU, leaky ReLU,
  pooling and blurring (with reflected borders) keep it 0. Squeeze-and-excitation multiplies it by sigmoid(0). Residual
  sums add 0 to 0.
- Backward. The weights of the layers that read it are 0, so its gradient is 0. The gradient of BatchNorm's bias is the
  sum of that gradient, so it is 0. The gradient of BatchNorm's weight is the sum of that gradient times x̂ = 0, so it is
  0. The gradients of the weights that compute the channel are then 0 as well. The gradients of the weights that read
  it are products with the channel itself, so they are 0.
- SGD. The gradient is 0, weight decay adds a multiple of 0, and momentum is a sum of zeros. An average of zeros is 0.

The other channels are therefore exactly timm's network. state_dict() returns only these channels, and load_state_dict()
takes only these: both use timm's shapes and names, and no information is lost or added. `cut` and `pad` do the same for
other tensors that are stored by parameter name (momentum, averages).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import BlurPool2d
from timm.models.tresnet import TResNet
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.utils.errors import UserError


@torch.no_grad()
def align(network: nn.Module, multiple: int = 8) -> nn.Module:
    """Pad the widths of a timm TResNet to multiples of `multiple`, in place, and return it. It computes the same.

    Two widths never change, so that neither the network's input nor its features change: those of the stem's input and
    of the features (`num_features`, a multiple of 32 in timm). No random numbers are drawn. Parameters that keep their
    shape are the same objects. A change of norm weights that are all 0 (zero_gamma=False) has to come first: after
    `align`, it would set the weights of padded channels to 1. Raises UserError for other networks, for aligned ones,
    and where `multiple` is less than 1.
    """
    if not isinstance(network, TResNet):
        raise UserError(f"only a TResNet can be aligned, not a {type(network).__name__}")
    if multiple < 1:
        raise UserError(f"widths can be multiples of 1 or more, not of {multiple}")
    before = {name: tensor.shape for name, tensor in _tensors(network).items()}
    if any(tensor.shape != before[name] for name, tensor in network.state_dict().items()):
        raise UserError("this network is already aligned")
    kept = (network.body.conv1.conv.in_channels, network.num_features)

    # The new width depends only on the old one, so layers that fitted together still do.
    def width(channels: int) -> int:
        return channels if channels in kept else -(-channels // multiple) * multiple

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.groups == 1, "TResNet has no grouped convolution"
            module.in_channels, module.out_channels = width(module.in_channels), width(module.out_channels)
            _pad_module(module, (module.out_channels, module.in_channels))
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = width(module.num_features)
            # The running variance is padded with 0 too: a channel of zeros has variance 0, so it stays 0.
            _pad_module(module, (module.num_features,))
        elif isinstance(module, BlurPool2d):
            module.channels = width(module.channels)
            module.filt = module.filt[:1].repeat(module.channels, 1, 1, 1)  # the same filter for each channel
    for stage in network.feature_info:
        stage["num_chs"] = width(stage["num_chs"])

    state = network.state_dict()
    changed = {name: before[name] for name in state if state[name].shape != before[name]}
    if changed:
        network.register_state_dict_post_hook(partial(_cut_state, shapes=changed))
        network.register_load_state_dict_pre_hook(partial(_pad_state, shapes=changed))
    return network


def cut(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """`tensors` without padded channels, as views in the shapes of `network.state_dict()`. They have the shapes of
    the parameters and buffers of the same names. `network` may be, or contain, an aligned TResNet. Other tensors, and
    those of a network that is not aligned, are returned as they are."""
    stored = network.state_dict()
    return {name: _corner(tensor, stored[name].shape) if name in stored else tensor for name, tensor in tensors.items()}


def pad(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The inverse of `cut`: tensors in the shapes of the parameters and buffers of the same names, with zeros in padded
    channels. Tensors of other names are returned as they are. Raises UserError, which names the tensor, where a shape
    is not that of `network.state_dict()`."""
    stored, in_memory = network.state_dict(), _tensors(network)
    padded = {}
    for name, tensor in tensors.items():
        if name in stored and tensor.shape != stored[name].shape:
            raise UserError(f"{name} is {list(tensor.shape)}, but {list(stored[name].shape)} in this network")
        padded[name] = _padded(tensor, in_memory[name].shape) if name in in_memory else tensor
    return padded


def _cut_state(
    network: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    _metadata: dict[str, Any],
    *,
    shapes: dict[str, torch.Size],
) -> None:
    for name, shape in shapes.items():
        state[prefix + name] = _corner(state[prefix + name], shape)


def _pad_state(
    network: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
    *,
    shapes: dict[str, torch.Size],
) -> None:
    in_memory = _tensors(network)
    for name, shape in shapes.items():
        tensor = state.get(prefix + name)
        if tensor is None:
            continue  # torch reports it where that is an error
        if tensor.shape == shape:
            state[prefix + name] = _padded(tensor, in_memory[name].shape)
        else:  # also for the padded shape: its padded channels may not be 0
            errors.append(f"size mismatch for {prefix + name}: it is {list(tensor.shape)} but must be {list(shape)}.")


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, with padded channels."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _pad_module(module: nn.Module, leading: tuple[int, ...]) -> None:
    """Pad a module's parameters and buffers to these leading dimensions; 1-D tensors take the first, scalars none."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        shape = torch.Size([*leading[: tensor.ndim], *tensor.shape[len(leading) :]])
        if shape != tensor.shape:
            padded = _padded(tensor, shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(padded, tensor.requires_grad) if is_parameter else padded)


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """`tensor`, padded with zeros at the end of each dimension to this shape, in its memory format. Where the shape is
    the same, `tensor` itself."""
    if tensor.shape == shape:
        return tensor
    missing = [new - old for new, old in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [amount for after in reversed(missing) for amount in (0, after)])


def _corner(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The first entries of each dimension, in this shape, as a view."""
    return tensor[tuple(map(slice, shape))] if tensor.shape != shape else tensor
