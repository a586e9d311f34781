"""P x K batches: K images of each of P classes, so that triplet mining finds a positive for every image.

Each epoch shuffles the images, splits each class's images into groups of K, and distributes the groups to batches so
that no class is in a batch twice. An epoch leaves out some images, different ones each time: the last n mod K images of
a class of n, the groups of a class that has more groups than there are batches, and the few groups that remain when all
batches have P groups.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.index import Index
from fasttrain.pipelines.philox import ORDER, generator
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable


@dataclass(frozen=True, eq=False)
class Groups:
    """labels: int64 [N], the class of each image. k: images per class in a batch. p: classes per batch. batches:
    batches per epoch. groups: int64 [classes], how many groups of each class an epoch can use at most."""

    labels: NDArray[np.int64]
    k: int
    p: int
    batches: int
    groups: NDArray[np.int64]

    @classmethod
    def of(cls, index: Index, k: int, batch_size: int) -> "Groups":
        """Raises UserError where the classes do not fill batches of P x K = batch_size images."""
        if batch_size % k:
            raise UserError(
                f"batch_size {batch_size} is not a multiple of images_per_class {k}; set --batch-size to one"
            )
        sizes = np.bincount(index.labels, minlength=len(index.classes))
        short = np.flatnonzero(sizes < k)
        if len(short):
            more = f" (and {len(short) - 1} more classes)" if len(short) > 1 else ""
            fewer = f"set images_per_class={sizes.min()} or less, or " if sizes.min() > 1 else ""
            raise UserError(
                f"images_per_class is {k}, but class {printable(index.classes[short[0]])!r} has {sizes[short[0]]}"
                f"{more}; {fewer}add images, or leave images_per_class out"
            )
        p = batch_size // k
        if len(sizes) < p:
            raise UserError(
                f"a batch of {batch_size} with images_per_class {k} takes {p} classes, but there are {len(sizes)}; "
                f"set --batch-size {len(sizes) * k} or less"
            )
        groups = sizes // k
        # A batch has at most one group of a class, so b batches can use at most b groups of it.
        batches = next(b for b in range(int(groups.sum()) // p, 0, -1) if np.minimum(groups, b).sum() >= p * b)
        return cls(index.labels, k, p, batches, np.minimum(groups, batches))

    @functools.lru_cache(maxsize=4)  # noqa: B019 (two epochs overlap; the groups live as long as the run)
    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The epoch's images in order of batches and groups, int64 [batches · p · k], read-only."""
        rng = generator(seed, ORDER, epoch)
        shuffled = rng.permutation(len(self.labels))
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        sizes = np.bincount(self.labels, minlength=len(self.groups))
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])

        left = self.groups.copy()
        surplus = int(left.sum()) - self.batches * self.p
        if surplus:
            left -= np.bincount(rng.permutation(np.repeat(np.arange(len(left)), left))[:surplus], minlength=len(left))
        used = np.zeros_like(left)
        order = np.empty((self.batches, self.p, self.k), np.int64)
        for batch in range(self.batches):
            # A class with as many groups left as there are batches left must be in this batch. The others are drawn
            # with weights, their groups left (Efraimidis and Spirakis 2006), so that all last to the epoch's end.
            arrival = rng.exponential(size=len(left)) / np.maximum(left, 1e-300)
            arrival[left == self.batches - batch] = -1
            classes = np.argsort(arrival, kind="stable")[: self.p]
            start = first[classes] + used[classes] * self.k
            order[batch] = by_class[start[:, None] + np.arange(self.k)]
            used[classes] += 1
            left[classes] -= 1
        flat = order.reshape(-1)
        flat.setflags(write=False)
        return flat
