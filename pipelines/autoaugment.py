"""AutoAugment's ImageNet policy (Cubuk et al. 2019): its table, and the choice of operations for each image.

The plan chooses in numpy; `operations` applies the operations."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.pipelines.operations import Op

# Two (operation, probability, magnitude bin 0 … 9) per entry, in the order of the paper's table.
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
# The DeepBlueAI report names 24 policies: a popular implementation of the time lacked the table's last entry.
POLICIES = {"imagenet": POLICY, "imagenet-24": POLICY[:24]}

DRAWS = 5  # uniforms per image: 1 for the sub-policy, 2 for whether each operation applies, 2 for their signs
MAX_BIN = 9


def strength(op: Op, bin_: int, sign: int) -> float:
    """The strength of a magnitude bin, as `operations.arguments` takes it; 0 for operations without one."""
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
        case Op.IDENTITY | Op.INVERT | Op.EQUALIZE | Op.AUTO_CONTRAST:
            return 0.0
    raise ValueError(f"AutoAugment has no strength for {op.name}")


class _Table(NamedTuple):
    ops: NDArray[np.int32]  # [entries, 2]
    probabilities: NDArray[np.float64]  # [entries, 2]
    strengths: NDArray[np.float32]  # [entries, 2, 2]: with a minus sign, with a plus sign


_TABLES = {
    name: _Table(
        np.array([[op for op, _, _ in entry] for entry in entries], np.int32),
        np.array([[p for _, p, _ in entry] for entry in entries]),
        np.array([[[strength(op, m, s) for s in (-1, 1)] for op, _, m in entry] for entry in entries], np.float32),
    )
    for name, entries in POLICIES.items()
}


def choose(u: NDArray[np.float64], policy: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Operation ids int32 [n, 2] and strengths float32 [n, 2] (see `strength`), in the order in which they apply.

    u: uniforms [DRAWS, n]. The id of an operation that is not drawn is Op.IDENTITY.
    """
    table = _TABLES[policy]
    entry = (u[0] * len(table.ops)).astype(np.int64)
    applies = u[1:3].T < table.probabilities[entry]
    op = np.where(applies, table.ops[entry], np.int32(0))
    sign = (u[3:5].T >= 0.5).astype(np.int64)
    return op, table.strengths[entry[:, None], np.arange(2), sign]
