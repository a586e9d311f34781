"""Figures about answers, against scikit-learn and loops."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from fasttrain.evaluation import metrics
from fasttrain.report.diagnosis import diagnose


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 900)
    logits = rng.normal(size=(900, 7)) * 2
    logits[np.arange(900), labels] += 1.5
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs.astype(np.float32), labels


def test_reliability_matches_scikit_learn_and_the_logged_error(answers):
    probs, labels = answers
    found = diagnose(probs, labels, pairs=5, images=5)
    right = found.answers == labels
    accuracy, confidence = calibration_curve(right, probs.max(1).astype(float), n_bins=metrics.BINS)
    used = found.reliability.images > 0
    np.testing.assert_allclose(found.reliability.accuracy[used], accuracy, rtol=1e-12)
    np.testing.assert_allclose(found.reliability.confidence[used], confidence, rtol=1e-12)
    assert found.reliability.images.sum() == 900
    expected = metrics.scores(probs, labels).calibration_error
    assert found.reliability.error == pytest.approx(expected, abs=1e-8)


def test_pairs_are_those_of_the_confusion_matrix_with_the_surest_images_first(answers):
    probs, labels = answers
    found = diagnose(probs, labels, pairs=100, images=5)
    matrix = confusion_matrix(labels, probs.argmax(1), labels=range(7))
    np.fill_diagonal(matrix, 0)
    counts = np.zeros_like(matrix)
    for pair in found.pairs:
        counts[pair.label, pair.answer] = len(pair.images)
        assert all(labels[n] == pair.label and probs[n].argmax() == pair.answer for n in pair.images)
        sure = [probs[n].max() for n in pair.images]
        assert sure == sorted(sure, reverse=True)
    np.testing.assert_array_equal(counts, matrix)
    assert [len(pair.images) for pair in found.pairs] == sorted(matrix[matrix > 0], reverse=True)


def test_mistakes_and_uncertain_images(answers):
    probs, labels = answers
    found = diagnose(probs, labels, pairs=1, images=9)
    wrong = [n for n in range(900) if probs[n].argmax() != labels[n]]
    assert found.mistakes == sorted(wrong, key=lambda n: -probs[n].max())[:9]
    ranked = np.sort(probs.astype(float), 1)
    assert found.uncertain == np.argsort(ranked[:, -1] - ranked[:, -2], kind="stable")[:9].tolist()
    assert len(found.pairs) == 1


def test_perfect_answers_have_no_mistakes():
    found = diagnose(np.eye(3, dtype=np.float32), np.arange(3), pairs=5, images=5)
    assert found.pairs == [] and found.mistakes == [] and found.reliability.error == 0
    assert found.reliability.images.tolist() == [0] * (metrics.BINS - 1) + [3]
