"""Operations on images, of AutoAugment's kind: what each does, and the DALI graph of one operation an image.

An operation and its strength are chosen by the plan, in numpy; DALI only carries them out. Several operations share
one branch of the graph (see `Kind`), because branches are what costs on a GPU and warps are what costs on a CPU.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, types

FILL = 128  # grey, where a warp looks outside the image


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
    """A branch of the DALI graph. BITS is posterize and invert, WARP all that moves pixels, CONTRAST also
    brightness."""

    NONE = 0
    BITS = 1
    EQUALIZE = 2
    WARP = 3
    COLOR = 4
    CONTRAST = 5
    SHARPNESS = 6
    AUTO_CONTRAST = 7
    SOLARIZE = 8


_KIND_OF = np.zeros(len(Op), np.int32)
for _op, _kind in (
    (Op.POSTERIZE, Kind.BITS),
    (Op.SOLARIZE, Kind.SOLARIZE),
    (Op.INVERT, Kind.BITS),
    (Op.EQUALIZE, Kind.EQUALIZE),
    (Op.AUTO_CONTRAST, Kind.AUTO_CONTRAST),
    (Op.ROTATE, Kind.WARP),
    (Op.SHEAR_X, Kind.WARP),
    (Op.SHEAR_Y, Kind.WARP),
    (Op.TRANSLATE_X, Kind.WARP),
    (Op.TRANSLATE_Y, Kind.WARP),
    (Op.COLOR, Kind.COLOR),
    (Op.BRIGHTNESS, Kind.CONTRAST),
    (Op.CONTRAST, Kind.CONTRAST),
    (Op.SHARPNESS, Kind.SHARPNESS),
):
    _KIND_OF[_op] = _kind


class Arguments(NamedTuple):
    """What one operation's branch needs, for n images. DALI gets these arrays, or in a graph their nodes."""

    kind: Any  # int32 [n]
    keep: Any  # uint8 [n]: bits kept; all of them but for posterize
    flip: Any  # uint8 [n]: bits inverted; of solarize at and above the threshold
    threshold: Any  # uint8 [n]
    brightness: Any  # float32 [n]: blend factor with black
    saturation: Any  # float32 [n]: blend factor with grey
    contrast: Any  # float32 [n]: blend factor with the mean grey
    matrix: Any  # float32 [n, 2, 3]: target to source coordinates, pixel corners at whole numbers
    kernel: Any  # float32 [n, 3, 3]: sharpness as one filter


DTYPES = Arguments(types.INT32, types.UINT8, types.UINT8, types.UINT8, *(5 * [types.FLOAT]))
NDIMS = Arguments(0, 0, 0, 0, 0, 0, 0, 2, 2)

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
_IDENTITY = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


def arguments(op: NDArray[np.int32], value: NDArray[np.float32], size: int) -> Arguments:
    """Arguments of one operation an image for n images of size x size pixels; op int32 [n], value float32 [n].

    What a value means: bits kept (posterize), threshold (solarize), degrees counter-clockwise (rotate), source pixels
    a row or column (shear), share of the side by which the image moves right or down, cut to whole pixels (translate),
    blend factor with 1 the identity (colour, contrast, sharpness, brightness). Elsewhere it has none.
    """
    # i < threshold stays, and i is whole, so the next whole number is the same threshold; 256 is none.
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
    """Rotation about the image's centre, shear about its top left corner or translation, as PIL has them."""

    def of(*ops: Op) -> NDArray[np.float64]:
        return np.where(np.isin(op, ops), value, 0).astype(np.float64)

    angle = np.deg2rad(of(Op.ROTATE))
    cos, sin, centre = np.cos(angle), np.sin(angle), size / 2
    # A float32's share of the side may fall just short of a whole pixel that it stands for.
    right, down = (np.trunc(np.round(of(each) * size, 3)) for each in (Op.TRANSLATE_X, Op.TRANSLATE_Y))
    matrix = np.empty((len(op), 2, 3), np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 0, 2] = cos, of(Op.SHEAR_X) - sin, centre * (1 - cos + sin) - right
    matrix[:, 1, 0], matrix[:, 1, 1], matrix[:, 1, 2] = of(Op.SHEAR_Y) + sin, cos, centre * (1 - cos - sin) - down
    return matrix


# What follows runs while DALI builds a graph: `images` and the arguments are nodes, and `if` splits the batch.
# DALI's AutoGraph follows plain functions only.


def apply(images: Any, a: Arguments, size: int, interp: types.DALIInterpType = types.INTERP_NN) -> Any:
    """Each image (uint8 HWC, size x size) through its own operation. All arguments are CPU nodes but the kernel,
    which lives where the images do. interp: DALI's interpolation of warps."""
    if a.kind == 0:
        result = images
    elif a.kind == 1:
        result = (images & a.keep) ^ a.flip
    elif a.kind == 2:
        result = fn.equalize(images)
    elif a.kind == 3:
        result = fn.warp_affine(images, matrix=a.matrix, size=[size, size], fill_value=FILL, interp_type=interp)
    elif a.kind == 4:
        result = color(images, a.saturation)
    elif a.kind == 5:
        result = contrast(images, a.contrast, a.brightness)
    elif a.kind == 6:
        result = fn.filter(images, a.kernel)
    elif a.kind == 7:
        result = auto_contrast(images)
    else:
        result = images ^ (a.flip * (images >= a.threshold))
    return result


# On a CPU what turns numbers with a fraction into bytes is most of an operation's time, so the forms for a CPU have
# none; each was timed beside the other. On a GPU the fewest launches count.

_INT16_MAX = 32767
_LIFT = 255  # keeps sums that are not clipped yet from being negative


def color(images: Any, factor: Any) -> Any:
    """Blend with the grey image, as PIL's ImageEnhance.Color does; factor 0 … 2."""
    if images.device == "gpu":
        return fn.color_twist(images, saturation=factor)
    beyond = fn.cast(factor > 1, dtype=types.FLOAT)
    # Both terms are bytes long: the grey one, negative where the factor is above 1, is then lifted.
    grey = fn.brightness_contrast(_grey(images), brightness=1 - factor, brightness_shift=beyond)
    grey = fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
    own = fn.brightness_contrast(
        images,
        dtype=types.INT16,
        brightness=factor,
        brightness_shift=((1 - beyond) * _LIFT - 0.5) / _INT16_MAX,  # PIL cuts fractions off
    )
    return fn.lookup_table(own + grey, keys=_SUMS, values=_CLIPPED, default_value=255, dtype=types.UINT8)


_SUMS = list(range(_LIFT + 255))
_CLIPPED = [max(0, each - _LIFT) for each in _SUMS]


def contrast(images: Any, factor: Any, brightness: Any) -> Any:
    """Blend with the mean of the grey image and with black, as PIL's ImageEnhance.Contrast and Brightness do."""
    mean = math.floor(fn.reductions.mean(_grey(images), keep_dims=True) + 0.5)
    if images.device == "gpu":
        return fn.cast((mean + (images - mean) * factor) * brightness, dtype=types.UINT8)
    center = fn.reshape(mean, shape=[])
    return fn.brightness_contrast(images, brightness=brightness, contrast=factor, contrast_center=center)


def _grey(images: Any) -> Any:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def auto_contrast(images: Any) -> Any:
    """Stretch each channel to 0 … 255; a channel of one value stays as it is."""
    low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    flat = low == high
    # In 256ths, which fit 16 bits. The casts keep what there is once a channel from being worked out for each pixel.
    scale = fn.cast(255.0 * 256 / (high - low + flat * 255), dtype=types.UINT16)
    stretched = (images - fn.cast(low * (low != high), dtype=types.UINT8)) * scale
    return fn.lookup_table(stretched, keys=_IN_256THS, values=_ROUNDED, dtype=types.UINT8)


_IN_256THS = list(range(1 << 16))
_ROUNDED = [min(255, (each + 128) // 256) for each in _IN_256THS]
