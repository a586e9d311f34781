"""P x K batches: K images of each of P classes, so that triplet mining finds a positive for every image.

Each epoch shuffles the images, splits each class's images into groups of K, and distributes the groups to batches so
that no class is in a batch twice. An epoch leaves out some images, different ones each time: the last n mod K images of
a class of n, the groups of a class that has more groups than there are batches, and the few groups that remain when all
batches have P groups.

With balance, a class has as many groups as its share of the images that are drawn (see `sampling.class_shares`). A
small class then has each image in several groups, as a new sample each time.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.index import Index
from fasttrain.pipelines.philox import ORDER, generator
from fasttrain.pipelines.sampling import class_shares
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
    def of(cls, index: Index, k: int, batch_size: int, balance: float = 0.0) -> "Groups":
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
        if index.weights is not None:
            raise UserError(
                "images_per_class draws all images of a class alike, so the images must have no weights; "
                "leave out the table's column weight, or images_per_class"
            )
        groups = sizes // k
        if balance:
            groups = _apportion(int(groups.sum()), class_shares(sizes.astype(np.float64), balance))
        # A batch has at most one group of a class, so b batches can use at most b groups of it.
        batches = next(b for b in range(int(groups.sum()) // p, 0, -1) if np.minimum(groups, b).sum() >= p * b)
        return cls(index.labels, k, p, batches, np.minimum(groups, batches))

    @functools.lru_cache(maxsize=4)  # noqa: B019 (two epochs overlap; the groups live as long as the run)
    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The epoch's samples in order of batches and groups, int64 [batches · p · k], read-only."""
        rng, count = generator(seed, ORDER, epoch), len(self.labels)
        sizes = np.bincount(self.labels, minlength=len(self.groups))
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # A class that has more groups than its images fill starts again with its images in another order.
        groups_per_round = sizes // self.k
        rounds = []
        for turn in range(int((-(-self.groups // groups_per_round)).max())):
            shuffled = rng.permutation(count)
            rounds.append(shuffled[np.argsort(self.labels[shuffled], kind="stable")] + turn * count)
        by_class = np.stack(rounds)

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
            number, position = np.divmod(used[classes], groups_per_round[classes])
            start = first[classes] + position * self.k
            order[batch] = by_class[number[:, None], start[:, None] + np.arange(self.k)]
            used[classes] += 1
            left[classes] -= 1
        flat = order.reshape(-1)
        flat.setflags(write=False)
        return flat


def _apportion(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers with the sum `total` in these shares, by the largest remainders; 1 or more each, int64 [n]."""
    exact = shares * total
    parts = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return np.maximum(parts, 1)
