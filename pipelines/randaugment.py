"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) with torchvision's operations: the choice for each image.

The plan chooses in numpy; `operations` applies the operations."""

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
    """The strength of a magnitude 0 … 30, as `operations.arguments` takes it; 0 for operations without one."""
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
        case Op.IDENTITY | Op.EQUALIZE | Op.AUTO_CONTRAST:
            return 0.0
    raise ValueError(f"RandAugment has no strength for {op.name}")


class _Table(NamedTuple):
    ops: NDArray[np.int32]  # [14]
    strengths: NDArray[np.float32]  # [14, 2]: with a minus sign, with a plus sign


@functools.cache
def _table(magnitude: int) -> _Table:
    strengths = [[strength(op, magnitude, sign) for sign in (-1, 1)] for op in OPERATIONS]
    return _Table(np.array(OPERATIONS, np.int32), np.array(strengths, np.float32))


def draws(slots: int) -> int:
    """How many uniforms `choose` takes per image: one for each slot's operation, one for its sign."""
    return 2 * slots


def choose(u: NDArray[np.float64], slots: int, magnitude: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Operation ids int32 [n, slots] and strengths float32 [n, slots] (see `strength`), in the order in which they
    apply. u: uniforms [draws(slots), n]. magnitude: 0 … 30, the same for all operations."""
    table = _table(magnitude)
    entry = (u[:slots].T * len(OPERATIONS)).astype(np.int64)
    sign = (u[slots:].T >= 0.5).astype(np.int64)
    return table.ops[entry], table.strengths[entry, sign]
