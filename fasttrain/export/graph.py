"""The networks that are exported as graphs: one for normalized crops, and one that takes whole images."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.pipelines.views import shorter_edge


class CenterCrop(nn.Module):
    """Resize images, uint8 [B, H, W, 3], and cut out their center: float32 [B, 3, S, S], whole numbers from 0 to 255.

    The shorter edge becomes `shorter_edge(size)` pixels, bilinear with antialiasing, as in PIL and torchvision. The two
    are one resize of the region that the crop needs. It is separable, so it is two products with matrices of weights.
    These take any height and width, and every exporter and runtime has matrix products.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.edge = size, shorter_edge(size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = (torch.scalar_tensor(length, dtype=torch.float64) for length in images.shape[1:3])
        short = torch.minimum(height, width)
        rows = self.weights(images.shape[1], height, short)
        columns = self.weights(images.shape[2], width, short)
        pixels = images.permute(0, 3, 1, 2).float()
        return (rows @ pixels @ columns.T).round().clamp(0, 255)

    def weights(self, count: int, length: Tensor, short: Tensor) -> Tensor:
        """How much each of `count` pixels along an edge counts in each pixel of the crop, float32 [S, count]. length:
        `count`, and short: the shorter edge, both float64 scalars."""
        resized = torch.floor(self.edge * length / short)
        scale = length / resized
        start = torch.round((resized - self.size) / 2)
        centers = (torch.arange(self.size, dtype=torch.float64) + start + 0.5) * scale
        distances = torch.arange(count, dtype=torch.float64) + 0.5 - centers[:, None]
        triangles = (1 - distances.abs() / scale.clamp(min=1)).clamp(min=0).float()
        return triangles / triangles.sum(1, keepdim=True)


class FromPixels(nn.Module):
    """Crop, normalization, network and softmax: whole images, uint8 [B, H, W, 3], to probabilities, float32 [B, K]."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.crop = network, CenterCrop(size)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None] * 255)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None] * 255)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((self.crop(images) - self.mean) / self.std).softmax(1)


class Traceable(NamedTuple):
    """What exporters trace. example: an input. axes: the names of the input's axes that may have any length."""

    module: nn.Module
    example: Tensor
    axes: dict[int, str]


def traceable(network: nn.Module, size: int, *, takes_pixels: bool) -> Traceable:
    """A network in eval mode, for normalized crops of any number, or for whole images of any number and size."""
    if not takes_pixels:
        return Traceable(network, torch.zeros(2, 3, size, size), {0: "batch"})
    example = torch.zeros(2, size + 7, size + 15, 3, dtype=torch.uint8)
    return Traceable(FromPixels(network, size).eval(), example, {0: "batch", 1: "height", 2: "width"})
