"""The evaluation pipeline: every image once, decoded once, resized to each crop as PIL and torchvision do it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from fasttrain.data.index import Index
from fasttrain.pipelines.decode_errors import decode_error
from fasttrain.pipelines.decode_graph import decode
from fasttrain.pipelines.decoders import Decoder, resolve
from fasttrain.pipelines.train_loader import PREFETCH, Input, output_stream
from fasttrain.pipelines.views import Views, region

INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class Crops(NamedTuple):
    """A batch: for each crop of the views its pixels, uint8 [B, S, S, 3] on the pipeline's device; and numbers int64
    [B] of the images in the index, on the CPU."""

    pixels: tuple[Tensor, ...]
    numbers: Tensor


def inputs(views: Views) -> dict[str, Input]:
    """The graph's inputs, by name.

    path: bytes of the file's name. number: the image's number in the index. crop0.start, crop0.end: corners (y, x) of
    the first crop, in stored pixels.
    """
    of_crops = {
        f"crop{at}.{corner}": Input(types.FLOAT, 1) for at in range(len(views.crops)) for corner in ("start", "end")
    }
    return {"path": Input(types.UINT8, 1), "number": Input(types.INT64, 0), **of_crops}


@dataclass(frozen=True)
class Source:
    """Gives DALI the graph's inputs: the images `numbers` of an index, batch after batch."""

    numbers: NDArray[np.int64]
    index: Index
    batch_size: int
    views: Views

    def __call__(self, info: types.BatchInfo) -> tuple[Any, ...]:
        chunk = self.chunk(info.iteration)
        if not len(chunk):
            raise StopIteration
        values: dict[str, Any] = {
            "path": [np.frombuffer(os.fsencode(self.index.paths[number]), np.uint8) for number in chunk],
            "number": chunk,
        }
        for at, crop in enumerate(self.views.crops):
            box = region(crop, chunk, self.index.sizes[chunk])
            values |= {f"crop{at}.start": box[:, :2], f"crop{at}.end": box[:, 2:]}
        return tuple(
            np.ascontiguousarray(values[name]) if name != "path" else values[name] for name in inputs(self.views)
        )

    def chunk(self, batch: int) -> NDArray[np.int64]:
        """The numbers of a batch's images."""
        return self.numbers[batch * self.batch_size : (batch + 1) * self.batch_size]


@pipeline_def
def graph(source: Source, decoder: Decoder, on_gpu: bool, interpolation: str) -> tuple[Any, ...]:
    """read → decode → a resize for each crop. Gives uint8 HWC images, one output per crop, and their numbers."""
    expected = inputs(source.views)
    given = fn.external_source(
        source=source,
        num_outputs=len(expected),
        batch=True,
        batch_info=True,
        dtype=[each.dtype for each in expected.values()],
        ndim=[each.ndim for each in expected.values()],
    )
    nodes = {name: given[at] for at, name in enumerate(expected)}
    images = decode(fn.io.file.read(nodes["path"]), decoder, on_gpu)
    views = [
        fn.resize(
            images,
            size=[crop.size, crop.size],
            roi_start=nodes[f"crop{at}.start"],
            roi_end=nodes[f"crop{at}.end"],
            interp_type=INTERPOLATIONS[interpolation],
            antialias=True,
            subpixel_scale=False,
        )
        for at, crop in enumerate(source.views.crops)
    ]
    return (*views, nodes["number"])


class EvalLoader:
    """Batches of all of an index's images for one rank, again and again: each `iter` starts a new pass.

    Rank r of w has a contiguous share; shares differ by one image at most and cover every image exactly once.
    """

    def __init__(
        self,
        index: Index,
        views: Views,
        batch_size: int,
        device: torch.device,
        threads: int,
        world: int = 1,
        rank: int = 0,
        interpolation: str = "bilinear",
        decoder: Decoder | None = None,
    ) -> None:
        numbers = np.array_split(np.arange(len(index)), world)[rank]
        self.source = Source(numbers, index, max(1, min(batch_size, len(numbers))), views)
        self.device, on_gpu = device, device.type == "cuda"
        self.pipe = graph(
            self.source,
            decoder or Decoder(resolve("auto", device)),
            on_gpu,
            interpolation,
            batch_size=self.source.batch_size,
            num_threads=threads,
            device_id=device.index or 0 if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        self.pipe.build()
        self.fresh = True

    def __len__(self) -> int:
        """Batches a pass."""
        return -(-len(self.source.numbers) // self.source.batch_size)

    def __iter__(self) -> Iterator[Crops]:
        """Raises RunError that names the file when an image cannot be decoded."""
        if not self.fresh:
            self.pipe.reset()
        self.fresh = False
        for count in range(len(self)):
            try:
                *pixels, numbers = self.pipe.run(output_stream(self.device))
            except RuntimeError as error:
                index, chunk = self.source.index, self.source.chunk(count)
                raise decode_error(error, [index.paths[each] for each in chunk], index.sizes[chunk]) from None
            tensors = tuple(torch.from_dlpack(each.as_tensor()) for each in pixels)
            yield Crops(tensors, torch.from_numpy(np.array(numbers.as_array())))
