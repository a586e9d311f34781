"""Training steps that are recorded once and then replayed, as CUDA graphs: the host hands over what is new in a step,
and says go."""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fasttrain.training.inputs import HostBatch, StepScalars
from fasttrain.utils.errors import RunError

WARM_UP = 3  # steps of a kind that are done as they are before one is recorded: they compile and tune
PATIENCE = 100  # steps after which nothing waits any more for a kind that is rare

T = TypeVar("T")
Work = Callable[[StepScalars, Iterable[HostBatch]], T]


class Recorder(Protocol):
    """What does a device's work by its own means, and what records it: `record` gives what the work will have given
    each time, and what does the work; the work is not done before that is called."""

    def run(self, work: Callable[[], T]) -> T: ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]: ...


class Graphs(Generic[T]):
    """Does the work of a step again and again, by replaying it on a GPU; a CPU has no graphs and does it as it is.

    kinds: `Mix.kinds`; whether a step mixes is the host's, so there is a graph for each. As a rule none is recorded
    before all kinds have been done as they are: the memory for that would be needed beside a graph's.
    """

    def __init__(self, device: torch.device, kinds: set[bool], recorder: Recorder | None = None) -> None:
        self.device, self.kinds = device, kinds
        self.recorder = recorder or (CudaGraphs(device) if device.type == "cuda" else None)
        self.done: Counter[bool] = Counter()  # steps of each kind, as they are
        self.recorded: dict[bool, tuple[T, Callable[[], object]]] = {}
        self.inputs: list[HostBatch] = []
        self.scalars = torch.zeros(3, device=device)
        self.now = StepScalars(*self.scalars.unbind())

    @property
    def complete(self) -> bool:
        """Whether all is recorded that ever will be."""
        return self.recorder is None or self.recorded.keys() == self.kinds

    def __call__(self, work: Work[T], now: StepScalars, lr: float, staged: Iterable[HostBatch]) -> T:
        """A step; what it gives holds until the next one.

        work: what a device does in a step, the same in every call, without asking the host for anything that changes;
        what it reads and writes besides its arguments stays where it is. staged: the step's micro-batches, all of
        which mix or none.
        """
        self._hand_over(torch.tensor([now.epoch, now.progress, lr]), self.scalars)
        for at, each in enumerate(staged):
            if at == len(self.inputs):
                self.inputs.append(each.on(self.device)._replace(pixels=torch.empty_like(each.pixels)))
            own = self.inputs[at] = self.inputs[at]._replace(mixed=each.mixed)
            own.pixels.copy_(each.pixels)
            self._hand_over(each.labels, own.labels)
            self._hand_over(each.params, own.params)
        mixed = self.inputs[0].mixed
        if mixed not in self.recorded:
            this_step = partial(work, self.now, list(self.inputs))
            if self.recorder is None:
                return this_step()
            if self._is_warming(mixed):
                self.done[mixed] += 1
                return self.recorder.run(this_step)
            self.recorded[mixed] = self.recorder.record(this_step)
        told, replay = self.recorded[mixed]
        replay()
        return told

    def _is_warming(self, mixed: bool) -> bool:
        waiting = any(self.done[each] < WARM_UP for each in self.kinds) and self.done.total() < PATIENCE
        return waiting or self.done[mixed] < WARM_UP

    def _hand_over(self, values: Tensor, own: Tensor) -> None:
        """What is new on the CPU goes to where the work reads it, without waiting for the device."""
        own.copy_(values.pin_memory() if self.device.type == "cuda" else values, non_blocking=True)


class CudaGraphs:
    """Records on a stream of its own, on which the work has run before, into one pool of memory: graphs that are
    replayed one at a time can share it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], T]) -> T:
        """The work, in its turn with what the current stream does."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            told = work()
        current.wait_stream(self.stream)
        return told

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """Raises RunError where CUDA cannot record something in the work."""
        # A thread of DALI's frees batches that are no longer held once the device has done all its work. It must not
        # wait for a device that records: let it be through before.
        gc.collect()
        torch.cuda.synchronize(self.stream.device)
        time.sleep(0.1)
        graph = torch.cuda.CUDAGraph()
        try:
            # The pipeline's threads go on meanwhile, with calls that a stricter mode would count as the recording's.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                told = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error  # the end of a recording fails too where something in it has
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).partition("\n")[0]
            raise RunError(f"machine.compile=graphs: a step cannot be recorded ({reason}); leave it at auto") from error
        return told, graph.replay
