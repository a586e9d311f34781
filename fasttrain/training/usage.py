"""What a command's training has used: time, and the energy of its GPUs."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from fasttrain.distributed.ranks import Ranks
from fasttrain.utils import energy


@dataclass(frozen=True)
class Usage:
    """Counts from `start` on. uuid: of this rank's GPU; empty on a CPU. joules: its counter at the start."""

    ranks: Ranks
    started: float
    uuid: str
    joules: float | None

    @classmethod
    def start(cls, ranks: Ranks) -> "Usage":
        on_gpu = ranks.device.type == "cuda"
        uuid = str(getattr(torch.cuda.get_device_properties(ranks.device), "uuid", "")) if on_gpu else ""
        return cls(ranks, time.monotonic(), uuid, energy.joules(uuid))

    def so_far(self) -> dict[str, Any]:
        """`seconds`, and `joules` where NVML counts them for every rank's GPU; on rank 0. All ranks call it together.
        Ranks that share a GPU count it once."""
        now = energy.joules(self.uuid)
        used = None if now is None or self.joules is None else now - self.joules
        of_gpus = dict(self.ranks.gather((self.uuid, used)))
        values = {"seconds": round(time.monotonic() - self.started, 2)}
        known = [each for each in of_gpus.values() if each is not None]
        return values | ({"joules": round(sum(known), 1)} if len(known) == len(of_gpus) else {})
