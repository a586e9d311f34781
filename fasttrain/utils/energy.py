"""The energy of a GPU, from the counter that NVML keeps since the driver was loaded."""

from typing import Any


def joules(uuid: str) -> float | None:
    """What the counter of a GPU says, in joules; the difference of two readings is what the GPU has used between them.

    uuid: as nvidia-smi prints it, with or without its `GPU-`. None where nvidia-ml-py is not installed, or the GPU has
    no such counter: GPUs before Volta, and instances of MIG.
    """
    nvml = _nvml()
    if nvml is None or not uuid:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it counts millijoules
    except nvml.NVMLError:
        return None


def _nvml() -> Any:
    """NVML's Python module, initialized; None where it is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()  # a second call only counts
    except pynvml.NVMLError:
        return None
    return pynvml
