"""The evaluation pipeline: it decodes every image once and resizes it to each crop as PIL and torchvision do."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from fasttrain.data.index import Index
from fasttrain.pipelines.decode_errors import check_sizes, decode_error
from fasttrain.pipelines.decoders import Decoder, resolve
from fasttrain.pipelines.image_input import image_inputs, image_values, read_images
from fasttrain.pipelines.named_inputs import Input, read_inputs
from fasttrain.pipelines.train_loader import output_stream, pipeline_options
from fasttrain.pipelines.views import Views, region

INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class Crops(NamedTuple):
    """A batch. pixels: uint8 [B, S, S, 3] on the pipeline's device, one tensor per crop of the views; for views without
    crops, one whole image, uint8 [1, H, W, 3]. indices: int64 [B] on the CPU, of the images in the Index."""

    pixels: tuple[Tensor, ...]
    indices: Tensor


def inputs(views: Views, index: Index) -> dict[str, Input]:
    """The graph's inputs, by name: those of `image_inputs`, and these.

    number: the image's number in the index. crop0.start, crop0.end: corners (y, x) of
    the first crop, in pixels of the stored image.
    """
    corners = {
        f"crop{crop}.{corner}": Input("FLOAT", 1) for crop in range(len(views.crops)) for corner in ("start", "end")
    }
    return {**image_inputs(index), "number": Input("INT64", 0), **corners}


@dataclass(frozen=True)
class Source:
    """Feeds DALI the graph's inputs: the images `indices` of an index, in batches."""

    indices: NDArray[np.int64]
    index: Index
    batch_size: int
    views: Views

    def __call__(self, info: types.BatchInfo) -> tuple[Any, ...]:
        chunk = self.chunk(info.iteration)
        if not len(chunk):
            raise StopIteration
        values: dict[str, Any] = {**image_values(self.index, chunk), "number": chunk}
        for position, crop in enumerate(self.views.crops):
            box = region(crop, chunk, self.index.sizes[chunk])
            corners = {"start": box[:, :2], "end": box[:, 2:]}
            values |= {f"crop{position}.{name}": np.ascontiguousarray(corner) for name, corner in corners.items()}
        return tuple(values[name] for name in inputs(self.views, self.index))

    def chunk(self, batch: int) -> NDArray[np.int64]:
        """The indices of a batch's images."""
        return self.indices[batch * self.batch_size : (batch + 1) * self.batch_size]


@pipeline_def
def graph(source: Source, decoder: Decoder, on_gpu: bool, interpolation: str) -> tuple[Any, ...]:
    """read → decode → one resize per crop. Returns uint8 HWC images, one output per crop (without crops, the whole
    images), their indices, and their sizes in the headers."""
    nodes = read_inputs(source, inputs(source.views, source.index))
    images, size = read_images(nodes, decoder, on_gpu)
    if not source.views.crops:
        return images, nodes["number"], size
    views = [
        fn.resize(
            images,
            size=[crop.size, crop.size],
            roi_start=nodes[f"crop{position}.start"],
            roi_end=nodes[f"crop{position}.end"],
            interp_type=INTERPOLATIONS[interpolation],
            antialias=True,
            subpixel_scale=False,
        )
        for position, crop in enumerate(source.views.crops)
    ]
    return (*views, nodes["number"], size)


class EvalLoader:
    """One rank's batches of all images of an index; each `iter` starts a new pass.

    Each rank has a contiguous share. Shares differ by one image at most and cover every image exactly once. Views
    without crops are for a batch_size of 1.
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
        indices = np.array_split(np.arange(len(index)), world)[rank]
        self.source = Source(indices, index, max(1, min(batch_size, len(indices))), views)
        self.device = device
        self.pipe = graph(
            self.source,
            decoder or Decoder(resolve("auto", device)),
            device.type == "cuda",
            interpolation,
            **pipeline_options(device, self.source.batch_size, threads),
        )
        self.pipe.build()
        self.first_pass = True

    def __len__(self) -> int:
        """Number of batches per pass."""
        return -(-len(self.source.indices) // self.source.batch_size)

    def __iter__(self) -> Iterator[Crops]:
        """Raises RunError, which names the file, if an image cannot be decoded."""
        if not self.first_pass:
            self.pipe.reset()
        self.first_pass = False
        index = self.source.index
        for batch in range(len(self)):
            chunk = self.source.chunk(batch)
            try:
                *pixels, indices, headers = self.pipe.run(output_stream(self.device))
                check_sizes(np.array(headers.as_array()), index.sizes[chunk])
            except RuntimeError as error:
                raise decode_error(error, index, chunk) from None
            tensors = tuple(torch.from_dlpack(crop.as_tensor()) for crop in pixels)
            yield Crops(tensors, torch.from_numpy(np.array(indices.as_array())))
