"""What probabilities of labeled images say about a network: classes, calibration, confusions, mistakes, doubts."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.evaluation.metrics import BINS


class Reliability(NamedTuple):
    """The images by their confidence, in BINS bins of equal width, which include their upper ends: the number of
    images, the mean confidence and the share of right answers of each; NaN without images. error: the expected
    calibration error, as in `evaluation.metrics`."""

    images: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    error: float


class Pair(NamedTuple):
    """`images`: the numbers of the images of class `label` that are taken for class `answer`, the surest first."""

    label: int
    answer: int
    images: list[int]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """labels, answers: int64 [N]. confidence: float64 [N], of the answers. margin: float64 [N], by which the answer's
    probability is above the second one's. pairs: the most confused ones. mistakes: numbers of wrong images, the surest
    first. uncertain: numbers of images, the smallest margin first."""

    labels: NDArray[np.int64]
    answers: NDArray[np.int64]
    seconds: NDArray[np.int64]
    confidence: NDArray[np.float64]
    margin: NDArray[np.float64]
    reliability: Reliability
    pairs: list[Pair]
    mistakes: list[int]
    uncertain: list[int]


def diagnose(probs: NDArray[np.float32], labels: NDArray[np.int64], *, pairs: int, images: int) -> Diagnosis:
    """The diagnosis of probabilities [N, K] for labels, int64 [N]. pairs, images: the length of the lists, at most."""
    rows = np.arange(len(labels))
    answers = probs.argmax(1)
    first = probs[rows, answers].astype(np.float64)
    others = probs.copy()
    others[rows, answers] = -1
    seconds = others.argmax(1)
    margin = first - np.maximum(others[rows, seconds].astype(np.float64), 0)
    wrong = np.flatnonzero(answers != labels)
    surest = wrong[np.argsort(-first[wrong], kind="stable")]
    return Diagnosis(
        labels,
        answers,
        seconds,
        first,
        margin,
        reliability(first, answers == labels),
        confused(labels, answers, surest, probs.shape[1])[:pairs],
        surest[:images].tolist(),
        np.argsort(margin, kind="stable")[:images].tolist(),
    )


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Reliability:
    """The images' answers by their confidence, float64 [N]. right: bool [N]."""
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    count, rights, sums = (
        np.bincount(bins, weights=weights, minlength=BINS) for weights in (None, right, np.minimum(confidence, 1))
    )
    with np.errstate(invalid="ignore"):
        mean, accuracy = sums / count, rights / count
    return Reliability(count.astype(np.int64), mean, accuracy, float(np.abs(sums - rights).sum() / len(right)))


def confused(
    labels: NDArray[np.int64], answers: NDArray[np.int64], wrong: NDArray[np.int64], classes: int
) -> list[Pair]:
    """The pairs of classes that are taken for each other, the most frequent first. wrong: the numbers of the images
    with wrong answers, in the order that a pair's images have."""
    by_pair: dict[int, list[int]] = {}
    for number, pair in zip(wrong.tolist(), (labels[wrong] * classes + answers[wrong]).tolist(), strict=True):
        by_pair.setdefault(pair, []).append(number)
    order = sorted(by_pair, key=lambda pair: (-len(by_pair[pair]), pair))
    return [Pair(*divmod(pair, classes), by_pair[pair]) for pair in order]
