"""Decodes files with DALI on the CPU, as the pipelines do, without a pipeline's inputs."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCH_FILES = 32


@functools.cache
def decoder() -> Any:
    """A pipeline for the input `content`, the contents of up to BATCH_FILES files, uint8 [n] each. It decodes as
    pipelines/decode_graph.py does, which this package must not import."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH_FILES, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def decode() -> Any:
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        full_image: dict[str, Any] = {"rel_start": [0.0, 0.0], "rel_shape": [1.0, 1.0], "axis_names": "HW"}
        return fn.decoders.image_slice(content, **full_image, output_type=types.RGB, adjust_orientation=False)

    pipe = decode()
    pipe.build()
    return pipe


def decode_batch(contents: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """The pixels of up to BATCH_FILES files, uint8 [H, W, 3] each; they share memory with DALI until the next call. No
    pixels where DALI cannot decode every file."""
    try:
        pipe = decoder()
        pipe.feed_input("content", list(contents))
        (output,) = pipe.run()
        return [output.at(number) for number in range(len(contents))]
    except Exception:  # it says no more than a number, or nothing
        decoder.cache_clear()  # after some errors every later run of the pipeline fails
        return []
