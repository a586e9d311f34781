"""What a machine has and lacks for training, found without starting anything."""

import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing looked at. needed: whether nothing runs without it. mend: the line that helps, or nothing."""

    what: str
    found: str
    good: bool = True
    needed: bool = True
    mend: str = ""


def examine() -> list[Finding]:
    findings = [_python()]
    torch = _torch(findings)
    if torch is not None:
        findings += [_package("torchvision"), _package("timm"), _package("triton", needed=False)]
        findings += _gpu(torch)
    findings += [_dali(torch), _package("tensorboard", needed=False, mend="pip install tensorboard")]
    return findings


def _python() -> Finding:
    good = sys.version_info >= (3, 11) and sys.platform == "linux" and platform.machine() == "x86_64"
    found = f"{platform.python_version()} on {sys.platform} {platform.machine()}"
    return Finding("Python", found, good, mend="" if good else "needs Linux on x86-64 and Python 3.11 or newer")


def _torch(findings: list[Finding]) -> Any:
    try:
        import torch
    except ImportError as error:
        findings.append(Finding("torch", str(error), good=False, mend="pip install ."))
        return None
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        findings.append(Finding("torch", version, good=False, mend='pip install --upgrade "torch>=2.10"'))
    elif version.endswith("+cpu"):
        mend = "torchvision and timm cannot be imported beside it: pip install --force-reinstall torch torchvision"
        findings.append(Finding("torch", f"{version} (a build without CUDA)", good=False, mend=mend))
    else:
        findings.append(Finding("torch", f"{version}, CUDA {torch.version.cuda}"))
    return torch


def _package(name: str, needed: bool = True, mend: str = "pip install .") -> Finding:
    try:
        __import__(name)
        return Finding(name, importlib.metadata.version(name))
    except Exception as error:  # a package beside the wrong torch fails in any way
        return Finding(name, f"cannot be imported: {str(error).splitlines()[0]}", False, needed, mend)


def _dali(torch: Any) -> Finding:
    try:
        from nvidia import dali
    except ImportError as error:
        return Finding("DALI", str(error), good=False, mend="pip install nvidia-dali-cuda130")
    built = getattr(dali, "__cuda_version__", "")
    cuda = str(int(built) // 1000) if str(built).isdigit() else "an unknown version"
    found = f"{dali.__version__}, built for CUDA {cuda}"
    if torch is not None and torch.version.cuda and cuda != torch.version.cuda.split(".")[0]:
        major = torch.version.cuda.split(".")[0]
        return Finding("DALI", found, good=False, mend=f"torch has CUDA {major}: pip install nvidia-dali-cuda{major}0")
    return Finding("DALI", found)


def _gpu(torch: Any) -> list[Finding]:
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        mend = "the driver is older than torch's CUDA: update it" if driver else "everything runs on the CPU"
        return [Finding("GPU", "none that torch can use", good=False, needed=False, mend=mend)]
    findings = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        findings.append(Finding(f"GPU {number}", found, mend="" if about.major >= 8 else "no bf16: fp16 is used"))
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    mend = "" if compiler else "Triton compiles kernels with it: install gcc"
    findings.append(Finding("C compiler", compiler or "none", good=bool(compiler), mend=mend))
    return findings
