"""The decoders that can turn files into pixels, and which of them is safe. `decode_graph` has their DALI operators."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fasttrain.utils.errors import UserError
from fasttrain.utils.versions import nvimagecodec


@dataclass(frozen=True)
class Decoder:
    """How images are decoded: one of `config.choices.DECODERS`, but `auto`.

    `cpu`: libjpeg-turbo decodes the region that is needed, on the host. `gpu`: nvJPEG decodes the whole image on the
    GPU's cores, and the region is cut out of it. `gpu-region`: nvJPEG decodes the region. `gpu-hardware`: as `gpu`, and
    on the GPU's JPEG engine, where it has one; hardware_load (0 … 1) is DALI's hw_decoder_load, the share of a batch
    that goes there. With 0.65 an H200 seemed to decode there all that the engine takes.
    """

    kind: str = "cpu"
    hardware_load: float = 0.0


class Rule(NamedTuple):
    """What holds from a version of nvImageCodec on. auto: the fastest decoder that is known to be correct on a GPU.
    refused: the decoders that are known to crash. why: a public reference for both."""

    since: tuple[int, int]
    auto: str
    refused: tuple[str, ...]
    why: str


# Newest first. DALI 2.2 comes with nvImageCodec 0.8, DALI 2.3 and 2.4 with 0.9.
RULES = (
    Rule((0, 9), "gpu", ("gpu-region",), "nvImageCodec 0.9 crashes in it (NVIDIA/nvImageCodec#55)"),
    # It decodes regions on a GPU, but whole images of truncated BMP files from what lies behind them in memory.
    Rule((0, 0), "cpu", (), "nvImageCodec 0.8 reads past the end of a truncated BMP"),
)
# `gpu-hardware` is never `auto`: on H100 nvJPEG's hardware decoder may write its output without waiting for the
# stream (meta-pytorch/torchcodec#1634), which corrupts pixels without an error.


def rule() -> Rule:
    """The rule for the nvImageCodec that is installed; for the newest where its version is not known."""
    parts = re.match(r"(\d+)\.(\d+)", nvimagecodec() or "")
    if not parts:
        return RULES[0]
    version = int(parts[1]), int(parts[2])
    return next(each for each in RULES if each.since <= version)


def resolve(kind: str, device: torch.device) -> str:
    """The decoder that a setting (one of `config.choices.DECODERS`) stands for on a device. A CPU decodes by itself,
    whatever the setting. Raises UserError for a decoder that crashes with the installed nvImageCodec."""
    if device.type == "cpu":
        return "cpu"
    known = rule()
    if kind in known.refused:
        older = "pip install 'nvidia-dali-cuda130==2.2.*' (for CUDA 12: nvidia-dali-cuda120)"
        raise UserError(f"the decoder {kind} is refused: {known.why}; leave machine.decoder at auto, or {older}")
    return known.auto if kind == "auto" else kind
