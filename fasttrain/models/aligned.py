"""TResNet at widths that tensor cores can take: each width a multiple of 8, filled up by channels that stay 0.

TResNet-XL is 83, 166 and 332 channels wide in its first three stages. The fast kernels for half-precision,
channels-last convolutions want channel counts that are multiples of 8 (16 bytes), and 13.22 of its 15.17 G
multiply-adds an image at 224 pixels (87 %) are in convolutions where one is not. `align` makes the widths 88, 168 and
336: 15.61 G multiply-adds (3.0 % more) and 79.46 instead of 78.44 M parameters.

An added channel is 0 in every activation, gradient, weight, momentum and statistic, and stays so through training, as
long as all of the network is finite (0 · ∞ is not 0):

- Forward. The convolution that makes it has weights 0, so it is 0 as BatchNorm's input; its mean and variance are 0,
  and BatchNorm, with weight and bias 0, makes it 0 · x̂ + 0 = 0, dividing by √eps and not by 0. ReLU, leaky ReLU,
  pooling and blurring (reflected borders) keep it 0, squeeze-and-excitation multiplies it by sigmoid(0), and residual
  sums add 0 to 0.
- Backward. What reads it has weights 0 for it, so its gradient is 0: hence those of BatchNorm's bias (the sum of that
  gradient), of its weight (the same times x̂ = 0), and of the weights that make it. The gradients of weights that read
  it are products with the channel itself, 0.
- SGD. The gradient is 0, weight decay adds a multiple of 0, momentum is a sum of such; an average of zeros is 0.

So the first channels are timm's network. state_dict() gives them alone, and load_state_dict() takes them alone: both
speak timm's shapes, under timm's names, and nothing is lost or made up either way. `cut` and `pad` do the same for
what else is kept by the names of parameters (momentum, averages).
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
    """Widen a TResNet of timm in place, and give it back: it computes the same, at widths divisible by `multiple`.

    Two widths stay, whatever they are: the stem's input and the features (`num_features`, a multiple of 32 in timm),
    so neither what feeds the network nor what reads the features has to know. Draws no random number; parameters
    whose shape stays are the same objects. What changes a norm that is all 0 (zero_gamma=False) has to come before:
    after it, an added channel's weight would be 1. Raises UserError for other networks and for aligned ones.
    """
    if not isinstance(network, TResNet):
        raise UserError(f"only a TResNet can be aligned, and this is a {type(network).__name__}")
    if multiple < 1:
        raise UserError(f"widths can be multiples of 1 or more, not of {multiple}")
    before = {name: each.shape for name, each in _tensors(network).items()}
    if any(each.shape != before[name] for name, each in network.state_dict().items()):
        raise UserError("this network is aligned already")
    kept = (network.body.conv1.conv.in_channels, network.num_features)

    # The new width depends on the old one alone; so whatever fitted together still does.
    def width(channels: int) -> int:
        return channels if channels in kept else -(-channels // multiple) * multiple

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.groups == 1, "TResNet has no grouped convolution"
            module.in_channels, module.out_channels = width(module.in_channels), width(module.out_channels)
            _widen(module, (module.out_channels, module.in_channels))
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = width(module.num_features)
            # A running variance of 0 too: it is what the statistic of a channel of zeros tends to, and there it stays.
            _widen(module, (module.num_features,))
        elif isinstance(module, BlurPool2d):
            module.channels = width(module.channels)
            module.filt = module.filt[:1].repeat(module.channels, 1, 1, 1)  # the same filter for each channel
    for stage in network.feature_info:
        stage["num_chs"] = width(stage["num_chs"])

    own = network.state_dict()
    changed = {name: before[name] for name in own if own[name].shape != before[name]}
    if changed:
        network.register_state_dict_post_hook(partial(_cut_state, shapes=changed))
        network.register_load_state_dict_pre_hook(partial(_pad_state, shapes=changed))
    return network


def cut(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """`tensors`, shaped as the parameters and buffers of their names, in the shapes of `network.state_dict()`: views
    without the channels that `align` added, in `network` or in a part of it. Other names, and those of a network that
    is not aligned, keep their tensors."""
    stored = network.state_dict()
    return {name: _corner(each, stored[name].shape) if name in stored else each for name, each in tensors.items()}


def pad(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The way back from `cut`: tensors in the shapes of the parameters and buffers of their names, with zeros for the
    channels that `align` added. Other names keep their tensors. UserError, naming the tensor, for a shape that is not
    that of `network.state_dict()`."""
    stored, own = network.state_dict(), _tensors(network)
    padded = {}
    for name, each in tensors.items():
        if name in stored and each.shape != stored[name].shape:
            raise UserError(f"{name} is {list(each.shape)}, and {list(stored[name].shape)} in this network")
        padded[name] = _grown(each, own[name].shape) if name in own else each
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
    own = _tensors(network)
    for name, shape in shapes.items():
        given = state.get(prefix + name)
        if given is None:
            continue  # torch says so where that is an error
        if given.shape == shape:
            state[prefix + name] = _grown(given, own[name].shape)
        else:  # one of the padded shape too: nobody knows what is in its added channels
            errors.append(f"size mismatch for {prefix + name}: it is {list(given.shape)} and has to be {list(shape)}.")


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, in the shapes that they have in memory."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _widen(module: nn.Module, leading: tuple[int, ...]) -> None:
    """Grow a module's parameters and buffers to these first dimensions; scalars stay, and 1-D ones have but one."""
    for name, each in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        shape = torch.Size([*leading[: each.ndim], *each.shape[len(leading) :]])
        if shape != each.shape:
            grown = _grown(each, shape)
            is_parameter = isinstance(each, nn.Parameter)
            setattr(module, name, nn.Parameter(grown, each.requires_grad) if is_parameter else grown)


def _grown(tensor: Tensor, shape: torch.Size) -> Tensor:
    """`tensor` in the first corner of a tensor of zeros of this shape, its memory format kept; itself where it fits."""
    if tensor.shape == shape:
        return tensor
    missing = [new - old for new, old in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [each for dimension in reversed(missing) for each in (0, dimension)])


def _corner(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The first corner of this shape, as a view."""
    return tensor[tuple(map(slice, shape))] if tensor.shape != shape else tensor
