"""Which decoder a setting stands for. What each does is in test_pipelines.py, and on a GPU in test_gpu.py."""

import pytest
import torch

from fasttrain.config.choices import DECODERS
from fasttrain.pipelines import decoders
from fasttrain.utils import versions
from fasttrain.utils.errors import UserError

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def nvimagecodec(monkeypatch):
    """Sets the version of nvImageCodec that seems to be installed."""
    return lambda version: monkeypatch.setattr(decoders, "nvimagecodec", lambda: version)


@pytest.mark.parametrize("version", ["0.9.0.20", "0.9", "1.0.1", None, "unknown"])
def test_no_region_is_decoded_where_that_crashes(nvimagecodec, version):
    nvimagecodec(version)
    with pytest.raises(
        UserError, match=r"decoder gpu-region is refused: .*nvImageCodec#55.*; leave machine.decoder at auto"
    ):
        decoders.resolve("gpu-region", GPU)
    assert decoders.resolve("auto", GPU) not in ("auto", "gpu-region", "gpu-hardware")


def test_nvimagecodec_0_8_decodes_regions_and_the_host_by_default(nvimagecodec):
    """Whole images of truncated BMP files are not safe with it."""
    nvimagecodec("0.8.0.22")
    assert decoders.resolve("gpu-region", GPU) == "gpu-region" and decoders.resolve("auto", GPU) == "cpu"


@pytest.mark.parametrize("kind", DECODERS)
def test_a_cpu_decodes_by_itself(kind):
    assert decoders.resolve(kind, CPU) == "cpu"


@pytest.mark.parametrize("kind", ["cpu", "gpu", "gpu-hardware"])
def test_what_is_asked_for_is_taken(kind):
    assert decoders.resolve(kind, GPU) == kind


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"nvidia-dali-cuda130": "2.4", "nvidia-nvimgcodec-cu13": "0.9"}, "0.9"),
        ({"nvidia-dali-cuda120": "2.2", "nvidia-nvimgcodec-cu12": "0.8"}, "0.8"),
        ({"nvidia-dali-cuda120": "2.2", "nvidia-nvimgcodec-cu12": "0.8", "nvidia-nvimgcodec-cu13": "0.9"}, "0.8"),
        ({}, None),
    ],
)
def test_the_version_is_that_of_the_installed_dalis_build(monkeypatch, there, expected):
    """A switch between CUDA versions may leave the other's metadata."""
    monkeypatch.setattr(
        versions, "installed", lambda *names: next((there[name] for name in names if name in there), None)
    )
    assert versions.nvimagecodec() == expected
