"""The training pipeline's output, in its own module so that a step can be built without DALI."""

from typing import NamedTuple

from torch import Tensor


class Images(NamedTuple):
    """A batch. pixels: uint8 [rows, H, W, 3] on the pipeline's device, one row per image and view: first view 0 of
    each image, then view 1 of each, and so on. indices: int64 [B] on the CPU, of the images in the Index."""

    pixels: Tensor
    indices: Tensor
