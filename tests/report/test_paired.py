"""Paired differences, against scipy and against resampling images one by one."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score

from fasttrain.report.paired import accuracy_difference, balanced_difference, mcnemar, mean_difference


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 7), (3, 3), (12, 28), (41, 12), (700, 640), (3000, 2700)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_images(b, c):
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(1)
    labels = np.sort(rng.choice(5, 400, p=[0.4, 0.3, 0.2, 0.07, 0.03]))
    first = rng.random(400) < 0.6
    second = np.where(rng.random(400) < 0.7, first, rng.random(400) < 0.75)
    return first, second, labels


def naive(statistic, count, times=4000):
    rng = np.random.default_rng(2)
    values = [statistic(rng.integers(0, count, count)) for _ in range(times)]
    return np.percentile(values, [2.5, 97.5])


def test_the_intervals_are_those_of_resampled_images(answers):
    first, second, labels = answers
    found = accuracy_difference(first, second)
    assert found.value == pytest.approx(second.mean() - first.mean(), abs=1e-12)
    expected = naive(lambda rows: second[rows].mean() - first[rows].mean(), 400)
    np.testing.assert_allclose(found[1:], expected, atol=0.006)
    assert found == accuracy_difference(first, second)  # seeded

    def recall(right, rows):
        return balanced_accuracy_score(labels[rows], np.where(right, labels, -1)[rows])

    balanced = balanced_difference(first, second, labels)
    every = np.arange(400)
    with pytest.warns(UserWarning):  # scikit-learn's, about answers of no class
        assert balanced.value == pytest.approx(recall(second, every) - recall(first, every), abs=1e-12)

    def mean_recall(right, rows):
        return np.mean([right[rows][labels[rows] == label].mean() for label in np.unique(labels[rows])])

    expected = naive(lambda rows: mean_recall(second, rows) - mean_recall(first, rows), 400, 2000)
    np.testing.assert_allclose(balanced[1:], expected, atol=0.012)


def test_the_mean_difference_has_a_normal_interval():
    rng = np.random.default_rng(3)
    first, second = rng.exponential(size=(2, 500))
    found = mean_difference(first, second)
    expected = naive(lambda rows: (second - first)[rows].mean(), 500)
    np.testing.assert_allclose(found[1:], expected, atol=0.01)
    assert found.value == pytest.approx((second - first).mean())
