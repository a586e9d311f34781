"""The evaluation pipeline: every image once, resized and cropped as PIL and torchvision do it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from fasttrain.dataset import Index
from fasttrain.pipelines.faults import decode_error
from fasttrain.pipelines.train import PREFETCH, Images


def shorter_edge(image_size: int) -> int:
    """The length to which the shorter edge is resized before a centre crop of image_size: 256 for 224."""
    return round(256 * image_size / 224)


def centre_region(sizes: NDArray[np.int32], image_size: int) -> NDArray[np.float32]:
    """Regions float32 [n, 4] (top, left, bottom, right), in stored pixels, that a resize of the shorter edge to
    `shorter_edge(image_size)` and a centre crop would leave; sizes int32 [n, 2], height and width.

    The longer edge is edge·long // short, and a crop starts at round((length − image_size) / 2), half to even: PIL's
    and torchvision's arithmetic. One resize of such a region is the same as their resize and crop.
    """
    edge = shorter_edge(image_size)
    stored = sizes.astype(np.int64)
    short = stored.min(1, keepdims=True)
    resized = np.where(stored == short, edge, edge * stored // short)
    start = np.rint((resized - image_size) / 2)
    corners = np.concatenate([start, start + image_size], 1)
    return (corners * np.tile(stored / resized, 2)).astype(np.float32)


@dataclass(frozen=True)
class Source:
    numbers: NDArray[np.int64]
    index: Index
    batch_size: int
    image_size: int

    def __call__(self, info: types.BatchInfo) -> tuple[Any, ...]:
        chunk = self.chunk(info.iteration)
        if not len(chunk):
            raise StopIteration
        region = centre_region(self.index.sizes[chunk], self.image_size)
        paths = [np.frombuffer(os.fsencode(self.index.paths[number]), np.uint8) for number in chunk]
        return paths, chunk, np.ascontiguousarray(region[:, :2]), np.ascontiguousarray(region[:, 2:])

    def chunk(self, batch: int) -> NDArray[np.int64]:
        return self.numbers[batch * self.batch_size : (batch + 1) * self.batch_size]


@pipeline_def
def graph(source: Source, on_gpu: bool) -> tuple[Any, Any]:
    """read → decode → resize of the centre region; uint8 HWC images and their numbers."""
    paths, numbers, start, end = fn.external_source(
        source=source,
        num_outputs=4,
        batch=True,
        batch_info=True,
        dtype=[types.UINT8, types.INT64, types.FLOAT, types.FLOAT],
        ndim=[1, 0, 1, 1],
    )
    images = fn.decoders.image(
        fn.io.file.read(paths),
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    images = fn.resize(
        images,
        size=[source.image_size, source.image_size],
        roi_start=start,
        roi_end=end,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        subpixel_scale=False,
    )
    return images, numbers


class Evaluation:
    """Batches of all of an index's images for one rank, again and again: each `iter` starts a new pass.

    Rank r of w has a contiguous share; shares differ by one image at most and cover every image exactly once.
    """

    def __init__(
        self,
        index: Index,
        image_size: int,
        batch_size: int,
        device: torch.device,
        threads: int,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        numbers = np.array_split(np.arange(len(index)), world)[rank]
        self.source = Source(numbers, index, max(1, min(batch_size, len(numbers))), image_size)
        on_gpu = device.type == "cuda"
        self.pipe = graph(
            self.source,
            on_gpu,
            batch_size=self.source.batch_size,
            num_threads=threads,
            device_id=device.index or 0 if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        self.pipe.build()
        self.fresh = True

    def __iter__(self) -> Iterator[Images]:
        """Raises RunError that names the file when an image cannot be decoded."""
        if not self.fresh:
            self.pipe.reset()
        self.fresh = False
        for count in range(-(-len(self.source.numbers) // self.source.batch_size)):
            try:
                pixels, numbers = self.pipe.run()
            except RuntimeError as error:
                paths = [self.source.index.paths[each] for each in self.source.chunk(count)]
                raise decode_error(error, paths) from None
            yield Images(torch.from_dlpack(pixels.as_tensor()), torch.from_dlpack(numbers.as_tensor()))
