"""The networks that are exported as graphs: one for normalized crops, and one that takes whole images."""

import torch
from torch import Tensor, nn

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.pipelines.views import shorter_edge


class CenterCrop(nn.Module):
    """Resize images, uint8 [B, H, W, 3], and cut out their center: float32 [B, 3, S, S], whole numbers from 0 to 255.

    The shorter edge becomes `shorter_edge(size)` pixels, bilinear with antialiasing, as in PIL and torchvision. The two
    are one resize of the region that the crop needs. It is separable, so it is two products with matrices of weights.
    These take any height and width, and exporters and runtimes have matrix products, but not all have such a resize.
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


def trace(network: nn.Module, size: int, *, takes_pixels: bool) -> torch.export.ExportedProgram:
    """A network in eval mode as a torch.export program for any batch size, and any image size where `takes_pixels`. Its
    input is called `images`."""
    module, example, dynamic = network, torch.zeros(2, 3, size, size), 1
    if takes_pixels:
        module = FromPixels(network, size).eval()
        example, dynamic = torch.zeros(2, size + 7, size + 15, 3, dtype=torch.uint8), 3
    shapes = dict.fromkeys(range(dynamic), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=(shapes,))
