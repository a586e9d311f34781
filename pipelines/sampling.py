"""How often an epoch draws each image: once, or by the classes' sizes and the images' weights.

An image that an epoch draws several times is a new sample each time. Sample s of N images is image s mod N, which the
epoch has drawn s // N times before; the augmentation is drawn for the sample.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.index import Index
from fasttrain.pipelines.philox import ORDER, generator
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable


def class_shares(totals: NDArray[Any], balance: float) -> NDArray[np.float64]:
    """The share of each class in the images that are drawn, float64 [K]: proportional to total^(1 − balance). totals:
    the images of each class, or the sum of their weights. balance 0 draws by image, 1 by class (Kang et al. 2020,
    "Decoupling representation and classifier", with q = 1 − balance)."""
    powers = np.where(totals > 0, totals, 1.0) ** (1 - balance) * (totals > 0)
    return powers / powers.sum()


@dataclass(frozen=True, eq=False)
class Sampling:
    """labels: int64 [N]. times: float64 [N], how often an epoch draws each image on average; their sum is N."""

    labels: NDArray[np.int64]
    times: NDArray[np.float64]

    @classmethod
    def of(cls, index: Index, balance: float) -> "Sampling | None":
        """None where each image is drawn once. Raises UserError where a class is never drawn."""
        if not balance and index.weights is None:
            return None
        weights = np.ones(len(index)) if index.weights is None else index.weights
        totals = np.bincount(index.labels, weights, len(index.classes))
        without = index.labels[totals[index.labels] == 0]
        if len(without):
            name = printable(index.classes[without[0]])
            raise UserError(
                f"all images of class {name!r} have the weight 0; give one a weight above 0, or leave them out"
            )
        shares = class_shares(totals, balance)
        return cls(index.labels, len(index) * shares[index.labels] * weights / totals[index.labels])

    @functools.lru_cache(maxsize=4)  # noqa: B019 (two epochs overlap; the sampling lives as long as the run)
    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The N samples of an epoch, int64 [N], read-only.

        Each image is drawn ⌊times⌋ or ⌈times⌉ times, so often on average, and each class too: the images stand in a
        row, by class, each as long as its times, and those at the points u, u + 1, u + 2, … are drawn (systematic
        sampling), with u uniform in [0, 1).
        """
        rng, count = generator(seed, ORDER, epoch), len(self.labels)
        shuffled = rng.permutation(count)
        row = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        ends = np.cumsum(self.times[row])
        ends *= count / ends[-1]  # rounding must not lose or add a sample
        drawn = np.floor(ends + rng.random()).astype(np.int64)
        times: NDArray[np.int64] = drawn - np.concatenate([[0], drawn[:-1]])
        images = np.repeat(row, times)
        before = np.arange(len(images)) - np.repeat(np.cumsum(times) - times, times)
        samples = (images + before * count)[rng.permutation(len(images))]
        samples.setflags(write=False)
        return samples
