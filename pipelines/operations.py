"""Operations on images, of AutoAugment's kind, and the arguments by which a DALI graph does one operation per image.

The plan chooses each operation and its strength, in numpy; DALI only carries them out (`operation_graph`). Several
operations share one branch of the graph (see `Kind`), because branches are what costs on a GPU and warps are what
costs on a CPU.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
