"""Which decoder a setting stands for. What each does is in test_pipelines.py, and on a GPU in test_gpu.py."""

import pytest
import torch

from fasttrain import config, options
from fasttrain.errors import UserError
from fasttrain.pipelines import decoders

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def nvimagecodec(monkeypatch):
    """Sets the version of nvImageCodec that seems to be installed."""
    return lambda version: monkeypatch.setattr(decoders, "installed", lambda *names: version)


@pytest.mark.parametrize("version", ["0.9.0.20", "0.9", "1.0.1", None, "unknown"])
def test_no_region_is_decoded_where_that_crashes(nvimagecodec, version):
    nvimagecodec(version)
    with pytest.raises(UserError, match=r"machine.decoder=gpu-region: .*nvImageCodec#55.*; set machine.decoder=auto"):
        decoders.resolve("gpu-region", GPU)
    assert decoders.resolve("auto", GPU) not in ("auto", "gpu-region", "gpu-hardware")


def test_regions_are_decoded_by_nvimagecodec_0_8(nvimagecodec):
    nvimagecodec("0.8.0.22")
    assert decoders.resolve("gpu-region", GPU) == "gpu-region"


@pytest.mark.parametrize("kind", config.DECODERS)
def test_a_cpu_decodes_by_itself(kind):
    assert decoders.resolve(kind, CPU) == "cpu"


@pytest.mark.parametrize("kind", ["cpu", "gpu", "gpu-hardware"])
def test_what_is_asked_for_is_taken(kind):
    assert decoders.resolve(kind, GPU) == kind


def test_the_command_line_offers_what_the_settings_have():
    assert options.DECODERS == config.DECODERS
