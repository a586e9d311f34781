"""`fasttrain doctor` on fake machines: old and new NVIDIA drivers, and builds of torch and DALI that may not fit."""

import sys

import pytest
import torch
from click.testing import CliRunner
from nvidia import dali

from fasttrain.cli.main import main
from fasttrain.doctor import machine as doctor

CUDA12, CUDA13 = "nvidia-dali-cuda120", "nvidia-dali-cuda130"
TO_12 = f"pip uninstall -y {CUDA13} && FASTTRAIN_CUDA=12 pip install ."
TO_13 = f"pip uninstall -y {CUDA12} && pip install ."
KERNEL_MODULES = [
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n",
    "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  535.104.05  Release Build  (dvs-builder@U16-I1)\n",
]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that fakes a machine, and returns the findings on it by name.

    smi: the output of nvidia-smi; empty: it fails. module: the kernel module's version file. cuda: the version that
    torch is built for. installed: DALI's distributions; the first one is imported. gpu: whether torch can use a GPU.
    """

    def make(smi="", module="", cuda="13.0", installed=(CUDA13,), processor="x86_64", gpu=False):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho '{smi}'\n" if smi else "#!/bin/sh\necho 'NVML 999.99 failed'\nexit 9\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        monkeypatch.setattr(doctor, "KERNEL_MODULE", tmp_path / "module")
        if module:
            doctor.KERNEL_MODULE.write_text(module)
        monkeypatch.setattr(doctor.platform, "machine", lambda: processor)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(doctor, "installed", lambda name: "2.4.0" if name in installed else None)
        cuda_version = {CUDA12: "12090", CUDA13: "13000"}
        monkeypatch.setattr(dali, "__cuda_version__", cuda_version[installed[0]] if installed else "13000")
        return {finding.name: finding for finding in doctor.examine()}

    return make


@pytest.mark.parametrize(
    ("driver", "cuda"),
    [("610.43.02", 13), ("580.65.06", 13), ("575.57.08", 12), ("570.86.15", 12), ("535.54.03", 12), ("525.60.13", 12)],
)
def test_the_cuda_version_of_a_driver(machine, driver, cuda):
    findings = machine(f"{driver}\n{driver}", cuda=f"{cuda}.0", installed=(f"nvidia-dali-cuda{cuda}0",))
    assert findings["NVIDIA driver"].status == f"{driver}, runs CUDA {cuda} and older"
    assert findings["NVIDIA driver"].good and not findings["NVIDIA driver"].fix
    assert findings["DALI"].good and "CUDA_VISIBLE_DEVICES" in findings["GPU"].fix


@pytest.mark.parametrize("driver", ["575.57.08", "550.54.15", "535.104.05", "525.60.13"])
def test_a_driver_that_is_too_old_for_cuda_13(machine, driver):
    findings = machine(driver)
    assert not findings["NVIDIA driver"].good and findings["NVIDIA driver"].fix == TO_12
    assert "too old for torch's CUDA 13.0, which needs 580 or newer" in findings["NVIDIA driver"].status
    assert "see above" in findings["GPU"].fix and not findings["GPU"].good
    assert machine(driver, installed=())["NVIDIA driver"].fix == "FASTTRAIN_CUDA=12 pip install ."


@pytest.mark.parametrize("cuda", ["13.0", "12.8"])
@pytest.mark.parametrize("driver", ["470.256.02", "515.105.01"])
def test_a_driver_that_is_too_old_for_all_versions(machine, driver, cuda):
    finding = machine(driver, cuda=cuda, installed=(f"nvidia-dali-cuda{cuda[:2]}0",))["NVIDIA driver"]
    assert not finding.good and "update the driver" in finding.fix and "pip" not in finding.fix


def test_an_old_driver_that_torch_can_use_is_fine(machine):
    """NVIDIA's forward compatibility package makes CUDA 13 run on older drivers."""
    findings = machine("550.54.15", gpu=True)
    assert findings["NVIDIA driver"].good and not findings["NVIDIA driver"].fix


@pytest.mark.parametrize("module", KERNEL_MODULES)
def test_the_kernel_module_is_read_without_nvidia_smi(machine, module):
    assert machine(module=module)["NVIDIA driver"].status.startswith("535.104.05, ")


def test_a_machine_without_a_driver(machine):
    findings = machine()
    assert "NVIDIA driver" not in findings and findings["GPU"].fix == "everything runs on the CPU"
    assert findings["torch"].good and findings["DALI"].good


@pytest.mark.parametrize(
    ("driver", "cuda", "installed", "command"),
    [
        ("", "12.8", CUDA13, TO_12),
        ("", "13.0", CUDA12, TO_13),
        ("550.54.15", "12.8", CUDA13, TO_12),
        ("550.54.15", "13.0", CUDA12, "FASTTRAIN_CUDA=12 pip install ."),
        ("580.65.06", "12.8", CUDA13, TO_12),
        ("580.65.06", "13.0", CUDA12, TO_13),
    ],
)
def test_torch_and_dali_for_different_cuda_versions(machine, driver, cuda, installed, command):
    finding = machine(driver, cuda=cuda, installed=(installed,))["DALI"]
    assert not finding.good and finding.needed and finding.fix == command
    assert f"but torch is built for CUDA {cuda[:2]}" in finding.status


@pytest.mark.parametrize(("cuda", "command"), [("12.8", "FASTTRAIN_CUDA=12 pip install ."), ("13.0", "pip install .")])
def test_two_installed_dali_distributions(machine, cuda, command):
    finding = machine(cuda=cuda, installed=(CUDA13, CUDA12))["DALI"]
    assert not finding.good and finding.fix == f"pip uninstall -y {CUDA13} {CUDA12} && {command}"


@pytest.mark.parametrize(("version", "good"), [("2.1.1", False), ("1.53.0", False), ("2.2.0", True), ("2.10.0", True)])
def test_an_old_dali(machine, monkeypatch, version, good):
    monkeypatch.setattr(dali, "__version__", version)
    finding = machine()["DALI"]
    assert finding.good == good and (finding.fix == "pip install .") == (not good)


@pytest.mark.parametrize(
    ("driver", "command"), [("", "pip install ."), ("580.65.06", "pip install ."), ("535.54.03", "FASTTRAIN_CUDA=12 ")]
)
@pytest.mark.parametrize("name", ["torch", "nvidia.dali"])
def test_missing_packages_are_installed_for_the_driver(machine, monkeypatch, driver, command, name):
    monkeypatch.setitem(sys.modules, name, None)
    if name == "nvidia.dali":
        monkeypatch.delattr("nvidia.dali")
    finding = machine(driver, installed=(), cuda="13.0")[{"torch": "torch", "nvidia.dali": "DALI"}[name]]
    assert not finding.good and finding.needed and finding.fix.startswith(command)


def test_a_dali_with_missing_files_is_reinstalled(machine, monkeypatch):
    """As after one of two builds was removed."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delattr("nvidia.dali")
    assert machine()["DALI"].fix == f"pip uninstall -y {CUDA13} && pip install ."


@pytest.mark.parametrize(
    ("driver", "processor", "command"),
    [
        ("580.65.06", "x86_64", "pip install ."),
        ("580.65.06", "aarch64", "pip install ."),
        ("535.54.03", "x86_64", "FASTTRAIN_CUDA=12 pip install ."),
        ("535.54.03", "aarch64", f"FASTTRAIN_CUDA=12 pip install . --extra-index-url {doctor.PYTORCH_INDEX}"),
    ],
)
def test_a_torch_without_cuda_on_a_machine_with_a_driver(machine, driver, processor, command):
    installed = (CUDA13 if driver >= "580" else CUDA12,)
    finding = machine(driver, cuda=None, installed=installed, processor=processor)["torch"]
    assert not finding.good and finding.fix == f"pip uninstall -y torch torchvision && {command}"


@pytest.mark.parametrize(
    ("processor", "good", "note"),
    [
        ("x86_64", True, ""),
        ("aarch64", True, "has not been run"),
        ("riscv64", False, "needs Linux on x86-64 or aarch64"),
    ],
)
def test_processors(machine, processor, good, note):
    finding = machine(processor=processor)["Python"]
    assert finding.good == good and note in finding.fix and bool(finding.fix) == bool(note)


def test_the_command_is_printed(machine):
    machine("550.54.15")
    lines = CliRunner().invoke(main, ["doctor"]).stdout.splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith("LACK  NVIDIA driver: 550.54.15"))
    assert lines[row + 1].strip() == TO_12


def test_dependencies_of_dali_are_removed_with_it(machine):
    """Their files have the same paths for both CUDA versions, so pip would count overwritten files as installed."""
    packages = (CUDA13, "nvidia-nvimgcodec-cu13", "nvidia-libnvcomp-cu12")
    expected = f"pip uninstall -y {' '.join(packages)} && FASTTRAIN_CUDA=12 pip install ."
    assert machine("535.54.03", cuda="12.8", installed=packages)["DALI"].fix == expected
