"""The ranks of a run, as torchrun describes them, and what they do together."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttrain.utils.environment import torchrun_variable
from fasttrain.utils.errors import CommandError, RunError, Stopped, UserError
from fasttrain.utils.tensors import by_dtype, flatten, unflatten_into
from fasttrain.utils.text import printable

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
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of the cores that the process may use."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world)

    def threads(self, workers: int) -> int:
        """Number of DALI threads: `workers`, or this rank's share of the cores. On a GPU the share leaves two cores to
        the loop and to the decoder's own threads."""
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
        """Whether `here` is true on any rank; waits for all of them."""
        if self.world == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag)
        return bool(flag > 0)

    def share_buffers(self, model: nn.Module) -> None:
        """Copy rank 0's buffers (BatchNorm's running statistics) to every rank, as DDP does before each forward."""
        if self.world > 1:
            for buffers in by_dtype(model.buffers()):
                values = flatten(buffers)
                dist.broadcast(values, 0)
                unflatten_into(values, buffers)

    def gather(self, value: T) -> list[T]:
        """All ranks' values, in their order, on rank 0; on other ranks a list of their own value."""
        if self.world == 1:
            return [value]
        values: list[object] | None = [None] * self.world if self.first else None
        dist.gather_object(value, values)
        return values if values is not None else [value]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work()`, first on each node's first rank and then on its other ranks, which find what it has cached."""
        if self.world == 1:
            return work()
        result = work() if self.local_rank == 0 else None
        dist.barrier()
        if self.local_rank:
            result = work()
        return result  # type: ignore[return-value]

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks have the same facts, by name. Raises UserError on all ranks, which names the first rank
        that differs from rank 0, its host and what differs."""
        if self.world == 1:
            return

        def compare(all_facts: list[tuple[str, Mapping[str, str]]]) -> str:
            first_host, expected = all_facts[0]
            for rank, (host, own) in enumerate(all_facts):
                for name, value in expected.items():
                    if own.get(name) != value:
                        return (
                            f"rank {rank} on {host} has another {name} than rank 0 on {first_host}; give all ranks the "
                            "same"
                        )
            return ""

        gathered = self.gather((os.uname().nodename, facts))
        if difference := self.from_first(lambda: compare(gathered)):
            raise UserError(difference)

    def from_first(self, work: Callable[[], T]) -> T:
        """The result of `work()` on rank 0, on every rank."""
        if self.world == 1:
            return work()
        result: list[object] = [work() if self.first else None]
        dist.broadcast_object_list(result, 0)
        return result[0]  # type: ignore[return-value]


@contextmanager
def ranks(device: str, patience_s: float = 1800.0) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment; without torchrun, a single rank.

    device: auto, cpu or cuda. patience_s: how long a collective may wait for a rank. It is longer than the watchdog's
    timeout, because `watchdog.Watch` says more. If the body raises, the other ranks learn of it, so that only the rank
    that failed first prints a message. Raises UserError for another device, and where CUDA is asked for and torch sees
    no GPU.
    """
    rank, world, local_rank, local_world = (
        torchrun_variable(name, default)
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, not {device!r}")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        _check_gpu(local_rank)
        torch.cuda.set_device(local_rank)
    torch_device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, 0, 1, torch_device)
        return
    timeout = timedelta(seconds=max(1800.0, 2 * patience_s + 60))
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", device_id=torch_device if on_gpu else None, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:  # also a variable that is missing
        reason = printable(str(error).strip().splitlines()[0])
        raise RunError(f"cannot join the other {world - 1} ranks: {reason}; start all of them with torchrun") from None
    try:
        yield Ranks(rank, world, local_rank, local_world, torch_device)
    except Stopped as stopped:  # on all ranks together; one of them says so
        dist.destroy_process_group()
        raise stopped if rank == 0 else Stopped() from None
    except Exception as error:
        raise _first_failure(error, rank) from error
    finally:
        # A rank that failed must not wait here for ranks that are stuck in a collective; torchrun ends them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _check_gpu(local_rank: int) -> None:
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; `fasttrain doctor` lists what is missing")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}")


class PeerFailure(RunError):
    """Another rank failed first and printed its message; this rank prints none."""


def _first_failure(error: Exception, rank: int) -> Exception:
    """The error to end with: this rank's own, or PeerFailure if another rank failed first."""
    if isinstance(error, PeerFailure):
        return error
    try:
        store = dist.distributed_c10d._get_default_store()
        if not isinstance(error, CommandError):  # a broken collective may mean that another rank has failed
            store.wait([_FAILED], timedelta(seconds=3))
        if int(store.add(_FAILED + "/count", 1)) > 1:
            return PeerFailure()
        store.set(_FAILED, str(rank))
    except (RuntimeError, ValueError):  # no other rank failed (the wait timed out), or the store is gone
        return error
    return type(error)(f"rank {rank}: {error}") if isinstance(error, CommandError) else error
