"""Averages several models' probabilities, with equal, given or greedy weights, the last fitted on labeled images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fasttrain.evaluation import predictions
from fasttrain.evaluation.predictions import Predictions
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

_ROWS = 2048  # averaged at once, so that the float64 copies stay small
GREEDY_ROUNDS = 50


def load_members(paths: Sequence[Path]) -> list[Predictions]:
    """Read the members' files. Raises UserError, which names the first difference, unless all have the same ids,
    classes (both in the same order) and labels."""
    members = [predictions.load(path, per_size=False) for path in paths]
    for path, member in zip(paths[1:], members[1:], strict=True):
        for field in ("ids", "classes", "labels"):
            ours, theirs = getattr(members[0], field), getattr(member, field)
            if ours is None or theirs is None:
                if (ours is None) != (theirs is None):
                    without = paths[0] if ours is None else path
                    raise UserError(
                        f"{printable(without)} has no labels, but the others do; make all files with the same command"
                    )
                continue
            common = min(len(ours), len(theirs))
            different = np.flatnonzero(ours[:common] != theirs[:common])
            if len(different) or len(ours) != len(theirs):
                row = int(different[0]) if len(different) else common
                image = f" ({printable(members[0].ids[row])})" if field == "labels" else ""
                raise UserError(
                    f"{field} differ: number {row}{image} is {_describe(theirs, row)} in {printable(path)} and "
                    f"{_describe(ours, row)} in {printable(paths[0])}; all files must have the same images and "
                    "classes, in the same order"
                )
    return members


def _describe(values: NDArray, row: int) -> str:
    if row >= len(values):
        return "missing"
    return repr(printable(values[row])) if values.dtype.kind == "U" else str(values[row])


def fuse(members: Sequence[NDArray[np.float32]], weights: Sequence[float] | None = None) -> NDArray[np.float32]:
    """The mean of the members' probabilities, float32 [N, K] like each of them; with weights, the weighted mean.

    The result is bitwise the same in any order of the members.
    """
    shares = [1.0] * len(members) if weights is None else list(weights)
    total = math.fsum(shares)
    shares = [share / total for share in shares]
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

    Each of GREEDY_ROUNDS rounds adds the member that gives the best top-1; on a tie, the one that gives the labels the
    higher mean log probability. The weights are the counts after the best round; on a tie, after the first of them.
    """
    counts = np.zeros(len(members), np.int64)
    total = np.zeros(members[0].shape, np.float64)
    rows = np.arange(len(labels))
    best, best_counts = (-1.0, -np.inf), counts.copy()
    for _ in range(GREEDY_ROUNDS):
        results = []
        for member in members:
            candidate = total + member
            likelihood = np.log(np.maximum(candidate[rows, labels] / (counts.sum() + 1), 1e-30)).mean()
            results.append((float((candidate.argmax(1) == labels).mean()), float(likelihood)))
        chosen = max(range(len(members)), key=lambda number: results[number])
        counts[chosen] += 1
        total += members[chosen]
        if results[chosen][0] > best[0]:
            best, best_counts = results[chosen], counts.copy()
    return [float(count / best_counts.sum()) for count in best_counts]


def agreement(members: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """[M, M]: the share of images for which two members predict the same class."""
    predicted = np.stack([member.argmax(1) for member in members])
    return (predicted[:, None] == predicted[None]).mean(2)
