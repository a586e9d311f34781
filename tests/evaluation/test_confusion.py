"""The confusion matrix against scikit-learn's, and what is told of it."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from fasttrain.evaluation import confusion
from fasttrain.utils.errors import RunError


def test_the_matrix_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, named = rng.integers(6, size=(2, 500))
    np.testing.assert_array_equal(confusion.matrix(labels, named, 6), confusion_matrix(labels, named, labels=range(6)))


def test_the_worst_and_the_most_confused_are_told():
    counts = np.array([[8, 2, 0], [0, 10, 0], [5, 1, 4]])
    lines = confusion.summary(counts, ["ape", "bee\x1b", "cat"], most=2).splitlines()
    assert lines == [
        "worst classes:",
        "   40.00% of 10 right: cat",
        "   80.00% of 10 right: ape",
        "most confused:",
        "  cat taken for ape: 5 of 10",
        r"  ape taken for bee\x1b: 2 of 10",
    ]


def test_a_picture_is_drawn_of_any_names(tmp_path):
    """As text, not as mathematics, in scripts that the font lacks, and long ones cut in their middle."""
    names = [r"$\frac{$x", "日本", "a" * 30 + "1", "a" * 30 + "2"]
    confusion.draw(np.eye(4, dtype=np.int64) * 5, names, tmp_path / "c.png", "fasttrain")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.info["Software"] == "fasttrain" and picture.width > 300
    with pytest.raises(RunError, match="cannot write"):
        confusion.draw(np.eye(4, dtype=np.int64), names, tmp_path / "no" / "c.png", "fasttrain")


def test_classes_without_images_and_perfect_answers():
    text = confusion.summary(np.array([[4, 0, 0], [0, 0, 0], [0, 0, 3]]), ["ape", "bee", "cat"])
    assert "bee" not in text and "confused" not in text and "100.00% of 4 right: ape" in text
