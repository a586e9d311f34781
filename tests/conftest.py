"""Shared images. FASTTRAIN_PHOTOS may name a folder of class folders of photographs to use instead of `photos`."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import part_of
from PIL import Image

from fasttrain.data.demo_set import make
from fasttrain.data.index import Index

# Downloads must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` without a GPU, unless Triton's interpreter is on."""
    import torch

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def separate_cache(tmp_path_factory, monkeypatch):
    """No test finds the cached indices of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    make(folder)
    return folder


@pytest.fixture(scope="session")
def index(demo_set) -> Index:
    """100 of the demo set's training images, ten of each class."""
    return part_of(demo_set, 10)


def noise_photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise with a photograph's spectrum (amplitude falls as 1/f), uint8 [height, width, 3]."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width))
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.normal(size=(height, width))) * falloff
        plane = np.fft.irfft2(spectrum, (height, width))
        channels.append((plane - plane.mean()) / plane.std())
    gray = channels[0]
    pixels = np.stack([0.8 * gray + 0.4 * channel for channel in channels], axis=2) * 45 + rng.uniform(90, 160)
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of two class folders: scikit-learn's two photographs in several sizes, and photo-like noise in odd,
    tiny, wide and tall sizes; or the folder that FASTTRAIN_PHOTOS names."""
    if folder_name := os.environ.get("FASTTRAIN_PHOTOS"):
        return Path(folder_name)
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    for name, picture in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for width, height in ((640, 427), (427, 640), (333, 501), (250, 250), (500, 281)):
            image = Image.fromarray(picture)
            if height > width:
                image = image.transpose(Image.Transpose.ROTATE_90)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            image.save(folder / name / f"{width}x{height}.jpg", quality=92)
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(375, 500), (500, 333), (97, 131), (1023, 255), (64, 64), (241, 777)]):
        name = ("temple", "flower")[number % 2]
        Image.fromarray(noise_photo(rng, height, width)).save(folder / name / f"noise{number}.jpg", quality=90)
    return folder
