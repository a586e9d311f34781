"""Differences between two networks' answers to the same images, with intervals."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 20_000
_CELLS = 1 << 22  # counts that are drawn at once


class Difference(NamedTuple):
    """A difference, and its interval of 95 %."""

    value: float
    low: float
    high: float


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: the probability of images that only one of the networks answers right to be
    divided at least so unequally, if either were as likely."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    ways = total = 1
    for k in range(fewer):  # integers of any length, so that the sum is exact
        ways = ways * (discordant - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**discordant)


def accuracy_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """The second network's accuracy minus the first's, with a paired bootstrap over images.

    first, second: which answers are right, bool [N]. A resample of the images is drawn as the number of images of each
    kind (better, alike, worse), whose distribution is multinomial. The interval is between the 2.5 % and 97.5 %
    quantiles.
    """
    changes = second.astype(np.int64) - first
    count = len(changes)
    kinds = np.array([(changes == kind).sum() for kind in (-1, 0, 1)])
    drawn = np.random.default_rng(seed).multinomial(count, kinds / count, size=resamples)
    return _interval(float(changes.mean()), (drawn[:, 2] - drawn[:, 0]) / count)


def balanced_difference(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    labels: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of the mean recalls of the classes that have images; like `accuracy_difference`, of counts of each
    kind and class. labels: int64 [N]."""
    _, classes = np.unique(labels, return_inverse=True)
    changes = second.astype(np.int64) - first
    total = int(classes.max()) + 1
    kinds = np.bincount(classes * 3 + changes + 1, minlength=total * 3)
    shares, rng = kinds / len(labels), np.random.default_rng(seed)

    def means(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        of_classes = counts.reshape(len(counts), total, 3)
        images = of_classes.sum(2)
        recall = (of_classes[:, :, 2] - of_classes[:, :, 0]) / np.maximum(images, 1)
        return recall.sum(1) / (images > 0).sum(1)

    at_once = max(1, _CELLS // len(kinds))
    parts = [
        means(rng.multinomial(len(labels), shares, size=min(at_once, resamples - start)))
        for start in range(0, resamples, at_once)
    ]
    return _interval(float(means(kinds[None])[0]), np.concatenate(parts))


def mean_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """The mean of the images' differences, with the interval of a normal distribution: for values of each image, such
    as its negative log probability."""
    changes = second - first
    value = float(changes.mean())
    half = 1.959964 * float(changes.std(ddof=1)) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
    return Difference(value, value - half, value + half)


def _interval(value: float, drawn: NDArray[np.float64]) -> Difference:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Difference(value, float(low), float(high))
