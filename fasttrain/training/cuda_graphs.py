"""CUDA graphs of whole training steps: recorded once and then replayed, so that the host only hands over what is new
in a step and launches it."""

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

WARM_UP = 3  # eager steps of each kind before one is recorded: they compile and tune
PATIENCE = 100  # eager steps after which recording no longer waits for a rare kind

T = TypeVar("T")
Work = Callable[[StepScalars, Iterable[HostBatch]], T]


class Recorder(Protocol):
    """Runs and records the device's work."""

    def run(self, work: Callable[[], T]) -> T:
        """Do the work eagerly."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """Record the work without doing it. Returns its result, whose values each replay renews, and `replay`."""
        ...


class Graphs(Generic[T]):
    """Does a step's work by replaying CUDA graphs. A CPU has no graphs and does the work eagerly.

    kinds: `MixConfig.kinds`. The host knows whether a step mixes, so there is one graph for steps that mix and one for
    steps that do not. Normally nothing is recorded before all kinds have run eagerly: eager steps need memory of their
    own next to a graph's.
    """

    def __init__(self, device: torch.device, kinds: set[bool], recorder: Recorder | None = None) -> None:
        self.device, self.kinds = device, kinds
        self.recorder = recorder or (CudaGraphs(device) if device.type == "cuda" else None)
        self.eager_steps: Counter[bool] = Counter()  # of each kind
        self.recorded: dict[bool, tuple[T, Callable[[], object]]] = {}
        self.inputs: list[HostBatch] = []
        self.scalar_values = torch.zeros(3, device=device)
        self.scalars = StepScalars(*self.scalar_values.unbind())

    @property
    def complete(self) -> bool:
        """Whether everything that will be recorded has been."""
        return self.recorder is None or self.recorded.keys() == self.kinds

    def __call__(self, work: Work[T], scalars: StepScalars, lr: float, batches: Iterable[HostBatch]) -> T:
        """Do one step. The result holds until the next step.

        work: the device's part of a step, the same in every call. It must ask the host for nothing that changes, and
        everything that it reads and writes besides its arguments must stay at its address. batches: the step's
        micro-batches; all of them mix images, or none does.
        """
        self._copy(torch.tensor([scalars.epoch, scalars.progress, lr]), self.scalar_values)
        for micro, batch in enumerate(batches):
            if micro == len(self.inputs):
                self.inputs.append(batch.to(self.device)._replace(pixels=torch.empty_like(batch.pixels)))
            own = self.inputs[micro] = self.inputs[micro]._replace(mixed=batch.mixed)
            own.pixels.copy_(batch.pixels)
            self._copy(batch.labels, own.labels)
            self._copy(batch.mix_params, own.mix_params)
        mixed = self.inputs[0].mixed
        if mixed not in self.recorded:
            this_step = partial(work, self.scalars, list(self.inputs))
            if self.recorder is None:
                return this_step()
            if self._is_warming_up(mixed):
                self.eager_steps[mixed] += 1
                return self.recorder.run(this_step)
            self.recorded[mixed] = self.recorder.record(this_step)
        result, replay = self.recorded[mixed]
        replay()
        return result

    def _is_warming_up(self, mixed: bool) -> bool:
        waiting = any(self.eager_steps[kind] < WARM_UP for kind in self.kinds) and self.eager_steps.total() < PATIENCE
        return waiting or self.eager_steps[mixed] < WARM_UP

    def _copy(self, values: Tensor, to: Tensor) -> None:
        """Copy CPU values to where the graphs read them, without waiting for the device."""
        to.copy_(values.pin_memory() if self.device.type == "cuda" else values, non_blocking=True)


class CudaGraphs:
    """Records on a stream of its own, on which the eager steps ran too, into one memory pool: graphs that are replayed
    one at a time can share it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], T]) -> T:
        """Do the work, ordered with the current stream's."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """Raises RunError where CUDA cannot record something in the work."""
        # A thread of DALI's frees batches that are no longer used once the device has done all its work. It must not
        # wait for a device that is recording, so let it finish first.
        gc.collect()
        torch.cuda.synchronize(self.stream.device)
        time.sleep(0.1)
        graph = torch.cuda.CUDAGraph()
        try:
            # The pipeline's threads make CUDA calls meanwhile. A stricter mode would take them for the recording's.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error  # ending a failed recording fails too
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).partition("\n")[0]
            raise RunError(f"machine.compile=graphs: a step cannot be recorded ({reason}); leave it at auto") from error
        return result, graph.replay
