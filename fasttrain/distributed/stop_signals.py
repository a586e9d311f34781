"""Stopping all ranks after the same step when one of them receives a signal."""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.distributed import signals
from fasttrain.distributed.ranks import Ranks


class StopSignals:
    """While this context is open, the stop signals do not end the process: the loop asks for them at each step. Where
    they already did not before, they still do not afterwards, and what was received stays known."""

    LAG = 2  # steps after which GPUs' votes are read

    def __enter__(self) -> "StopSignals":
        self.installed = signals.install()
        self.votes: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        if self.installed:
            signals.restore()

    @property
    def name(self) -> str:
        """The signal that this rank has received, or an empty string."""
        return signals.received()

    def agreed(self, ranks: Ranks) -> bool:
        """Whether all ranks stop after this step. Every rank must ask once per step.

        On GPUs the answer is that of `LAG` steps before. Its sum has been on its way to the host since then, so the
        host hardly waits for it.
        """
        if ranks.world == 1 or ranks.device.type == "cpu":
            return ranks.any(bool(self.name))
        vote = torch.full((), float(bool(self.name)), device=ranks.device)
        dist.all_reduce(vote)
        on_host = torch.empty((), pin_memory=True)
        on_host.copy_(vote, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.votes.append((on_host, event))
        if len(self.votes) <= self.LAG:
            return False
        on_host, event = self.votes.popleft()
        event.synchronize()
        return bool(on_host)
