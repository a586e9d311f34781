"""The confusion matrix, compared with scikit-learn's, its summary and its picture."""

import tracemalloc

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


def images_of(matrix: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions with this confusion matrix."""
    counts = np.array(matrix)
    labels, predicted = (np.repeat(positions.ravel(), counts.ravel()) for positions in np.indices(counts.shape))
    return labels, predicted


def test_summary_lists_the_worst_and_most_confused_classes():
    labels, predicted = images_of([[8, 2, 0], [0, 10, 0], [5, 1, 4]])
    lines = confusion.summary(labels, predicted, ["ape", "bee\x1b", "cat"], most=2).splitlines()
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
    labels = np.repeat(np.arange(4), 5)
    confusion.draw(labels, labels, names, tmp_path / "c.png", "fasttrain")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.info["Software"] == "fasttrain" and picture.width > 300
    with pytest.raises(RunError, match="cannot write"):
        confusion.draw(labels, labels, names, tmp_path / "no" / "c.png", "fasttrain")


def test_summary_without_images_or_mistakes():
    text = confusion.summary(*images_of([[4, 0, 0], [0, 0, 0], [0, 0, 3]]), ["ape", "bee", "cat"])
    assert "bee" not in text and "confused" not in text and "100.00% of 4 right: ape" in text


def test_twenty_thousand_classes_need_memory_for_their_images_only(tmp_path):
    """The matrix would have 3.2 GB."""
    rng, names = np.random.default_rng(0), list(map(str, range(20_000)))
    labels = np.repeat(np.arange(20_000), 2)
    predicted = np.where(rng.random(40_000) < 0.9, labels, labels // 7)
    tracemalloc.start()
    text = confusion.summary(labels, predicted, names)
    confusion.draw(labels, predicted, names, tmp_path / "c.png", "fasttrain")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "worst classes:" in text and "most confused:" in text and peak < 1e9
