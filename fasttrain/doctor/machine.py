"""What a machine has and lacks for training, found without starting anything."""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.utils.versions import COMPANIONS, DALI, installed

# The oldest NVIDIA driver that runs each CUDA version: NVIDIA's table of minor version compatibility.
OLDEST_DRIVER = {13: 580, 12: 525}
# PyPI's torch 2.10 has CUDA 12 on x86-64 only. On aarch64 its CUDA 12 build comes from PyTorch's own index.
PYTORCH_INDEX = "https://download.pytorch.org/whl/cu128"
# The kernel module's own account, for containers and machines without nvidia-smi.
KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. needed: whether nothing runs without it. fix: the line that helps, or nothing."""

    what: str
    found: str
    good: bool = True
    needed: bool = True
    fix: str = ""


def examine() -> list[Finding]:
    driver = driver_version()
    findings = [_python()]
    torch = _torch(findings, driver)
    if driver:
        findings.append(_driver(driver, torch))
    if torch is not None:
        install = install_command(_cuda_for(driver, torch))
        findings += [_package("torchvision", install), _package("timm", install)]
        findings += [_package("triton", install, needed=False), *_gpu(torch, driver)]
    findings += [_dali(torch, driver), _package("tensorboard", "pip install tensorboard", needed=False)]
    return findings


def driver_version() -> str:
    """The version of the NVIDIA driver, or nothing where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        text = KERNEL_MODULE.read_text() if KERNEL_MODULE.exists() else ""
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return version[0] if version else ""


def newest_cuda(driver: str) -> int:
    """The newest CUDA version that a driver runs; 0 without a driver, or with one that is too old for all."""
    branch = int(driver.split(".")[0]) if driver else 0
    return max((cuda for cuda, oldest in OLDEST_DRIVER.items() if branch >= oldest), default=0)


def install_command(cuda: int, remove: tuple[str, ...] = ()) -> str:
    """The command that installs fasttrain with the builds for a CUDA version, after removing what is in their way."""
    command = "FASTTRAIN_CUDA=12 pip install ." if cuda == 12 else "pip install ."
    if cuda == 12 and platform.machine() == "aarch64":
        command += f" --extra-index-url {PYTORCH_INDEX}"
    dali = _dali_installed()
    if dali != (f"nvidia-dali-cuda{cuda}0",):
        companions = (name for name in COMPANIONS if installed(name))
        remove = tuple(dict.fromkeys((*remove, *dali, *companions)))
    return f"pip uninstall -y {' '.join(remove)} && {command}" if remove else command


def _dali_installed() -> tuple[str, ...]:
    """The distributions of DALI that are installed. Two overwrite each other's files: one must be removed first."""
    return tuple(name for name in DALI if installed(name))


def _cuda_for(driver: str, torch: Any) -> int:
    """The CUDA version to install for: torch's own where the driver runs it, else the newest that the driver runs."""
    newest = newest_cuda(driver) or 13  # a driver that is too old for all has to be updated first
    own = _cuda_of(torch)
    return own if own in OLDEST_DRIVER and own <= newest else newest


def _cuda_of(torch: Any) -> int:
    """The major version of CUDA that torch is built for; 0 without CUDA or without torch."""
    version = getattr(getattr(torch, "version", None), "cuda", None)
    return int(version.split(".")[0]) if version else 0


def _python() -> Finding:
    machine = platform.machine()
    good = sys.version_info >= (3, 11) and sys.platform == "linux" and machine in ("x86_64", "aarch64")
    found = f"{platform.python_version()} on {sys.platform} {machine}"
    if not good:
        return Finding("Python", found, good, fix="needs Linux on x86-64 or aarch64, and Python 3.11 or newer")
    untested = "all packages have builds for aarch64, but fasttrain has not been run on it yet"
    return Finding("Python", found, fix=untested if machine == "aarch64" else "")


def _torch(findings: list[Finding], driver: str) -> Any:
    try:
        import torch
    except ImportError as error:
        findings.append(Finding("torch", str(error), good=False, fix=install_command(_cuda_for(driver, None))))
        return None
    version = torch.__version__
    cuda = _cuda_for(driver, torch)
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        findings.append(Finding("torch", version, good=False, fix=install_command(cuda)))
    elif torch.version.cuda:
        findings.append(Finding("torch", f"{version}, CUDA {torch.version.cuda}"))
    elif driver:
        fix = install_command(cuda, remove=("torch", "torchvision"))
        findings.append(Finding("torch", f"{version} (a build without CUDA)", good=False, needed=False, fix=fix))
    elif version.endswith("+cpu"):
        fix = "torchvision and timm cannot be imported beside it: pip install --force-reinstall torch torchvision"
        findings.append(Finding("torch", f"{version} (a build without CUDA)", good=False, fix=fix))
    else:
        findings.append(Finding("torch", f"{version} (a build without CUDA)"))
    return torch


def _package(name: str, fix: str, needed: bool = True) -> Finding:
    try:
        __import__(name)
        return Finding(name, importlib.metadata.version(name))
    except Exception as error:  # a package beside the wrong torch fails in any way
        return Finding(name, f"cannot be imported: {str(error).splitlines()[0]}", False, needed, fix)


def _driver(driver: str, torch: Any) -> Finding:
    newest = newest_cuda(driver)
    found = f"{driver}, runs CUDA {newest} and older" if newest else f"{driver}, too old for CUDA 12"
    if torch is not None and torch.cuda.is_available():
        return Finding("NVIDIA driver", found)  # whatever its version: NVIDIA's compatibility package helps old ones
    if not newest:
        fix = f"update the driver: CUDA 13 needs {OLDEST_DRIVER[13]} or newer, CUDA 12 {OLDEST_DRIVER[12]} or newer"
        return Finding("NVIDIA driver", found, good=False, needed=False, fix=fix)
    if _cuda_of(torch) > newest:
        found = f"{driver}, too old for torch's CUDA {torch.version.cuda}, which needs {OLDEST_DRIVER[13]} or newer"
        return Finding("NVIDIA driver", found, good=False, needed=False, fix=install_command(newest))
    return Finding("NVIDIA driver", found)


def _dali(torch: Any, driver: str) -> Finding:
    try:
        from nvidia import dali
    except ImportError as error:
        return Finding("DALI", str(error), False, fix=install_command(_cuda_for(driver, torch), _dali_installed()))
    built = getattr(dali, "__cuda_version__", "")
    cuda = int(built) // 1000 if str(built).isdigit() else 0
    found = f"{dali.__version__}, built for CUDA {cuda or 'of an unknown version'}"
    install = install_command(_cuda_for(driver, torch))
    if len(names := _dali_installed()) > 1:
        found = f"{' and '.join(names)} are both installed and overwrite each other's files"
        return Finding("DALI", found, good=False, fix=install)
    if tuple(int(part) for part in dali.__version__.split(".")[:2]) < (2, 2):
        return Finding("DALI", f"{found}; needs 2.2 or newer", good=False, fix=install)
    if _cuda_of(torch) and cuda != _cuda_of(torch):
        return Finding("DALI", f"{found}, but torch is built for CUDA {_cuda_of(torch)}", good=False, fix=install)
    return Finding("DALI", found)


def _gpu(torch: Any, driver: str) -> list[Finding]:
    if not torch.cuda.is_available():
        if not driver:
            fix = "everything runs on the CPU"
        elif not _cuda_of(torch) or _cuda_of(torch) > newest_cuda(driver):
            fix = "torch does not fit the driver; see above"
        else:
            fix = "nvidia-smi lists the GPUs; CUDA_VISIBLE_DEVICES can hide them"
        return [Finding("GPU", "none that torch can use", good=False, needed=False, fix=fix)]
    findings = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        findings.append(Finding(f"GPU {number}", found, fix="" if about.major >= 8 else "no bf16: fp16 is used"))
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    fix = "" if compiler else "Triton compiles kernels with it: install gcc"
    findings.append(Finding("C compiler", compiler or "none", good=bool(compiler), fix=fix))
    return findings
