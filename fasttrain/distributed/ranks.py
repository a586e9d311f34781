"""Ranks: what torchrun says of them, and the few things that they do together."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttrain.distributed import signals
from fasttrain.utils.errors import CommandError, RunError, Stopped, UserError
from fasttrain.utils.tensors import by_dtype, flatten, unflatten_into

T = TypeVar("T")
_FAILED = "fasttrain/failed"


@dataclass(frozen=True)
class Ranks:
    """This process among the run's: rank of world, local_rank of local_world on this node, and its device."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of the cores that the process may use."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world)

    def threads(self, workers: int) -> int:
        """DALI threads: `workers`, or this rank's share of the cores that the process may use. On a GPU two of them are
        left to the loop and to the threads that the decoder has of its own."""
        return workers or max(1, self.cores - 2 if self.device.type == "cuda" else self.cores)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of each element over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each element over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank; waits for all of them."""
        if self.world == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag)
        return bool(flag > 0)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics), as DDP does before each forward."""
        if self.world > 1:
            for buffers in by_dtype(model.buffers()):
                values = flatten(buffers)
                dist.broadcast(values, 0)
                unflatten_into(values, buffers)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on rank 0; on the others their own alone."""
        if self.world == 1:
            return [value]
        found: list[object] | None = [None] * self.world if self.first else None
        dist.gather_object(value, found)
        return found if found is not None else [value]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work()`, on each node by its first rank before the others, which can then find what it cached."""
        if self.world == 1:
            return work()
        result = work() if self.local_rank == 0 else None
        dist.barrier()
        if self.local_rank:
            result = work()
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work()` gives on rank 0, on every rank."""
        if self.world == 1:
            return work()
        result: list[object] = [work() if self.first else None]
        dist.broadcast_object_list(result, 0)
        return result[0]  # type: ignore[return-value]


def rank_of_world() -> tuple[int, int]:
    """(rank, world) of the process group that this process is in; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(value: Tensor) -> Tensor:
    """The sum over ranks of a tensor, as a new one, outside of any graph."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather_rows(rows: Tensor) -> Tensor:
    """The ranks' rows [B, ...] one rank after another, [world · B, ...]; B must be the same on all of them.

    Differentiable where the rows are: a rank's gradient is the sum of what all ranks ask of its rows.
    """
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.size
        return gradient[start : start + ctx.size]


@contextmanager
def ranks(device: str, patience_s: float = 1800.0) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, or be alone.

    device: auto, cpu or cuda. patience_s: how long an exchange may wait for a rank (see `watchdog.Watch`, which comes
    before and says more). On an error in the body the other ranks are told, so that one message is printed: that
    of the rank that failed first. Raises UserError when CUDA is asked for and not there.
    """
    rank, world, local_rank, local_world = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        _check_gpu(local_rank)
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, 0, 1, place)
        return
    timeout = timedelta(seconds=max(1800.0, 2 * patience_s + 60))
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=place if on_gpu else None, timeout=timeout)
    try:
        yield Ranks(rank, world, local_rank, local_world, place)
    except Stopped as stopped:  # all ranks together, and one of them says so
        dist.destroy_process_group()
        raise stopped if rank == 0 else Stopped() from None
    except Exception as error:
        raise _first_failure(error, rank) from error
    finally:
        # A rank that failed must not wait here for others that are stuck in a collective: torchrun ends them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _check_gpu(local_rank: int) -> None:
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; `fasttrain doctor` says what is missing")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}")


class StopSignals:
    """While it is open, SIGTERM and SIGUSR1 do not end the process: the loop asks for them after each step."""

    LAG = 2  # steps by which a GPU's ranks hear of each other

    def __enter__(self) -> "StopSignals":
        signals.install()
        self.votes: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        signals.restore()

    @property
    def name(self) -> str:
        """The signal that has come to this rank, or nothing."""
        return signals.received()

    def agreed(self, ranks: Ranks) -> bool:
        """Whether to stop after this step, on all ranks or none; to be asked once a step.

        GPUs answer for the step `LAG` before: their sum is on its way to the host since then, and a host that is so
        far ahead has work enough queued to wait for it.
        """
        if ranks.world == 1 or ranks.device.type == "cpu":
            return ranks.any(bool(self.name))
        vote = torch.full((), float(bool(self.name)), device=ranks.device)
        dist.all_reduce(vote)
        told = torch.empty((), pin_memory=True)
        told.copy_(vote, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.votes.append((told, event))
        if len(self.votes) <= self.LAG:
            return False
        told, event = self.votes.popleft()
        event.synchronize()
        return bool(told)


class PeerFailure(RunError):
    """Another rank failed first and has said why; there is nothing to add."""


def _first_failure(error: Exception, rank: int) -> Exception:
    """The error to end with: this rank's own, told to the others, or PeerFailure when another was first."""
    try:
        store = dist.distributed_c10d._get_default_store()
        if not isinstance(error, CommandError):  # broken collectives are what another rank's end looks like from here
            store.wait([_FAILED], timedelta(seconds=3))
        if int(store.add(_FAILED + "/count", 1)) > 1:
            return PeerFailure()
        store.set(_FAILED, str(rank))
    except (RuntimeError, ValueError):  # nobody else failed (the wait timed out), or the store is gone
        return error
    return type(error)(f"rank {rank}: {error}") if isinstance(error, CommandError) else error
