"""RandAugment's operations, draws and strengths against torchvision's."""

import numpy as np
import pytest
from scipy import stats
from torchvision.transforms import RandAugment

from fasttrain.pipelines import randaugment
from fasttrain.pipelines.operations import Op
from fasttrain.pipelines.philox import uniforms

SIZE = 224
SPACE = RandAugment()._augmentation_space(31, (SIZE, SIZE))
SIGNED = {name for name, (_, signed) in SPACE.items() if signed}
BLENDS = {"Brightness", "Color", "Contrast", "Sharpness"}  # torchvision adds 1 to their magnitudes
NAMES = {
    "Identity": Op.IDENTITY,
    "ShearX": Op.SHEAR_X,
    "ShearY": Op.SHEAR_Y,
    "TranslateX": Op.TRANSLATE_X,
    "TranslateY": Op.TRANSLATE_Y,
    "Rotate": Op.ROTATE,
    "Brightness": Op.BRIGHTNESS,
    "Color": Op.COLOR,
    "Contrast": Op.CONTRAST,
    "Sharpness": Op.SHARPNESS,
    "Posterize": Op.POSTERIZE,
    "Solarize": Op.SOLARIZE,
    "AutoContrast": Op.AUTO_CONTRAST,
    "Equalize": Op.EQUALIZE,
}


def test_operations_equal_torchvisions():
    assert set(NAMES) == set(SPACE) and set(randaugment.OPERATIONS) == set(NAMES.values())
    assert len(randaugment.OPERATIONS) == 14


@pytest.mark.parametrize("name", NAMES)
def test_strengths_equal_torchvisions(name):
    magnitudes = SPACE[name][0].expand(31).tolist()
    for magnitude, theirs in enumerate(magnitudes):
        for sign in (-1, 1):
            expected = theirs * (sign if name in SIGNED else 1)
            if name.startswith("Translate"):
                expected /= SIZE
            found = randaugment.strength(NAMES[name], magnitude, sign)
            assert found == pytest.approx(expected + (name in BLENDS), abs=3e-5)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_slot_draws_all_operations_equally_often(slots):
    """Chi-squared over operations and signs of each slot, and over pairs of neighboring slots."""
    count = 100_000
    u = uniforms(5, 1, 0, np.arange(count), randaugment.draws(slots))
    op, value = randaugment.choose(u, slots, 9)
    assert op.shape == value.shape == (count, slots) and op.dtype == np.int32 and value.dtype == np.float32
    for slot in range(slots):
        kinds, counts = np.unique(np.stack([op[:, slot], value[:, slot]]), axis=1, return_counts=True)
        expected = [count / 14 / (2 if kind in [NAMES[name] for name in SIGNED] else 1) for kind in kinds[0]]
        assert len(counts) == 14 + len(SIGNED) and stats.chisquare(counts, expected).pvalue > 1e-4
    for slot in range(slots - 1):
        pairs = np.unique(op[:, slot] * 100 + op[:, slot + 1], return_counts=True)[1]
        assert len(pairs) == 14 * 14 and stats.chisquare(pairs).pvalue > 1e-4


def test_drawn_operations_have_the_magnitudes_strengths():
    u = uniforms(5, 1, 0, np.arange(2000), randaugment.draws(2))
    for magnitude in (0, 9, 30):
        op, value = randaugment.choose(u, 2, magnitude)
        for name, named_op in NAMES.items():
            theirs = float(SPACE[name][0].expand(31)[magnitude])
            signs = (-1, 1) if name in SIGNED else (1,)
            expected = {theirs * sign / (SIZE if name.startswith("Translate") else 1) for sign in signs}
            found = np.unique(value[op == named_op]) - (name in BLENDS)
            assert found == pytest.approx(sorted(expected), abs=3e-5)
