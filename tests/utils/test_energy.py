"""NVML's energy counter, with a stand-in for its module."""

import sys
from types import SimpleNamespace

import pytest

from fasttrain.utils import energy


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A module with one GPU, whose counter starts at 5 J; it says which handles were asked for."""
    asked: list[str] = []

    def handle(uuid):
        asked.append(uuid)
        if uuid != "GPU-1234":
            raise NVMLError("not found")
        return uuid

    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: module.millijoules,
        millijoules=5000,
        asked=asked,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_joules_of_a_gpu_by_its_uuid_with_and_without_prefix(nvml):
    assert energy.joules("1234") == energy.joules("GPU-1234") == 5.0
    assert nvml.asked == ["GPU-1234", "GPU-1234"]


def test_none_without_a_counter_a_driver_or_the_module(nvml, monkeypatch):
    assert energy.joules("unknown") is None and energy.joules("") is None

    def no_driver():
        raise NVMLError("driver not loaded")

    nvml.nvmlInit = no_driver
    assert energy.joules("1234") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    assert energy.joules("1234") is None
