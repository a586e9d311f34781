"""Forms of timm's modules that keep the channels_last layout and compute the same.

Half-precision convolutions are fast in channels_last. If a module between them returns another layout, or its gradient
has another layout, full activations are copied in the forward or backward pass. `use_channels_last_forms` replaces the
modules in place; parameters, buffers and their names stay the same.
"""

from itertools import starmap
from operator import add, mul
from typing import Any

import torch
from timm.layers import BlurPool2d, SEModule, SpaceToDepth
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.split_attn import SplitAttn
from torch import Tensor, nn


def use_channels_last_forms(network: nn.Module) -> nn.Module:
    """Replace the forward of each of these modules in a network, in place, and return the network."""
    for module in network.modules():
        for form in _FORMS:
            if type(module) is form.__base__:
                module.__class__ = form
    return network


class _Mean(torch.autograd.Function):
    """Mean over height and width, [B, C, H, W] to [B, C, 1, 1]. torch's own gradient is a full tensor in
    contiguous layout; this one is an expanded view of B · C values."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.shape = images.shape
        return images.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


def mean(images: Tensor) -> Tensor:
    """The mean of each channel, [B, C, H, W] to [B, C, 1, 1]."""
    return _Mean.apply(images)


class Squeeze(SEModule):
    def forward(self, x: Tensor) -> Tensor:
        pooled = mean(x)
        if self.add_maxpool:
            pooled = 0.5 * pooled + 0.5 * x.amax((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(pooled)))))


class Split(SplitAttn):
    """Adds the radix's parts as ranges of channels, instead of summing over a dimension."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.drop(self.bn0(self.conv(x))))
        parts = x.chunk(self.radix, 1)
        pooled = mean(_sum(parts))
        weights = self.rsoftmax(self.fc2(self.act1(self.bn1(self.fc1(pooled)))))
        weights = weights.view(len(x), -1, 1, 1).chunk(self.radix, 1)
        return _sum(tuple(starmap(mul, zip(parts, weights, strict=True))))


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = add(total, part)
    return total


class Depth(SpaceToDepth):
    """Turns the pixels of each block into channels with one copy, directly in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        side = self.bs
        blocks = x.view(batch, channels, height // side, side, width // side, side)
        rows = blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // side, width // side, -1)
        return rows.permute(0, 3, 1, 2)


class _Reflect(torch.autograd.Function):
    """Reflection padding of one pixel, [B, C, H, W] to [B, C, H + 2, W + 2]; the edge pixels are not repeated."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        images = torch.cat([images[:, :, 1:2], images, images[:, :, -2:-1]], 2)
        return torch.cat([images[:, :, :, 1:2], images, images[:, :, :, -2:-1]], 3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rows = gradient[:, :, 1:-1].clone()
        rows[:, :, 1] += gradient[:, :, 0]
        rows[:, :, -2] += gradient[:, :, -1]
        inside = rows[:, :, :, 1:-1].clone()
        inside[:, :, :, 1] += rows[:, :, :, 0]
        inside[:, :, :, -2] += rows[:, :, :, -1]
        return inside


class Blur(BlurPool2d):
    """Uses `_Reflect`: on a GPU torch's own padding leaves channels_last, and its gradient is not deterministic."""

    def forward(self, x: Tensor) -> Tensor:
        if self.pad_mode != "reflect" or self.padding != [1] * 4:
            return super().forward(x)
        x = _Reflect.apply(x)
        channels = x.shape[1]
        weight = self.filt if self.channels is not None else self.filt.expand(channels, -1, -1, -1)
        return nn.functional.conv2d(x, weight.to(x.dtype), stride=self.stride, groups=channels)


class Global(nn.AdaptiveAvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return mean(input) if self.output_size in (1, (1, 1)) else super().forward(input)


class Pool(FastAdaptiveAvgPool):
    def forward(self, x: Tensor) -> Tensor:
        if self.dim != (2, 3):
            return super().forward(x)
        return mean(x).flatten(1) if self.flatten else mean(x)


_FORMS = (Squeeze, Split, Depth, Blur, Global, Pool)
