"""AutoAugment's policy against torchvision's copy of the paper's table."""

import numpy as np
import pytest
from scipy import stats
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from fasttrain.pipelines import autoaugment as aa
from fasttrain.pipelines.operations import Op
from fasttrain.pipelines.philox import uniforms

SIZE = 224
_OPS = {
    "Posterize": Op.POSTERIZE,
    "Solarize": Op.SOLARIZE,
    "Invert": Op.INVERT,
    "Equalize": Op.EQUALIZE,
    "AutoContrast": Op.AUTO_CONTRAST,
    "Rotate": Op.ROTATE,
    "ShearX": Op.SHEAR_X,
    "Color": Op.COLOR,
    "Contrast": Op.CONTRAST,
    "Sharpness": Op.SHARPNESS,
}
_WITHOUT_MAGNITUDE = (Op.INVERT, Op.EQUALIZE, Op.AUTO_CONTRAST)


def test_policy_equals_the_papers():
    theirs = AutoAugment(AutoAugmentPolicy.IMAGENET).policies
    assert len(aa.POLICY) == len(theirs) == 25
    for ours, entry in zip(aa.POLICY, theirs, strict=True):
        for (op, probability, bin_), (name, their_probability, their_bin) in zip(ours, entry, strict=True):
            assert op == _OPS[name] and probability == their_probability
            assert op in _WITHOUT_MAGNITUDE or bin_ == their_bin


def test_magnitudes_equal_torchvisions():
    space = AutoAugment(AutoAugmentPolicy.IMAGENET)._augmentation_space(10, (SIZE, SIZE))
    for bin_ in range(10):
        for sign in (-1, 1):
            for name in ("Rotate", "ShearX"):
                expected = sign * float(space[name][0][bin_])
                assert aa.strength(_OPS[name], bin_, sign) == pytest.approx(expected, abs=1e-5)
            for name in ("Color", "Contrast", "Sharpness"):
                expected = 1 + sign * float(space[name][0][bin_])
                assert aa.strength(_OPS[name], bin_, sign) == pytest.approx(expected, abs=1e-6)
        assert aa.strength(Op.POSTERIZE, bin_, 1) == float(space["Posterize"][0][bin_])
    # torchvision's solarize threshold goes from 255 to 0, the paper's from 256.
    assert [aa.strength(Op.SOLARIZE, bin_, 1) for bin_ in (0, 9)] == [256, 0]
    assert [aa.strength(Op.POSTERIZE, bin_, 1) for bin_ in (5, 6, 7, 8)] == [6, 5, 5, 4]


@pytest.mark.parametrize("policy", ["imagenet", "imagenet-24"])
def test_operations_have_the_tables_frequencies(policy):
    """Chi-squared over all (first, second) pairs of operations, identity included, and over signs."""
    count = 200_000
    op, value = aa.choose(uniforms(9, 1, 0, np.arange(count), aa.DRAWS), policy)
    entries = aa.POLICIES[policy]
    expected = np.zeros((len(Op), len(Op)))
    for (op1, p1, _), (op2, p2, _) in entries:
        for first, share1 in ((op1, p1), (Op.IDENTITY, 1 - p1)):
            for second, share2 in ((op2, p2), (Op.IDENTITY, 1 - p2)):
                expected[first, second] += share1 * share2 / len(entries)
    counts = np.zeros_like(expected)
    np.add.at(counts, (op[:, 0], op[:, 1]), 1)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible] * count).pvalue > 1e-4
    angles = value[op == Op.ROTATE]
    assert stats.binomtest(int((angles > 0).sum()), int((angles != 0).sum())).pvalue > 1e-4
    assert np.unique(abs(angles[angles != 0])) == pytest.approx([10, 30 * 8 / 9, 30])
