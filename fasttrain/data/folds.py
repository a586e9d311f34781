"""k-fold cross-validation: a split of an index into equal parts, each with its share of every class."""

import hashlib
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.index import Index
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable


def fold_numbers(index: Index, folds: int) -> NDArray[np.int64]:
    """The fold of each image, int64 [N], in 0 … folds − 1.

    A class's images are dealt to the folds in turn, in the order of a hash of their ids, and the next class goes on
    where it ended. So the folds depend on the ids and classes only; their sizes, in all and of each class, differ by at
    most one image.
    """
    digests = [hashlib.sha256(image_id.encode(errors="surrogateescape")).digest() for image_id in index.ids]
    labels = index.labels.tolist()
    dealt = sorted(range(len(index)), key=lambda number: (labels[number], digests[number]))
    numbers = np.empty(len(index), np.int64)
    numbers[dealt] = np.arange(len(index)) % folds
    return numbers


def without_fold(index: Index, folds: int, fold: int) -> tuple[Index, Index]:
    """The images of all folds but one, and those of that fold without those that cannot be read, which --on-bad skip
    keeps for training. Raises UserError where a class would have no training image in one of the runs, there are fewer
    images than folds, or two images have one name."""
    require_unique_ids(index)
    sizes = np.bincount(index.labels, minlength=len(index.classes))
    if sizes.min() < 2:
        name = printable(index.classes[int(sizes.argmin())])
        raise UserError(
            f"class {name!r} has one image, and a run with folds leaves it out; add images, or leave it out"
        )
    if len(index) < folds:
        raise UserError(f"{len(index)} images do not make {folds} folds; set --folds to a smaller number")
    held_out = fold_numbers(index, folds) == fold
    readable = index.sizes[:, 0] > 0
    return index.take(np.flatnonzero(~held_out)), index.take(np.flatnonzero(held_out & readable))


def require_unique_ids(index: Index) -> None:
    """Raises UserError where two images have one name, as images of two --data folders may."""
    twice = [image_id for image_id, count in Counter(index.ids).items() if count > 1]
    if twice:
        raise UserError(
            f"two images are called {printable(twice[0])}, in different --data; folds and searches need different "
            "names, so put the images into one folder or table"
        )
