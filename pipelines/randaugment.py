"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) over torchvision's operations: what it chooses for an image. The
plan chooses, in numpy; `operations` carries it out."""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.pipelines.operations import Op

OPERATIONS = (
    Op.IDENTITY,
    Op.SHEAR_X,
    Op.SHEAR_Y,
    Op.TRANSLATE_X,
    Op.TRANSLATE_Y,
    Op.ROTATE,
    Op.BRIGHTNESS,
    Op.COLOR,
    Op.CONTRAST,
    Op.SHARPNESS,
    Op.POSTERIZE,
    Op.SOLARIZE,
    Op.AUTO_CONTRAST,
    Op.EQUALIZE,
)
MAX_MAGNITUDE = 30


def strength(op: Op, magnitude: int, sign: int) -> float:
    """What a magnitude 0 … 30 stands for, as `operations.arguments` takes it; 0 where an operation has none."""
    share = magnitude / MAX_MAGNITUDE
    match op:
        case Op.SHEAR_X | Op.SHEAR_Y:
            return sign * 0.3 * share
        case Op.TRANSLATE_X | Op.TRANSLATE_Y:
            return sign * 150 / 331 * share
        case Op.ROTATE:
            return sign * 30 * share
        case Op.BRIGHTNESS | Op.COLOR | Op.CONTRAST | Op.SHARPNESS:
            return 1 + sign * 0.9 * share
        case Op.POSTERIZE:
            return 8 - round(4 * share)
        case Op.SOLARIZE:
            return 255 - 255 * share
    return 0.0


class _Table(NamedTuple):
    ops: NDArray[np.int32]  # [14]
    strengths: NDArray[np.float32]  # [14, 2]: with the minus sign, with the plus


@functools.cache
def _table(magnitude: int) -> _Table:
    strengths = [[strength(op, magnitude, sign) for sign in (-1, 1)] for op in OPERATIONS]
    return _Table(np.array(OPERATIONS, np.int32), np.array(strengths, np.float32))


def draws(slots: int) -> int:
    """Uniforms that `choose` takes for an image: which operation each slot holds, the sign of each."""
    return 2 * slots


def choose(u: NDArray[np.float64], slots: int, magnitude: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Operation ids int32 [n, slots] and strengths float32 [n, slots] (see `strength`) from uniforms
    [draws(slots), n], in the order in which they apply. magnitude: 0 … 30, the same for all."""
    table = _table(magnitude)
    which = (u[:slots].T * len(OPERATIONS)).astype(np.int64)
    sign = (u[slots:].T >= 0.5).astype(np.int64)
    return table.ops[which], table.strengths[which, sign]
