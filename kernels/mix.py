"""Normalise, mix and cast a batch: uint8 NHWC from the pipeline becomes the network's channels-last input.

Contract of `mix(images, params, mean, std, dtype)`
    images   uint8 [B, H, W, C], contiguous, on any device
    params   float32 [B, 7], same device, one row an image (whole numbers below 2^24 are exact):
             PARTNER  number of the image in this batch to mix in
             MODE     0 PLAIN: as it is; 1 CUTMIX: the partner's pixels inside the box; 2 MIXUP: λ·own + (1−λ)·partner
             BOX      top, bottom, left, right of the box: rows top … bottom−1, columns left … right−1
             LAM      λ of MIXUP; not read in the other modes
    mean,std C numbers each, of pixels scaled to 0 … 1
    dtype    of the result: float32, float16 or bfloat16
    returns  MixOutput(images [B, C, H, W] in channels_last layout, partner int64 [B], lam float32 [B]), where lam is
             the share of the own image: 1 (PLAIN), the exact fraction of pixels outside the box (CUTMIX), λ (MIXUP)

Partners are read from the unmixed batch. Arithmetic is in float32, (x − 255·mean) · 1/(255·std), then one cast.
CutMix is Yun et al. 2019 (arXiv 1905.04899), mixup Zhang et al. 2018 (arXiv 1710.09412). Nothing is differentiable.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PARTNER, MODE, TOP, BOTTOM, LEFT, RIGHT, LAM = range(7)
BOX = slice(TOP, RIGHT + 1)
COLUMNS = 7
PLAIN, CUTMIX, MIXUP = range(3)


class MixOutput(NamedTuple):
    images: Tensor
    partner: Tensor
    lam: Tensor


def plain_params(batch: int) -> NDArray[np.float32]:
    """A table, float32 [batch, COLUMNS], that leaves every image as it is: each is its own partner."""
    params = np.zeros((batch, COLUMNS), np.float32)
    params[:, PARTNER] = np.arange(batch)
    params[:, LAM] = 1
    return params


def reference(
    images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> MixOutput:
    """The contract above, in plain torch."""
    height, width = images.shape[1:3]
    shift = torch.tensor([255 * m for m in mean], dtype=torch.float32, device=images.device)
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=images.device)
    own = (images.float() - shift) * scale
    partner = params[:, PARTNER].long()
    other = own[partner]

    mode, lam = params[:, MODE], params[:, LAM]
    top, bottom, left, right = (params[:, column, None] for column in (TOP, BOTTOM, LEFT, RIGHT))
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None, :]

    each = (slice(None), None, None, None)
    cut = torch.where(inside[..., None], other, own)
    blend = lam[each] * own + (1 - lam[each]) * other
    mixed = torch.where(mode[each] == CUTMIX, cut, torch.where(mode[each] == MIXUP, blend, own))

    pixels = height * width
    outside = (pixels - inside.sum((1, 2))).float() / pixels
    lam = torch.where(mode == CUTMIX, outside, torch.where(mode == MIXUP, lam, torch.ones_like(lam)))
    return MixOutput(mixed.to(dtype).permute(0, 3, 1, 2), partner, lam)


def mix(images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> MixOutput:
    """Normalise, mix and cast a batch; see the contract at the top of this file."""
    if images.device.type == "cpu":
        return _on_cpu(images, params, mean, std, dtype)
    return reference(images, params, mean, std, dtype)


def _on_cpu(
    images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> MixOutput:
    """One image at a time, so that all work on it stays in the cache; bit-equal to the reference.

    A box is pasted before the arithmetic, on bytes. Shift and scale are spread over a whole row, since an inner loop
    of three channels would not vectorise.
    """
    batch, height, width, channels = images.shape
    shift = torch.tensor([255 * m for m in mean], dtype=torch.float32).repeat(width)
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32).repeat(width)
    result = torch.empty((batch, height, width * channels), dtype=dtype)
    pasted = torch.empty((height, width, channels), dtype=torch.uint8)
    own, other = (torch.empty((height, width * channels), dtype=torch.float32) for _ in range(2))
    shares = torch.ones(batch, dtype=torch.float32)

    for at, (partner, mode, top, bottom, left, right, lam) in enumerate(params.tolist()):
        image = images[at]
        if mode == CUTMIX:
            rows, columns = slice(int(top), int(bottom)), slice(int(left), int(right))
            pasted.copy_(image)
            pasted[rows, columns] = images[int(partner), rows, columns]
            image = pasted
            shares[at] = (height * width - max(0, bottom - top) * max(0, right - left)) / (height * width)
        target = result[at] if dtype == torch.float32 else own
        torch.sub(image.view(height, -1), shift, out=target).mul_(scale)
        if mode == MIXUP:
            torch.sub(images[int(partner)].view(height, -1), shift, out=other).mul_(scale)
            target.mul_(lam).add_(other.mul_(1 - lam))
            shares[at] = lam
        if target is own:
            result[at].copy_(own)
    pixels = result.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return MixOutput(pixels, params[:, PARTNER].long(), shares)
