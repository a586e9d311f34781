"""Several models' probabilities as one: their mean, a weighted mean, or greedy weights fitted on validation images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fasttrain.evaluation import predictions
from fasttrain.evaluation.predictions import Predictions
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

_ROWS = 2048  # fused at once, so that memory stays that of the members
GREEDY_ROUNDS = 50


def load_alike(paths: Sequence[Path]) -> list[Predictions]:
    """Read members; UserError that names the first difference unless all have the same ids, classes (both in the same
    order) and labels."""
    members = [predictions.load(path, per_size=False) for path in paths]
    for path, member in zip(paths[1:], members[1:], strict=True):
        for what in ("ids", "classes", "labels"):
            ours, theirs = getattr(members[0], what), getattr(member, what)
            if ours is None or theirs is None:
                if (ours is None) != (theirs is None):
                    without = paths[0] if ours is None else path
                    raise UserError(
                        f"{printable(without)} has no labels, and the others do; make all of them the same way"
                    )
                continue
            common = min(len(ours), len(theirs))
            other = np.flatnonzero(ours[:common] != theirs[:common])
            if len(other) or len(ours) != len(theirs):
                at = int(other[0]) if len(other) else common
                image = f" ({printable(members[0].ids[at])})" if what == "labels" else ""
                raise UserError(
                    f"{what} differ: number {at}{image} is {_told(theirs, at)} in {printable(path)} and "
                    f"{_told(ours, at)} in {printable(paths[0])}; all members must be of the same images and classes, "
                    "in the same order"
                )
    return members


def _told(values: NDArray, at: int) -> str:
    if at >= len(values):
        return "not there"
    return repr(printable(values[at])) if values.dtype.kind == "U" else str(values[at])


def fuse(members: Sequence[NDArray[np.float32]], weights: Sequence[float] | None = None) -> NDArray[np.float32]:
    """The weighted mean of probabilities [N, K] each (the plain one without weights), float32 [N, K].

    The order of the members makes no difference, not even in the last bit.
    """
    shares = [1.0] * len(members) if weights is None else list(weights)
    whole = math.fsum(shares)
    shares = [each / whole for each in shares]
    fused = np.empty_like(members[0])
    for start in range(0, len(fused), _ROWS):
        rows = slice(start, start + _ROWS)
        terms = np.stack(
            [share * member[rows].astype(np.float64) for share, member in zip(shares, members, strict=True)]
        )
        fused[rows] = np.sort(terms, axis=0).sum(0)
    return fused


def greedy_weights(members: Sequence[NDArray[np.float32]], labels: NDArray[np.int64]) -> list[float]:
    """Weights that sum to 1, by greedy selection with replacement for the best top-1 (Caruana et al. 2004).

    Each of GREEDY_ROUNDS rounds adds the member that helps most (of equals, the one that gives the labels the higher
    mean log probability); the weights are the counts of the best round, the first of equals.
    """
    counts = np.zeros(len(members), np.int64)
    total = np.zeros(members[0].shape, np.float64)
    at = np.arange(len(labels))
    best, best_counts = (-1.0, -np.inf), counts.copy()
    for _ in range(GREEDY_ROUNDS):
        found = []
        for member in members:
            tried = total + member
            likelihood = np.log(np.maximum(tried[at, labels] / (counts.sum() + 1), 1e-30)).mean()
            found.append((float((tried.argmax(1) == labels).mean()), float(likelihood)))
        chosen = max(range(len(members)), key=lambda number: found[number])
        counts[chosen] += 1
        total += members[chosen]
        if found[chosen][0] > best[0]:
            best, best_counts = found[chosen], counts.copy()
    return [float(count / best_counts.sum()) for count in best_counts]


def agreement(members: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """[M, M]: the share of images for which two members name the same class."""
    named = np.stack([member.argmax(1) for member in members])
    return (named[:, None] == named[None]).mean(2)
