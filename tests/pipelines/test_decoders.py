"""The decoder that a setting selects. test_loaders.py and test_gpu.py test the decoders themselves."""

import pytest
import torch

from fasttrain.config.choices import DECODERS
from fasttrain.pipelines import decoders
from fasttrain.utils import versions
from fasttrain.utils.errors import UserError

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def nvimagecodec(monkeypatch):
    """Pretends that a version of nvImageCodec is installed."""
    return lambda version: monkeypatch.setattr(decoders, "nvimagecodec", lambda: version)


@pytest.mark.parametrize("version", ["0.9.0.20", "0.9", "1.0.1", None, "unknown"])
def test_gpu_region_raises_where_it_crashes(nvimagecodec, version):
    nvimagecodec(version)
    with pytest.raises(
        UserError, match=r"decoder gpu-region is refused: .*nvImageCodec#55.*; leave machine.decoder at auto"
    ):
        decoders.resolve("gpu-region", GPU)
    assert decoders.resolve("auto", GPU) not in ("auto", "gpu-region", "gpu-hardware")


def test_nvimagecodec_0_8_allows_gpu_region_and_defaults_to_the_cpu(nvimagecodec):
    """Decoding full images of truncated BMP files is not safe with it."""
    nvimagecodec("0.8.0.22")
    assert decoders.resolve("gpu-region", GPU) == "gpu-region" and decoders.resolve("auto", GPU) == "cpu"


@pytest.mark.parametrize("kind", DECODERS)
def test_a_cpu_always_decodes_on_the_cpu(kind):
    assert decoders.resolve(kind, CPU) == "cpu"


@pytest.mark.parametrize("kind", ["cpu", "gpu", "gpu-hardware"])
def test_an_explicit_setting_is_used(kind):
    assert decoders.resolve(kind, GPU) == kind


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"nvidia-dali-cuda130": "2.4", "nvidia-nvimgcodec-cu13": "0.9"}, "0.9"),
        ({"nvidia-dali-cuda120": "2.2", "nvidia-nvimgcodec-cu12": "0.8"}, "0.8"),
        ({"nvidia-dali-cuda120": "2.2", "nvidia-nvimgcodec-cu12": "0.8", "nvidia-nvimgcodec-cu13": "0.9"}, "0.8"),
        ({}, None),
    ],
)
def test_the_version_is_for_the_installed_dalis_cuda_version(monkeypatch, installed, expected):
    """A switch between CUDA versions may leave the other version's package metadata."""
    monkeypatch.setattr(
        versions, "installed", lambda *names: next((installed[name] for name in names if name in installed), None)
    )
    assert versions.nvimagecodec() == expected
