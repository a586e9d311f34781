"""What a training pipeline gives. It is apart from the pipeline so that a step can be built without DALI."""

from typing import NamedTuple

from torch import Tensor


class Images(NamedTuple):
    """A batch from a pipeline: pixels uint8 [rows, H, W, 3] on the pipeline's device, and numbers int64 [B] of the
    images in the index, on the CPU. Rows are the images, or where there are several views of each the views, one
    after another."""

    pixels: Tensor
    numbers: Tensor
