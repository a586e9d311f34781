"""The image decoders, and which of them are safe. `decode_graph` has their DALI operators."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fasttrain.utils.errors import UserError
from fasttrain.utils.versions import nvimagecodec


@dataclass(frozen=True)
class Decoder:
    """How images are decoded.

    kind: one of `config.choices.DECODERS` except `auto`. `cpu`: libjpeg-turbo decodes the needed region on the host.
    `gpu`: nvJPEG decodes the full image on the GPU's cores, then the region is sliced out. `gpu-region`: nvJPEG decodes
    the region. `gpu-hardware`: like `gpu`, but the GPU's JPEG engine, if it has one, decodes a part of each batch.
    hardware_load (0 … 1): that part, DALI's hw_decoder_load; 0.65 seemed to saturate the engine of an H200.
    """

    kind: str = "cpu"
    hardware_load: float = 0.0


class Rule(NamedTuple):
    """What applies to nvImageCodec `since` and newer. auto: the fastest decoder that is known to be correct on a GPU.
    refused: the decoders that are known to crash. why: the reason, with a public reference where one exists."""

    since: tuple[int, int]
    auto: str
    refused: tuple[str, ...]
    why: str


# Newest first. DALI 2.2 comes with nvImageCodec 0.8, DALI 2.3 and 2.4 with 0.9.
RULES = (
    Rule((0, 9), "gpu", ("gpu-region",), "nvImageCodec 0.9 crashes in it (NVIDIA/nvImageCodec#55)"),
    # It decodes regions on a GPU correctly. For a full image of a truncated BMP file it returns arbitrary memory.
    Rule((0, 0), "cpu", (), "nvImageCodec 0.8 reads past the end of a truncated BMP"),
)
# `gpu-hardware` is never `auto`: on H100 nvJPEG's hardware decoder may write its output without waiting for the
# stream (meta-pytorch/torchcodec#1634), which corrupts pixels without an error.


def rule() -> Rule:
    """The rule for the installed nvImageCodec; the newest rule if its version is unknown."""
    parts = re.match(r"(\d+)\.(\d+)", nvimagecodec() or "")
    if not parts:
        return RULES[0]
    version = int(parts[1]), int(parts[2])
    return next(entry for entry in RULES if entry.since <= version)


def resolve(kind: str, device: torch.device) -> str:
    """The decoder for a setting (one of `config.choices.DECODERS`) on a device; on the CPU it is always `cpu`.

    Raises UserError for a decoder that crashes with the installed nvImageCodec.
    """
    if device.type == "cpu":
        return "cpu"
    current = rule()
    if kind in current.refused:
        older = "pip install 'nvidia-dali-cuda130==2.2.*' (for CUDA 12: nvidia-dali-cuda120)"
        raise UserError(f"the decoder {kind} is refused: {current.why}; leave machine.decoder at auto, or {older}")
    return current.auto if kind == "auto" else kind
