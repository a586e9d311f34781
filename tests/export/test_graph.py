"""The crop of exported graphs, compared with torchvision's on PIL images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torch import nn
from torchvision.transforms import CenterCrop, Resize

from fasttrain.export.graph import CenterCrop as GraphCrop
from fasttrain.export.graph import FromPixels
from fasttrain.exported import ModelConfig
from fasttrain.pipelines.views import shorter_edge

LENGTHS = st.integers(20, 400)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image with gradients and edges, like a photograph's."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@settings(max_examples=40, deadline=None)
@given(height=LENGTHS, width=LENGTHS, size=st.sampled_from([32, 64, 96, 100]))
def test_crops_are_torchvisions(height, width, size):
    image = smooth(height, width, seed=height)
    expected = np.asarray(CenterCrop(size)(Resize(shorter_edge(size))(Image.fromarray(image)))).astype(int)
    actual = GraphCrop(size)(torch.from_numpy(image.copy())[None])[0].permute(1, 2, 0).numpy()
    assert actual.shape == (size, size, 3)
    # PIL rounds to whole numbers between its two passes, and computes in fixed point.
    assert np.abs(actual - expected).max() <= 1


def test_images_of_a_batch_do_not_affect_each_other():
    images = torch.from_numpy(np.stack([smooth(70, 90, seed) for seed in range(3)]))
    together = GraphCrop(32)(images)
    assert torch.equal(together, torch.cat([GraphCrop(32)(image[None]) for image in images]))


@pytest.mark.parametrize("size", [8, 32, 100, 224, 331])
def test_the_config_gives_timm_the_same_crop(size):
    config = ModelConfig("resnet18", ("a", "b"), size)
    resize, *_ = create_transform(**config.preprocessing).transforms
    assert resize.size == shorter_edge(size)


def test_pixels_are_normalized_as_timm_normalizes_them():
    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    config, image = ModelConfig("resnet18", ("a", "b"), 64), smooth(120, 90)
    (expected,) = create_transform(**config.preprocessing)(Image.fromarray(image))[None].mean((2, 3)).softmax(1)
    (actual,) = FromPixels(Mean(), 64)(torch.from_numpy(image.copy())[None])
    assert torch.allclose(actual, expected, atol=2e-3)  # one unit of 255 is 0.017 in a pixel
