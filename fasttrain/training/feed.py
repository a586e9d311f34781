"""The steps of a run, each with its micro-batches."""

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256

from torch import Tensor

from fasttrain.data.index import Index
from fasttrain.distributed.watchdog import TRAINING, WAITING, Watch
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan


class Feed:
    """Iterating gives (step, its micro-batches) for each of `steps`.

    stream: the pipeline's micro-batches. watch: learns when the step waits for images and when it trains. hash_images:
    collect a hash of each image of the step in `hashes`, in the order of the images; waits for the device.
    """

    def __init__(
        self, stream: Iterator[Images], plan: Plan, index: Index, watch: Watch, steps: range, hash_images: bool
    ) -> None:
        self.stream, self.plan, self.index, self.watch = stream, plan, index, watch
        self.steps, self.hash_images = steps, hash_images
        self.hashes: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, Iterator[Images]]]:
        for step in self.steps:
            self.hashes = []
            yield step, self._micro_batches(step)

    def _micro_batches(self, step: int) -> Iterator[Images]:
        for _ in range(self.plan.micro_batches):
            self.watch.at(step, WAITING)
            images = next(self.stream)
            self.watch.at(step, TRAINING)
            if self.hash_images:
                self.hashes += self._hash(images)
            yield images

    def _hash(self, images: Images) -> list[str]:
        """A hash per row: all views of the first image, then those of the second, and so on."""
        ids = [self.index.ids[number] for number in images.indices.tolist()]
        rows = hash_rows(images.pixels, ids * self.plan.views_total)
        return [row for image in range(len(ids)) for row in rows[image :: len(ids)]]


def hash_rows(pixels: Tensor, ids: Sequence[str]) -> list[str]:
    """SHA-256 of each image's id and pixels, uint8 [B, H, W, 3]; waits for the device."""
    rows = pixels.cpu().numpy()
    return [sha256(os.fsencode(id_) + b"\0" + row.tobytes()).hexdigest() for id_, row in zip(ids, rows, strict=True)]
