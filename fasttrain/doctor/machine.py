"""Checks whether a machine has what training needs, without starting a run."""

import importlib.metadata
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.doctor.packages import Requirement, checkout, pip_install, requirements
from fasttrain.utils.versions import COMPANIONS, DALI, installed

# The oldest NVIDIA driver that runs each CUDA version: NVIDIA's table of minor version compatibility.
OLDEST_DRIVER = {13: 580, 12: 525}
# PyPI's torch 2.10 has CUDA 12 on x86-64 only. On aarch64 its CUDA 12 build comes from PyTorch's own index.
PYTORCH_INDEX = "https://download.pytorch.org/whl/cu128"
# The version of the kernel module, for containers and machines without nvidia-smi.
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_TORCH = ("torch", "torchvision", "triton")  # are installed together, since their versions belong together


@dataclass(frozen=True)
class Finding:
    """The result of one check. name: what was checked. status: its version or what is wrong. needed: whether fasttrain
    cannot run without it. fix: the command or advice that fixes it, or empty; it may have several lines."""

    name: str
    status: str
    good: bool = True
    needed: bool = True
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, in the order to print them."""
    driver = driver_version()
    findings = [_python()]
    torch = _torch(findings, driver)
    if driver:
        findings.append(_driver(driver, torch))
    cuda = _cuda_for(driver, torch)
    checked = {*_TORCH, *DALI}
    if torch is not None:  # the others cannot be imported without it
        for name in ("torchvision", "timm", "triton"):
            findings.append(_package(name, install_command(cuda, names=(name,)), needed=name != "triton"))
            checked.add(name)
        findings += _gpu(torch, driver)
    return [*findings, _dali(torch, driver), *_by_metadata(checked, cuda)]


def driver_version() -> str:
    """The version of the NVIDIA driver; empty where none is installed."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        text = KERNEL_MODULE.read_text() if KERNEL_MODULE.exists() else ""
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return version[0] if version else ""


def newest_cuda(driver: str) -> int:
    """The newest CUDA major version that a driver supports; 0 without a driver, or with one too old for all of them."""
    branch = int(driver.split(".")[0]) if driver else 0
    return max((cuda for cuda, oldest in OLDEST_DRIVER.items() if branch >= oldest), default=0)


def install_command(cuda: int, remove: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> str:
    """The command that installs fasttrain with the builds for a CUDA version, after removing conflicting packages and
    those in `remove`. Without a checkout of the source, it installs only these and the packages in `names`."""
    dali = _dali_installed()
    if dali != (f"nvidia-dali-cuda{cuda}0",):
        companions = (name for name in COMPANIONS if installed(name))
        remove = tuple(dict.fromkeys((*remove, *dali, *companions)))
    source = checkout()
    if source is None:
        command = _install_by_name(cuda, {*names, *remove, *(DALI if dali and dali[0] in remove else ())})
    else:
        command = f"{'FASTTRAIN_CUDA=12 ' if cuda == 12 else ''}pip install {shlex.quote(source)}"
        if cuda == 12 and platform.machine() == "aarch64":
            command += f" --extra-index-url {PYTORCH_INDEX}"
    return f"pip uninstall -y {' '.join(remove)} && {command}" if remove else command


def _install_by_name(cuda: int, names: set[str]) -> str:
    """The command that installs packages as fasttrain requires them. A wheel of fasttrain is for one CUDA version."""
    required = [requirement for requirement in requirements() or [] if not requirement.extra]
    if f"nvidia-dali-cuda{cuda}0" not in [requirement.name for requirement in required]:
        variable = "FASTTRAIN_CUDA=12 " if cuda == 12 else ""
        return f"{variable}pip install . # in the folder of fasttrain's source; its wheel is for another CUDA version"
    return pip_install([requirement for requirement in required if requirement.name in names])


def _dali_installed() -> tuple[str, ...]:
    """The installed DALI distributions. Two of them overwrite each other's files, so they must be removed first."""
    return tuple(name for name in DALI if installed(name))


def _cuda_for(driver: str, torch: Any) -> int:
    """The CUDA version to install for: torch's if the driver supports it, else the newest that it supports."""
    newest = newest_cuda(driver) or 13  # a driver that is too old for all versions has to be updated first
    current = _cuda_of(torch)
    return current if current in OLDEST_DRIVER and current <= newest else newest


def _cuda_of(torch: Any) -> int:
    """The CUDA major version that torch is built for; 0 without CUDA or without torch."""
    version = getattr(getattr(torch, "version", None), "cuda", None)
    return int(version.split(".")[0]) if version else 0


def _python() -> Finding:
    machine = platform.machine()
    good = sys.version_info >= (3, 11) and sys.platform == "linux" and machine in ("x86_64", "aarch64")
    status = f"{platform.python_version()} on {sys.platform} {machine}"
    if not good:
        return Finding("Python", status, good, fix="needs Linux on x86-64 or aarch64, and Python 3.11 or newer")
    untested = "all packages have builds for aarch64, but fasttrain has not been run on it yet"
    return Finding("Python", status, fix=untested if machine == "aarch64" else "")


def _torch(findings: list[Finding], driver: str) -> Any:
    try:
        import torch
    except ImportError as error:
        fix = install_command(_cuda_for(driver, None), names=_TORCH)
        findings.append(Finding("torch", str(error), good=False, fix=fix))
        return None
    version = torch.__version__
    cuda = _cuda_for(driver, torch)
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        findings.append(Finding("torch", version, good=False, fix=install_command(cuda, names=_TORCH)))
    elif torch.version.cuda:
        findings.append(Finding("torch", f"{version}, CUDA {torch.version.cuda}"))
    elif driver:
        fix = install_command(cuda, remove=("torch", "torchvision"))
        findings.append(Finding("torch", f"{version} (a build without CUDA)", good=False, needed=False, fix=fix))
    elif version.endswith("+cpu"):
        fix = "torchvision and timm cannot be imported with it: pip install --force-reinstall torch torchvision"
        findings.append(Finding("torch", f"{version} (a build without CUDA)", good=False, fix=fix))
    else:
        findings.append(Finding("torch", f"{version} (a build without CUDA)"))
    return torch


def _package(name: str, fix: str, needed: bool = True) -> Finding:
    try:
        __import__(name)
        return Finding(name, importlib.metadata.version(name))
    except Exception as error:  # with the wrong torch, a package can raise any exception
        return Finding(name, f"cannot be imported: {str(error).splitlines()[0]}", False, needed, fix)


def _by_metadata(checked: set[str], cuda: int) -> list[Finding]:
    """Findings on the packages that are not in `checked`: those that fasttrain needs, and those of its extras."""
    required = requirements()
    if required is None:
        status = "runs from its folder and is not installed, so the packages that it needs are not checked"
        return [Finding("fasttrain", status, good=False, needed=False, fix=install_command(cuda))]
    others = [each for each in required if not each.extra and each.name not in checked]
    problems = [each for each in others if each.problem]
    if problems:
        fix = install_command(cuda, names=tuple(each.name for each in problems))
        absent = [each.name for each in problems if not installed(each.name)]
        parts = [each.problem for each in problems if installed(each.name)]
        parts += [f"not installed: {', '.join(absent)}"] if absent else []
        needed = Finding("other packages", "; ".join(parts), good=False, fix=fix)
    else:
        needed = Finding("other packages", _versions(others))
    return [needed, _optional([each for each in required if each.extra not in ("", "test")])]


def _optional(required: list[Requirement]) -> Finding:
    """One finding on all extras. It is good in any case: what is missing is needed only for what the extra names."""
    source, present, missing, fixes = checkout(), [], [], []
    for extra in dict.fromkeys(each.extra for each in required):
        group = [each for each in required if each.extra == extra]
        problems = [each for each in group if each.problem]
        if not problems:
            present.append(f"{extra} ({_versions(group)})")
            continue
        outdated = [each.problem for each in problems if installed(each.name)]
        missing.append(f"{extra} ({'; '.join(outdated)})" if outdated else extra)
        install = pip_install(problems) if source is None else shlex.join(["pip", "install", f"{source}[{extra}]"])
        fixes.append(f"for {extra}: {install}")
    parts = [", ".join(present)] if present else []
    parts += [f"not installed: {', '.join(missing)}"] if missing else []
    return Finding("optional packages", "; ".join(parts), fix="\n".join(fixes))


def _versions(required: list[Requirement]) -> str:
    return ", ".join(f"{each.name} {installed(each.name)}" for each in required)


def _driver(driver: str, torch: Any) -> Finding:
    newest = newest_cuda(driver)
    status = f"{driver}, runs CUDA {newest} and older" if newest else f"{driver}, too old for CUDA 12"
    if torch is not None and torch.cuda.is_available():
        return Finding("NVIDIA driver", status)  # of any version: NVIDIA's compatibility package supports old ones
    if not newest:
        fix = f"update the driver: CUDA 13 needs {OLDEST_DRIVER[13]} or newer, CUDA 12 {OLDEST_DRIVER[12]} or newer"
        return Finding("NVIDIA driver", status, good=False, needed=False, fix=fix)
    if _cuda_of(torch) > newest:
        status = f"{driver}, too old for torch's CUDA {torch.version.cuda}, which needs {OLDEST_DRIVER[13]} or newer"
        return Finding("NVIDIA driver", status, good=False, needed=False, fix=install_command(newest, names=_TORCH))
    return Finding("NVIDIA driver", status)


def _dali(torch: Any, driver: str) -> Finding:
    try:
        from nvidia import dali
    except ImportError as error:
        fix = install_command(_cuda_for(driver, torch), _dali_installed(), names=DALI)
        return Finding("DALI", str(error), False, fix=fix)
    built = getattr(dali, "__cuda_version__", "")
    cuda = int(built) // 1000 if str(built).isdigit() else 0
    status = f"{dali.__version__}, built for CUDA {cuda or 'of an unknown version'}"
    install = install_command(_cuda_for(driver, torch), names=DALI)
    if len(names := _dali_installed()) > 1:
        status = f"{' and '.join(names)} are both installed and overwrite each other's files"
        return Finding("DALI", status, good=False, fix=install)
    if tuple(int(part) for part in dali.__version__.split(".")[:2]) < (2, 2):
        return Finding("DALI", f"{status}; needs 2.2 or newer", good=False, fix=install)
    if _cuda_of(torch) and cuda != _cuda_of(torch):
        return Finding("DALI", f"{status}, but torch is built for CUDA {_cuda_of(torch)}", good=False, fix=install)
    return Finding("DALI", status)


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
        gpu = torch.cuda.get_device_properties(number)
        status = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        findings.append(Finding(f"GPU {number}", status, fix="" if gpu.major >= 8 else "no bf16: fp16 is used"))
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    fix = "" if compiler else "Triton needs it to compile kernels: install gcc"
    findings.append(Finding("C compiler", compiler or "none", good=bool(compiler), fix=fix))
    return findings
