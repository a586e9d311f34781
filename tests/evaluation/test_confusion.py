"""The confusion matrix, compared with scikit-learn's, its summary and its picture."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from fasttrain.evaluation import confusion
from fasttrain.utils.errors import RunError


def test_matrix_equals_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(6, size=(2, 500))
    np.testing.assert_array_equal(
        confusion.matrix(labels, predicted, 6), confusion_matrix(labels, predicted, labels=range(6))
    )


def test_summary_lists_the_worst_and_most_confused_classes():
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


def test_draw_takes_any_class_names(tmp_path):
    """Names with math markup, in scripts that the font lacks, and long names, which are shortened in the middle."""
    names = [r"$\frac{$x", "日本", "a" * 30 + "1", "a" * 30 + "2"]
    confusion.draw(np.eye(4, dtype=np.int64) * 5, names, tmp_path / "c.png", "fasttrain")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.info["Software"] == "fasttrain" and picture.width > 300
    with pytest.raises(RunError, match="cannot write"):
        confusion.draw(np.eye(4, dtype=np.int64), names, tmp_path / "no" / "c.png", "fasttrain")


def test_summary_without_images_or_mistakes():
    text = confusion.summary(np.array([[4, 0, 0], [0, 0, 0], [0, 0, 3]]), ["ape", "bee", "cat"])
    assert "bee" not in text and "confused" not in text and "100.00% of 4 right: ape" in text
