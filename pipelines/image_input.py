"""How images come into a graph: as paths of files, which DALI's threads read; as the content of files; or as pixels."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn

from fasttrain.data.index import Index
from fasttrain.pipelines.decode_graph import decode, decode_region, header_size
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.named_inputs import Input

Region = tuple[NDArray[np.int32], NDArray[np.int32]]  # (top, left) and (height, width), [n, 2] each, in pixels


def image_inputs(index: Index) -> dict[str, Input]:
    """The inputs through which a graph gets the index's images, by name.

    path: the file's path as bytes. encoded: its content. pixels: decoded pixels. size: the image's height and width.
    """
    if not index.encoded:
        return {"pixels": Input("UINT8", 3, "HWC"), "size": Input("INT32", 1)}
    return {"path" if index.store is None else "encoded": Input("UINT8", 1)}


def image_values(index: Index, numbers: NDArray[np.int64], region: Region | None = None) -> dict[str, Any]:
    """The values of `image_inputs` for these images. region: the part that is needed; by default the whole image. Of
    stored pixels, its rows are given in full width, as views: the graph cuts the columns."""
    store = index.store
    if store is None:
        return {"path": [np.frombuffer(os.fsencode(index.paths[number]), np.uint8) for number in numbers]}
    contents = [store.content(number) for number in numbers.tolist()]
    if not store.decoded:
        return {"encoded": contents}
    if region is not None:
        rows = zip(region[0][:, 0].tolist(), region[1][:, 0].tolist(), strict=True)
        contents = [pixels[top : top + height] for pixels, (top, height) in zip(contents, rows, strict=True)]
    return {"pixels": contents, "size": index.sizes[numbers]}


def read_images(
    nodes: dict[str, Any], decoder: Decoder, on_gpu: bool, region: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """uint8 HWC images or their regions, and their sizes, int32 [2], in the headers of encoded ones. nodes: those of
    `image_inputs`. region: nodes of (top, left) and (height, width)."""
    if "pixels" in nodes:
        pixels = nodes["pixels"]
        if region is not None:  # on the CPU, so that only the region travels to a GPU
            start, shape = (node[1:2] for node in region)
            pixels = fn.slice(pixels, start, shape, axes=[1], normalized_anchor=False, normalized_shape=False)
        return (pixels.gpu() if on_gpu else pixels), nodes["size"]
    encoded = fn.io.file.read(nodes["path"]) if "path" in nodes else nodes["encoded"]
    size = header_size(encoded)
    if region is None:
        return decode(encoded, size, decoder, on_gpu), size
    return decode_region(encoded, size, *region, decoder, on_gpu), size
