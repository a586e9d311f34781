"""Versions of installed packages, read from their metadata: nothing is imported."""

from importlib import metadata

# DALI and nvImageCodec have a distribution for each major version of CUDA.
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
NVIMAGECODEC = ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")
# DALI's dependencies. The builds for the two CUDA versions have files with the same paths, so after a switch pip would
# count overwritten files as installed.
COMPANIONS = tuple(
    f"nvidia-{name}-cu{cuda}" for cuda in (13, 12) for name in ("nvimgcodec", "nvjpeg2k", "nvtiff", "libnvcomp")
)
OTHERS = ("torch", "triton", "timm", "torchvision", "pytorch-metric-learning", "pillow")


def installed(*names: str) -> str | None:
    """The version of the first installed one of these distributions, or None."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def nvimagecodec() -> str | None:
    """The version of the nvImageCodec that the installed DALI uses, or None."""
    cuda12 = installed(DALI[0]) is None and installed(DALI[1]) is not None
    return installed(*(NVIMAGECODEC[::-1] if cuda12 else NVIMAGECODEC))


def all_installed() -> dict[str, str]:
    """The versions of the installed packages that affect speed, by name."""
    versions = {"nvidia-dali": installed(*DALI), "nvidia-nvimgcodec": nvimagecodec()}
    versions |= {name: installed(name) for name in OTHERS}
    return {name: version for name, version in versions.items() if version}
