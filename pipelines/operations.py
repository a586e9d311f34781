"""AutoAugment's operations on images: their names, their arguments, and the DALI graph that applies one per image.

The plan chooses each operation and its strength in numpy. `arguments` turns them into arrays, and `apply` uses these in
the graph. Several operations share one branch of the graph (see `Kind`), because branches are expensive on a GPU, and
warps on a CPU.

To add an operation: name it in `Op`, name its branch in `Kind` and `_KINDS`, compute its arguments in `arguments` (new
ones also in `Arguments` and `INPUTS`), and write its branch in `apply`. Then list it in a policy and give it strengths
there (`OPERATIONS` and `strength` in `randaugment`).
"""

from contextlib import suppress
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

with suppress(ImportError):  # without DALI the plan still works, which is enough to benchmark a training step
    from nvidia.dali import fn, math, types

FILL = 128  # gray, where a warp reads outside the image


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
    SHEAR_Y = 11
    TRANSLATE_X = 12
    TRANSLATE_Y = 13
    BRIGHTNESS = 14


class Kind(IntEnum):
    """A branch of the DALI graph. BITS is posterize and invert, WARP is every operation that moves pixels, CONTRAST
    includes brightness. `apply` compares the numbers, so their order matters there."""

    NONE = 0
    BITS = 1
    EQUALIZE = 2
    WARP = 3
    COLOR = 4
    CONTRAST = 5
    SHARPNESS = 6
    AUTO_CONTRAST = 7
    SOLARIZE = 8


_KINDS = {
    Op.IDENTITY: Kind.NONE,
    Op.POSTERIZE: Kind.BITS,
    Op.SOLARIZE: Kind.SOLARIZE,
    Op.INVERT: Kind.BITS,
    Op.EQUALIZE: Kind.EQUALIZE,
    Op.AUTO_CONTRAST: Kind.AUTO_CONTRAST,
    Op.ROTATE: Kind.WARP,
    Op.SHEAR_X: Kind.WARP,
    Op.SHEAR_Y: Kind.WARP,
    Op.TRANSLATE_X: Kind.WARP,
    Op.TRANSLATE_Y: Kind.WARP,
    Op.COLOR: Kind.COLOR,
    Op.BRIGHTNESS: Kind.CONTRAST,
    Op.CONTRAST: Kind.CONTRAST,
    Op.SHARPNESS: Kind.SHARPNESS,
}
_KIND_OF = np.array([_KINDS[op] for op in Op], np.int32)


class Arguments(NamedTuple):
    """The arguments of one operation per image, for n images: arrays, or their nodes in a DALI graph."""

    kind: Any  # int32 [n]
    keep: Any  # uint8 [n]: mask of the bits to keep; all of them except for posterize
    flip: Any  # uint8 [n]: mask of the bits to invert; for solarize only at and above the threshold
    threshold: Any  # uint8 [n]
    brightness: Any  # float32 [n]: blend factor with black
    saturation: Any  # float32 [n]: blend factor with gray
    contrast: Any  # float32 [n]: blend factor with the mean gray
    matrix: Any  # float32 [n, 2, 3]: target to source coordinates, pixel corners at integers
    kernel: Any  # float32 [n, 3, 3]: sharpness as one filter


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
_IDENTITY = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


def arguments(op: NDArray[np.int32], value: NDArray[np.float32], size: int) -> Arguments:
    """Arguments of one operation per image for n images of size x size pixels. op: int32 [n]. value: float32 [n].

    The value is the number of bits to keep (posterize), the threshold (solarize), degrees counter-clockwise (rotate),
    source pixels per row or column (shear), the share of the side by which the image moves right or down, truncated to
    whole pixels (translate), or a blend factor, where 1 is the identity (color, contrast, sharpness, brightness). Other
    operations ignore it.
    """
    # Pixel values are integers, so rounding the threshold up changes nothing. A threshold of 256 inverts no pixel.
    threshold = np.where(op == Op.SOLARIZE, np.ceil(value), 0)
    inverts = (op == Op.INVERT) | (op == Op.SOLARIZE) & (threshold < 256)
    bits = np.where(op == Op.POSTERIZE, value, 8).astype(np.int64)
    keep = (0xFF << (8 - bits)) & 0xFF
    return Arguments(
        kind=_KIND_OF[op],
        keep=keep.astype(np.uint8),
        flip=np.where(inverts, 255, 0).astype(np.uint8),
        threshold=np.minimum(threshold, 255).astype(np.uint8),
        brightness=np.where(op == Op.BRIGHTNESS, value, np.float32(1)),
        saturation=np.where(op == Op.COLOR, value, np.float32(1)),
        contrast=np.where(op == Op.CONTRAST, value, np.float32(1)),
        matrix=_matrix(op, value, size),
        kernel=value[:, None, None] * _IDENTITY + (1 - value[:, None, None]) * _SMOOTH,
    )


def _matrix(op: NDArray[np.int32], value: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Rotation about the image's center, shear about its top left corner, or translation, as in PIL."""

    def values(*ops: Op) -> NDArray[np.float64]:
        return np.where(np.isin(op, ops), value, 0).astype(np.float64)

    angle = np.deg2rad(values(Op.ROTATE))
    cos, sin, center = np.cos(angle), np.sin(angle), size / 2
    # A share stored as float32 may fall just short of the whole pixel that it stands for, so round before truncating.
    right, down = (np.trunc(np.round(values(axis) * size, 3)) for axis in (Op.TRANSLATE_X, Op.TRANSLATE_Y))
    matrix = np.empty((len(op), 2, 3), np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 0, 2] = cos, values(Op.SHEAR_X) - sin, center * (1 - cos + sin) - right
    matrix[:, 1, 0], matrix[:, 1, 1], matrix[:, 1, 2] = values(Op.SHEAR_Y) + sin, cos, center * (1 - cos - sin) - down
    return matrix


# ---- the DALI graph: these functions run while DALI builds it. `images` and arguments are nodes, and `if` splits the
# batch. DALI's AutoGraph follows plain functions only.

# The name of DALI's type, and the number of dimensions, per image, of each field of Arguments.
INPUTS: dict[str, tuple[str, int]] = {
    "kind": ("INT32", 0),
    "keep": ("UINT8", 0),
    "flip": ("UINT8", 0),
    "threshold": ("UINT8", 0),
    "brightness": ("FLOAT", 0),
    "saturation": ("FLOAT", 0),
    "contrast": ("FLOAT", 0),
    "matrix": ("FLOAT", 2),
    "kernel": ("FLOAT", 2),
}


def apply(images: Any, a: Arguments, size: int, interp: Any) -> Any:
    """Apply to each image (uint8 HWC, size x size) its own operation. All arguments are CPU nodes, except for the
    kernel, which is on the images' device. interp: DALI's interpolation for warps.

    Each `if` splits the images and every argument that its branches use, so the branches form a tree, not a chain: that
    takes 6 to 12 % less of the whole pipeline's time on a CPU.
    """
    if a.kind < Kind.COLOR.value:
        if a.kind < Kind.EQUALIZE.value:
            if a.kind == Kind.NONE.value:  # noqa: SIM108 (AutoGraph follows statements)
                result = images
            else:  # BITS
                result = (images & a.keep) ^ a.flip
        elif a.kind == Kind.EQUALIZE.value:
            result = fn.equalize(images)
        else:  # WARP
            result = fn.warp_affine(images, matrix=a.matrix, size=[size, size], fill_value=FILL, interp_type=interp)
    elif a.kind < Kind.SHARPNESS.value:
        if a.kind == Kind.COLOR.value:
            result = color(images, a.saturation)
        else:  # CONTRAST
            result = contrast(images, a.contrast, a.brightness)
    elif a.kind == Kind.SOLARIZE.value:
        result = images ^ (a.flip * (images >= a.threshold))
    elif a.kind == Kind.SHARPNESS.value:
        result = fn.filter(images, a.kernel)
    else:  # AUTO_CONTRAST
        result = auto_contrast(images)
    return result


# On a CPU, most of an operation's time is the conversion of floats to bytes, so the CPU forms avoid it; both forms were
# timed. On a GPU, the form with the fewest launches is the fastest.

_INT16_MAX = 32767
_OFFSET = 255  # keeps sums that are not clipped yet from being negative


def color(images: Any, factor: Any) -> Any:
    """Blend with the gray image like PIL's ImageEnhance.Color; factor 0 … 2."""
    if images.device == "gpu":
        return fn.color_twist(images, saturation=factor)
    above_one = fn.cast(factor > 1, dtype=types.FLOAT)
    # The gray term stays uint8. It is negative where the factor is above 1, so it is then shifted up by 255.
    gray = fn.brightness_contrast(_gray(images), brightness=1 - factor, brightness_shift=above_one)
    gray = fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)
    scaled = fn.brightness_contrast(
        images,
        dtype=types.INT16,
        brightness=factor,
        brightness_shift=((1 - above_one) * _OFFSET - 0.5) / _INT16_MAX,  # PIL truncates
    )
    return fn.lookup_table(scaled + gray, keys=_SUMS, values=_CLIPPED, default_value=255, dtype=types.UINT8)


_SUMS = list(range(_OFFSET + 255))
_CLIPPED = [max(0, value - _OFFSET) for value in _SUMS]


def contrast(images: Any, factor: Any, brightness: Any) -> Any:
    """Blend with the mean of the gray image and with black, like PIL's ImageEnhance.Contrast and Brightness."""
    mean = math.floor(fn.reductions.mean(_gray(images), keep_dims=True) + 0.5)
    if images.device == "gpu":
        return fn.cast((mean + (images - mean) * factor) * brightness, dtype=types.UINT8)
    center = fn.reshape(mean, shape=[])
    return fn.brightness_contrast(images, brightness=brightness, contrast=factor, contrast_center=center)


def _gray(images: Any) -> Any:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def auto_contrast(images: Any) -> Any:
    """Stretch each channel to 0 … 255; a channel with a single value does not change."""
    low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    flat = low == high
    # In 256ths, which fit into 16 bits. The casts make DALI compute per-channel values once instead of for each pixel.
    scale = fn.cast(255.0 * 256 / (high - low + flat * 255), dtype=types.UINT16)
    stretched = (images - fn.cast(low * (low != high), dtype=types.UINT8)) * scale
    return fn.lookup_table(stretched, keys=_IN_256THS, values=_ROUNDED, dtype=types.UINT8)


_IN_256THS = list(range(1 << 16))
_ROUNDED = [min(255, (value + 128) // 256) for value in _IN_256THS]
