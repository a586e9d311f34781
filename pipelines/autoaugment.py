"""AutoAugment's ImageNet policy (Cubuk et al. 2019): the list, what an entry does to an image, and its DALI graph.

An operation and its strength are chosen by the plan, in numpy; DALI only carries them out. Several operations share
one branch of the graph (see `Kind`), because branches are what costs on a GPU and warps are what costs on a CPU.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, types


class Op(IntEnum):
    IDENTITY = 0
    POSTERIZE = 1
    SOLARIZE = 2
    INVERT = 3
    EQUALIZE = 4
    AUTO_CONTRAST = 5
    ROTATE = 6
    SHEAR_X = 7
    COLOR = 8
    CONTRAST = 9
    SHARPNESS = 10


# (operation, probability, magnitude in bins 0 … 9) twice an entry, numbered as in the paper's table.
POLICY: tuple[tuple[tuple[Op, float, int], tuple[Op, float, int]], ...] = (
    ((Op.POSTERIZE, 0.4, 8), (Op.ROTATE, 0.6, 9)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 5)),
    ((Op.EQUALIZE, 0.8, 8), (Op.EQUALIZE, 0.6, 3)),
    ((Op.POSTERIZE, 0.6, 7), (Op.POSTERIZE, 0.6, 6)),
    ((Op.EQUALIZE, 0.4, 7), (Op.SOLARIZE, 0.2, 4)),
    ((Op.EQUALIZE, 0.4, 4), (Op.ROTATE, 0.8, 8)),
    ((Op.SOLARIZE, 0.6, 3), (Op.EQUALIZE, 0.6, 7)),
    ((Op.POSTERIZE, 0.8, 5), (Op.EQUALIZE, 1.0, 2)),
    ((Op.ROTATE, 0.2, 3), (Op.SOLARIZE, 0.6, 8)),
    ((Op.EQUALIZE, 0.6, 8), (Op.POSTERIZE, 0.4, 6)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 0.4, 0)),
    ((Op.ROTATE, 0.4, 9), (Op.EQUALIZE, 0.6, 2)),
    ((Op.EQUALIZE, 0.0, 7), (Op.EQUALIZE, 0.8, 8)),
    ((Op.INVERT, 0.6, 4), (Op.EQUALIZE, 1.0, 8)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 1.0, 2)),
    ((Op.COLOR, 0.8, 8), (Op.SOLARIZE, 0.8, 7)),
    ((Op.SHARPNESS, 0.4, 7), (Op.INVERT, 0.6, 8)),
    ((Op.SHEAR_X, 0.6, 5), (Op.EQUALIZE, 1.0, 9)),
    ((Op.COLOR, 0.4, 0), (Op.EQUALIZE, 0.6, 3)),
    ((Op.EQUALIZE, 0.4, 7), (Op.SOLARIZE, 0.2, 4)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 5)),
    ((Op.INVERT, 0.6, 4), (Op.EQUALIZE, 1.0, 8)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.EQUALIZE, 0.8, 8), (Op.EQUALIZE, 0.6, 3)),
)
# The report speaks of 24: a popular implementation of its time first listed the paper's table without the last.
POLICIES = {"imagenet": POLICY, "imagenet-24": POLICY[:24]}

DRAWS = 5  # uniforms an image: the sub-policy, whether each operation applies, the sign of each
MAX_BIN = 9
FILL = 128  # grey, where a warp looks outside the image


def strength(op: Op, bin_: int, sign: int) -> float:
    """What a magnitude bin means: bits kept (posterize), threshold (solarize), degrees counter-clockwise (rotate),
    source pixels a row (shear), blend factor with 1 the identity (colour, contrast, sharpness), 0 elsewhere."""
    share = bin_ / MAX_BIN
    match op:
        case Op.POSTERIZE:
            return 8 - round(4 * share)
        case Op.SOLARIZE:
            return 256 - 256 * share
        case Op.ROTATE:
            return sign * 30 * share
        case Op.SHEAR_X:
            return sign * 0.3 * share
        case Op.COLOR | Op.CONTRAST | Op.SHARPNESS:
            return 1 + sign * 0.9 * share
    return 0.0


class _Table(NamedTuple):
    ops: NDArray[np.int32]  # [entries, 2]
    probabilities: NDArray[np.float64]  # [entries, 2]
    strengths: NDArray[np.float32]  # [entries, 2, 2]: with the minus sign, with the plus


_TABLES = {
    name: _Table(
        np.array([[op for op, _, _ in entry] for entry in entries], np.int32),
        np.array([[p for _, p, _ in entry] for entry in entries]),
        np.array([[[strength(op, m, s) for s in (-1, 1)] for op, _, m in entry] for entry in entries], np.float32),
    )
    for name, entries in POLICIES.items()
}


def choose(u: NDArray[np.float64], policy: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Operation ids int32 [n, 2] and strengths float32 [n, 2] (see `strength`) from uniforms [DRAWS, n], in the order
    in which they apply. Where an operation's own draw leaves it out, its id is Op.IDENTITY."""
    table = _TABLES[policy]
    entry = (u[0] * len(table.ops)).astype(np.int64)
    applies = u[1:3].T < table.probabilities[entry]
    op = np.where(applies, table.ops[entry], np.int32(0))
    sign = (u[3:5].T >= 0.5).astype(np.int64)
    return op, table.strengths[entry[:, None], np.arange(2), sign]


class Kind(IntEnum):
    """A branch of the DALI graph. BITS is posterize, solarize and invert, WARP is rotate and shear."""

    NONE = 0
    BITS = 1
    EQUALIZE = 2
    WARP = 3
    COLOR = 4
    CONTRAST = 5
    SHARPNESS = 6
    AUTO_CONTRAST = 7


_KIND_OF = np.zeros(len(Op), np.int32)
for _op, _kind in (
    (Op.POSTERIZE, Kind.BITS),
    (Op.SOLARIZE, Kind.BITS),
    (Op.INVERT, Kind.BITS),
    (Op.EQUALIZE, Kind.EQUALIZE),
    (Op.AUTO_CONTRAST, Kind.AUTO_CONTRAST),
    (Op.ROTATE, Kind.WARP),
    (Op.SHEAR_X, Kind.WARP),
    (Op.COLOR, Kind.COLOR),
    (Op.CONTRAST, Kind.CONTRAST),
    (Op.SHARPNESS, Kind.SHARPNESS),
):
    _KIND_OF[_op] = _kind


class Arguments(NamedTuple):
    """What one operation's branch needs, for n images. DALI gets these arrays, or in a graph their nodes."""

    kind: Any  # int32 [n]
    keep: Any  # uint8 [n]: bits kept; all of them but for posterize
    flip: Any  # uint8 [n]: bits inverted at and above the threshold
    threshold: Any  # int32 [n]
    factor: Any  # float32 [n]: blend factor of colour and contrast
    matrix: Any  # float32 [n, 2, 3]: target to source coordinates, pixel corners at whole numbers
    kernel: Any  # float32 [n, 3, 3]: sharpness as one filter


DTYPES = Arguments(types.INT32, types.UINT8, types.UINT8, types.INT32, types.FLOAT, types.FLOAT, types.FLOAT)
NDIMS = Arguments(0, 0, 0, 0, 0, 2, 2)

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
_IDENTITY = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


def arguments(op: NDArray[np.int32], value: NDArray[np.float32], size: int) -> Arguments:
    """Arguments of one operation an image for n images of size x size pixels; op int32 [n], value float32 [n]."""
    inverts = (op == Op.SOLARIZE) | (op == Op.INVERT)
    bits = np.where(op == Op.POSTERIZE, value, 8).astype(np.int64)
    keep = (0xFF << (8 - bits)) & 0xFF
    return Arguments(
        kind=_KIND_OF[op],
        keep=keep.astype(np.uint8),
        flip=np.where(inverts, 255, 0).astype(np.uint8),
        # i < threshold stays, and i is whole, so the next whole number is the same threshold.
        threshold=np.where(op == Op.SOLARIZE, np.ceil(value), 0).astype(np.int32),
        factor=value,
        matrix=_matrix(op, value, size),
        kernel=value[:, None, None] * _IDENTITY + (1 - value[:, None, None]) * _SMOOTH,
    )


def _matrix(op: NDArray[np.int32], value: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Rotation about the image's centre, or shear along x about its top left corner, as PIL has them."""
    angle = np.where(op == Op.ROTATE, np.deg2rad(value.astype(np.float64)), 0.0)
    shear = np.where(op == Op.SHEAR_X, value.astype(np.float64), 0.0)
    cos, sin, centre = np.cos(angle), np.sin(angle), size / 2
    matrix = np.empty((len(op), 2, 3), np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 0, 2] = cos, -sin + shear, centre * (1 - cos + sin)
    matrix[:, 1, 0], matrix[:, 1, 1], matrix[:, 1, 2] = sin, cos, centre * (1 - cos - sin)
    return matrix


# What follows runs while DALI builds a graph: `images` and the arguments are nodes, and `if` splits the batch.
# DALI's AutoGraph follows plain functions only.


def apply(images: Any, a: Arguments, size: int) -> Any:
    """Each image (uint8 HWC, size x size) through its own operation. All arguments are CPU nodes but the kernel,
    which lives where the images do."""
    if a.kind == 0:
        result = images
    elif a.kind == 1:
        result = (images & a.keep) ^ (a.flip * (images >= a.threshold))
    elif a.kind == 2:
        result = fn.equalize(images)
    elif a.kind == 3:
        result = fn.warp_affine(
            images, matrix=a.matrix, size=[size, size], fill_value=FILL, interp_type=types.INTERP_NN
        )
    elif a.kind == 4:
        result = fn.saturation(images, saturation=a.factor)
    elif a.kind == 5:
        result = contrast(images, a.factor)
    elif a.kind == 6:
        result = fn.filter(images, a.kernel)
    else:
        result = auto_contrast(images)
    return result


def contrast(images: Any, factor: Any) -> Any:
    """Blend with the mean of the grey image, as PIL's ImageEnhance.Contrast does."""
    grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    mean = math.floor(fn.reductions.mean(grey, keep_dims=True) + 0.5)
    return fn.cast(mean + (images - mean) * factor, dtype=types.UINT8)


def auto_contrast(images: Any) -> Any:
    """Stretch each channel to 0 … 255; a channel of one value stays as it is."""
    low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    stretched = (images - low) * (255.0 / math.max(high - low, 1)) + low * (high == low)
    return fn.cast(stretched, dtype=types.UINT8)
