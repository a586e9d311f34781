"""Normalize, mix and cast a batch: uint8 NHWC from the pipeline becomes the network's channels-last input.

Contract of `mix(images, params, mean, std, dtype)`
    images   uint8 [B, H, W, C], contiguous, C at most 4, on a CPU or a GPU
    params   float32 [B, 7], contiguous, same device, one row per image (integers below 2^24 are exact):
             PARTNER  index in this batch of the image to mix in
             MODE     0 PLAIN: no mixing; 1 CUTMIX: the partner's pixels inside the box; 2 MIXUP: λ·own + (1−λ)·partner
             BOX      top, bottom, left, right of the box: rows top … bottom−1, columns left … right−1
             LAM      λ of MIXUP; ignored in the other modes
             Partners must be in the batch and boxes in the image; values on a GPU are not checked.
    mean,std C numbers each, of pixels scaled to 0 … 1
    dtype    of the result: float32, float16 or bfloat16
    returns  MixOutput(images [B, C, H, W] in channels_last layout, partner int64 [B], lam float32 [B]), where lam is
             the image's own share: 1 (PLAIN), the exact fraction of pixels outside the box (CUTMIX), λ (MIXUP)
    raises   ValueError for other shapes, layouts, dtypes or devices

Partners are read from the unmixed batch. The arithmetic is (x − 255·mean) · 1/(255·std) in float32, then one cast.
Results are bit-equal to `reference` on CPU and GPU. Autocast has no effect. Nothing is differentiable. CutMix is from
Yun et al. 2019 (arXiv 1905.04899), mixup from Zhang et al. 2018 (arXiv 1710.09412).

A GPU needs one launch and one pass: it writes every output byte once. If the batch has one box and the partners are a
permutation, it reads every input byte once, except for a few bytes at a box's left and right edges, which it reads
twice.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

PARTNER, MODE, TOP, BOTTOM, LEFT, RIGHT, LAM = range(7)
BOX = slice(TOP, RIGHT + 1)
COLUMNS = 7
PLAIN, CUTMIX, MIXUP = range(3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MixOutput(NamedTuple):
    images: Tensor
    partner: Tensor
    lam: Tensor


def plain_params(batch: int) -> NDArray[np.float32]:
    """A table, float32 [batch, COLUMNS], that mixes nothing: each image is its own partner."""
    params = np.zeros((batch, COLUMNS), np.float32)
    params[:, PARTNER] = np.arange(batch)
    params[:, LAM] = 1
    return params


def mix(images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> MixOutput:
    """Normalize, mix and cast a batch; see the contract at the top of this file."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:  # traced, counted or faked
        return MixOutput(*_mix(images, params, list(mean), list(std), dtype))
    return MixOutput(
        *_dispatch(images, params, mean, std, dtype)
    )  # calling the operator would double the time on the host


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

    per_image = (slice(None), None, None, None)
    cut = torch.where(inside[..., None], other, own)
    blend = lam[per_image] * own + (1 - lam[per_image]) * other
    mixed = torch.where(mode[per_image] == CUTMIX, cut, torch.where(mode[per_image] == MIXUP, blend, own))

    pixels = torch.full((), height * width, device=images.device)  # torch multiplies by 1/x to divide by a number x
    outside = (pixels - inside.sum((1, 2))).float() / pixels
    lam = torch.where(mode == CUTMIX, outside, torch.where(mode == MIXUP, lam, torch.ones_like(lam)))
    return MixOutput(mixed.to(dtype).permute(0, 3, 1, 2), partner, lam)


# ---------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _of_channel(channel, v0, v1, v2, v3):
    return tl.where(channel == 0, v0, tl.where(channel == 1, v1, tl.where(channel == 2, v2, v3)))


@triton.jit
def mix_kernel(
    images,  # uint8 [B, H, W, C]
    table,  # float32 [B, 7]; `params` is a name that Triton 3.6 uses when it binds arguments
    result,  # [B, H, W, C], the result's dtype
    partners,  # int64 [B]
    shares,  # float32 [B]
    height,
    shift0,
    shift1,
    shift2,
    shift3,
    scale0,
    scale1,
    scale2,
    scale3,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,  # bytes that a thread moves at once; divides a row
    GROUPS: tl.constexpr,  # groups per program
):
    """A program normalizes and mixes GROUPS x GROUP consecutive bytes of one image, program_id(1)."""
    row_bytes: tl.constexpr = WIDTH * CHANNELS
    row_groups: tl.constexpr = row_bytes // GROUP
    image = tl.program_id(1)
    row = table + image * 7
    partner = tl.load(row + 0).to(tl.int32)
    mode = tl.load(row + 1).to(tl.int32)
    top = tl.load(row + 2).to(tl.int32)
    bottom = tl.load(row + 3).to(tl.int32)
    left = tl.load(row + 4).to(tl.int32) * CHANNELS  # columns are counted in bytes from here on
    right = tl.load(row + 5).to(tl.int32) * CHANNELS
    lam = tl.load(row + 6)

    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = group < height * row_groups
    y = group // row_groups
    start = (group % row_groups) * GROUP
    lane = tl.arange(0, GROUP)
    column = start[:, None] + lane[None, :]
    offset = group[:, None] * GROUP + lane[None, :]

    # A mask has one value per group, so that each group is one wide load. A box's edge may lie inside a group.
    in_rows = (y >= top) & (y < tl.where(mode == 1, bottom, top))
    touched = in_rows & (start + GROUP > left) & (start < right)
    covered = in_rows & (start >= left) & (start + GROUP <= right)
    plane = height * row_bytes
    own = tl.load(images + image.to(tl.int64) * plane + offset, mask=(live & (covered == 0))[:, None], other=0)
    needed = live & (tl.where(mode == 2, 1, touched.to(tl.int32)) != 0)
    other = tl.load(images + partner.to(tl.int64) * plane + offset, mask=needed[:, None], other=0)

    inside = in_rows[:, None] & (column >= left) & (column < right)
    channel = column % CHANNELS
    shift = _of_channel(channel, shift0, shift1, shift2, shift3)
    scale = _of_channel(channel, scale0, scale1, scale2, scale3)
    value = (tl.where(inside, other, own).to(tl.float32) - shift) * scale
    if mode == 2:
        value = lam * value + (1 - lam) * ((other.to(tl.float32) - shift) * scale)
    target = result + image.to(tl.int64) * plane + offset
    tl.store(target, value.to(result.dtype.element_ty), mask=live[:, None])

    if tl.program_id(0) == 0:
        box = tl.maximum(bottom - top, 0) * (tl.maximum(right - left, 0) // CHANNELS)
        pixels = height * WIDTH
        outside = tl.math.div_rn((pixels - box).to(tl.float32), pixels.to(tl.float32))
        tl.store(partners + image, partner.to(tl.int64))
        tl.store(shares + image, tl.where(mode == 1, outside, tl.where(mode == 2, lam, 1.0)))


def group_bytes(width: int, channels: int, dtype: torch.dtype) -> int:
    """Bytes that a thread moves at once: the largest power of two that divides a row and fits a 128-bit store."""
    row, widest = width * channels, 16 // dtype.itemsize
    return min(widest, row & -row)


def launch(
    images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract in Triton, in one launch."""
    batch, height, width, channels = images.shape
    result = torch.empty((batch, height, width, channels), dtype=dtype, device=images.device)
    partners = torch.empty(batch, dtype=torch.int64, device=images.device)
    shares = torch.empty(batch, dtype=torch.float32, device=images.device)
    group = group_bytes(width, channels, dtype)
    groups = 1024 // group
    padding = [0.0] * (4 - channels)
    grid = (triton.cdiv(height * width * channels, group * groups), batch)
    mix_kernel[grid](
        images,
        params,
        result,
        partners,
        shares,
        height,
        *[255 * m for m in mean],
        *padding,
        *[1 / (255 * s) for s in std],
        *padding,
        WIDTH=width,
        CHANNELS=channels,
        GROUP=group,
        GROUPS=groups,
        num_warps=4,
        enable_fp_fusion=False,  # λ·a + (1−λ)·b must round as the reference does
    )
    return result.permute(0, 3, 1, 2), partners, shares


# ------------------------------------------------------------------------------------------------------------- CPU


def on_cpu(
    images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract on a CPU, one image at a time, so that each image stays in the cache; or all images at once if they
    fit into the cache together and are mixed in the same way.

    A box is pasted as bytes, before the arithmetic. Shift and scale are repeated for every pixel of a row, because an
    inner loop over three channels would not vectorize. Results are in pooled memory, which is reused once nothing
    refers to it: new memory from the system takes longer than the work on it.
    """
    batch, height, width, channels = images.shape
    shift, scale = _row_constants(tuple(mean), tuple(std), width)
    result = _pooled(images.numel(), dtype).view(batch, height, width * channels)
    partners, shares = params[:, PARTNER].long(), torch.ones(batch, dtype=torch.float32)
    table = params.tolist()
    parts: list[tuple[Any, Any, list[float]]]  # (images, their partners, mode, box and λ)
    if images.numel() <= _CACHED and all(row[MODE:] == table[0][MODE:] for row in table):
        parts, lead = [(slice(batch), partners, row[MODE:]) for row in table[:1]], images.shape[:1]
    else:
        parts, lead = [(image, int(row[PARTNER]), row[MODE:]) for image, row in enumerate(table)], torch.Size()
    modes = {row[MODE] for row in table}
    scratch = functools.partial(torch.empty, (*lead, height, width * channels))  # shared by all parts
    pasted = scratch(dtype=torch.uint8).view(*lead, height, width, channels) if CUTMIX in modes else None
    own = scratch(dtype=torch.float32) if dtype != torch.float32 else None
    other = scratch(dtype=torch.float32) if MIXUP in modes else None

    with _one_thread() if len(parts) > 1 else nullcontext():
        for part, partner, (mode, top, bottom, left, right, lam) in parts:
            source = images[part]
            if pasted is not None and mode == CUTMIX:
                rows, columns = slice(int(top), int(bottom)), slice(int(left), int(right))
                pasted.copy_(source)
                pasted[..., rows, columns, :] = images[partner, rows, columns]
                source = pasted
                shares[part] = (height * width - max(0, bottom - top) * max(0, right - left)) / (height * width)
            target = result[part] if own is None else own
            target.copy_(source.view(target.shape)).sub_(shift).mul_(scale)
            if other is not None and mode == MIXUP:
                other.copy_(images[partner].view(target.shape)).sub_(shift).mul_(scale)
                target.mul_(lam).add_(other.mul_(1 - lam))
                shares[part] = lam
            if own is not None:
                result[part].copy_(own)
    pixels = result.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return pixels, partners, shares


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread. Its threads would synchronize after every operation on an image, and while a pipeline
    keeps the cores busy, they wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_CACHED = 1 << 17  # values that stay in the cache together


@functools.lru_cache(maxsize=8)
def _row_constants(mean: tuple[float, ...], std: tuple[float, ...], width: int) -> tuple[Tensor, Tensor]:
    """Shift and scale of a row of pixels, float32 [width · C] each."""
    shift = torch.tensor([255 * m for m in mean], dtype=torch.float32).repeat(width)
    return shift, torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32).repeat(width)


_POOL: list[NDArray[np.uint8]] = []
_POOL_SIZE = 4


def _references(pool: list[NDArray[np.uint8]], slot: int) -> int:
    return sys.getrefcount(pool[slot])


_UNUSED = _references([np.empty(1, np.uint8)], 0)  # reference count of an array that only its pool holds


def _pooled(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor of `count` elements in pooled memory that no other tensor shares.

    A tensor refers to its array until the last tensor with the same storage is freed, so the array's reference count
    shows whether it is in use.
    """
    size = count * dtype.itemsize
    unused = [slot for slot in range(len(_POOL)) if _references(_POOL, slot) == _UNUSED]
    fitting = [slot for slot in unused if _POOL[slot].nbytes == size]
    if fitting:
        array = _POOL[fitting[0]]
    else:
        array = np.empty(size, np.uint8)
        if len(_POOL) == _POOL_SIZE:
            _POOL.pop(unused[0] if unused else 0)
        _POOL.append(array)
    return torch.from_numpy(array).view(dtype)


# -------------------------------------------------------------------------------------------------------- dispatch


def _check(images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.is_contiguous():
        raise ValueError(f"images must be contiguous uint8 [B, H, W, C], not {images.dtype} {list(images.shape)}")
    if not 1 <= images.shape[3] <= 4 or not images.shape[3] == len(mean) == len(std):
        raise ValueError(f"{images.shape[3]} channels need as many means and stds, at most 4; got {mean} and {std}")
    if params.dtype != torch.float32 or params.shape != (len(images), COLUMNS) or not params.is_contiguous():
        expected = f"contiguous float32 [{len(images)}, {COLUMNS}]"
        raise ValueError(f"params must be {expected}, not {params.dtype} {list(params.shape)}")
    if params.device != images.device:
        raise ValueError(f"params must be on {images.device} like the images, not on {params.device}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")


def _dispatch(
    images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check(images, params, mean, std, dtype)
    if not images.is_cuda:
        return on_cpu(images, params, mean, std, dtype)
    with torch.cuda.device_of(images):
        return launch(images, params, mean, std, dtype)


@torch.library.custom_op("fasttrain::mix", mutates_args=())
def _mix(
    images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _dispatch(images, params, mean, std, dtype)


@_mix.register_fake
def _(images, params, mean, std, dtype):
    batch, height, width, channels = images.shape
    result = images.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    return result, params.new_empty(batch, dtype=torch.int64), params.new_empty(batch, dtype=torch.float32)
