"""The training pipeline: files to augmented uint8 batches, on a GPU or a CPU from one definition."""

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from fasttrain.data.index import Index
from fasttrain.pipelines import operation_graph, operations
from fasttrain.pipelines.ahead import Ahead
from fasttrain.pipelines.decode_errors import Skip, decode_error, substitutes
from fasttrain.pipelines.decode_graph import decode_region
from fasttrain.pipelines.decoders import Decoder, resolve
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Draws, Plan, operations_of

PREFETCH = 2  # batches ahead of the one that trains

_INTERPOLATIONS = {"nearest": types.INTERP_NN, "linear": types.INTERP_LINEAR}
_OPERATION = list(zip(operation_graph.DTYPES, operation_graph.NDIMS, strict=True))  # what an operation's arguments are


@dataclass(frozen=True)
class Source:
    """What DALI is fed, batch after batch, each worked out from the plan alone."""

    plan: Plan
    index: Index
    start_step: int
    stop_step: int
    replacement: NDArray[np.int64] | None = None  # [N], the image to take instead of each; None: each itself
    first: int = 0  # batches to pass over

    def __call__(self, info: types.BatchInfo) -> tuple[Any, ...]:
        step, _ = self.position(info.iteration)
        if step >= self.stop_step:
            raise StopIteration
        plan, numbers = self.plan, self.numbers(info.iteration)
        sizes = self.index.sizes[numbers]
        views = [plan.draws(step, numbers, sizes, view) for view in range(plan.views_total)]
        start = np.min([each.crop[:, :2] for each in views], 0)  # of the least box that has all views' crops
        end = np.max([each.crop[:, :2] + each.crop[:, 2:] for each in views], 0)
        batch: list[Any] = [
            [np.frombuffer(os.fsencode(self.index.paths[number]), np.uint8) for number in numbers],
            numbers,
            start,
            end - start,
        ]
        for draws in views:
            batch += self._view(draws, start)
        return tuple(batch)

    def _view(self, draws: Draws, start: NDArray[np.int32]) -> list[Any]:
        """What the graph asks for to make a view out of what was decoded from `start` on."""
        plan, crop, nought = self.plan, draws.crop, np.zeros(len(start))
        made: list[Any] = [] if plan.views_total == 1 else [crop[:, :2] - start, crop[:, 2:]]
        # A resize that reads from right to left is a flip. Corners are (y, x), relative to the crop.
        made += [np.stack([nought, draws.flip], 1).astype(np.float32)]
        made += [np.stack([nought + 1, ~draws.flip], 1).astype(np.float32)]
        for slot in range(operations_of(plan.augment)):
            made += operations.arguments(draws.op[:, slot], draws.strength[:, slot], plan.image_size)
        if plan.augment.erase:
            made += [draws.erased[:, :2].astype(np.float32), draws.erased[:, 2:].astype(np.float32)]
        return list(map(np.ascontiguousarray, made))

    def numbers(self, batch: int) -> NDArray[np.int64]:
        """The images of the batch-th batch, int64 [micro_batch]."""
        numbers = self.plan.images(*self.position(batch))
        return numbers if self.replacement is None else self.replacement[numbers]

    def position(self, batch: int) -> tuple[int, int]:
        """Global step and micro-batch of the batch-th batch after the first ones."""
        step, micro = divmod(self.first + batch, self.plan.micro_batches)
        return self.start_step + step, micro


@pipeline_def(enable_conditionals=True)
def graph(
    source: Source, decoder: Decoder, on_gpu: bool, feed: Callable[[types.BatchInfo], Any] | None = None
) -> tuple[Any, ...]:
    """read → decode what the views need → for each of them: its crop → resize, flipped or not → operations → erase.
    Gives uint8 HWC images, view after view, and their numbers. feed: what gives the source's batches (default: the
    source itself, when it is asked)."""
    plan = source.plan
    views = plan.views_total
    inputs = _inputs(plan)
    paths, numbers, anchor, shape, *args = fn.external_source(
        source=feed or source,
        num_outputs=4 + views * len(inputs),
        batch=True,
        batch_info=True,
        dtype=[types.UINT8, types.INT64, types.INT32, types.INT32] + views * [dtype for dtype, _ in inputs],
        ndim=[1, 0, 1, 1] + views * [ndim for _, ndim in inputs],
    )
    encoded = fn.io.file.read(paths)
    images = decode_region(encoded, anchor, shape, decoder, on_gpu)
    made = []
    for view in range(views):
        made.append(_view(images, args[view * len(inputs) : (view + 1) * len(inputs)], plan, on_gpu))
    return *made, numbers


def _inputs(plan: Plan) -> list[tuple[Any, int]]:
    """DALI's type and the dimensions of each array of `Source._view`."""
    inputs: list[tuple[Any, int]] = [] if plan.views_total == 1 else [(types.INT32, 1), (types.INT32, 1)]
    inputs += [(types.FLOAT, 1), (types.FLOAT, 1)]
    inputs += operations_of(plan.augment) * _OPERATION
    return inputs + [(types.FLOAT, 1), (types.FLOAT, 1)] * bool(plan.augment.erase)


def _view(images: Any, args: Any, plan: Plan, on_gpu: bool) -> Any:
    """One view of the images, of the nodes that `_inputs` lists."""
    size = plan.image_size
    at = 0
    if plan.views_total > 1:
        images = fn.slice(images, args[0], args[1], axis_names="HW", normalized_anchor=False, normalized_shape=False)
        at = 2
    images = fn.resize(
        images,
        size=[size, size],
        roi_start=args[at],
        roi_end=args[at + 1],
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    at += 2
    for slot in range(operations_of(plan.augment)):  # noqa: B007
        images = _operate(images, args[at : at + len(_OPERATION)], plan, on_gpu)
        at += len(_OPERATION)
    if plan.augment.erase:
        images = operation_graph.erase(images, args[at], args[at + 1])
    return images


def _operate(images: Any, args: Any, plan: Plan, on_gpu: bool) -> Any:
    arguments = operations.Arguments(*args)
    if on_gpu:
        arguments = arguments._replace(kernel=arguments.kernel.gpu())
    return operation_graph.apply(images, arguments, plan.image_size, _INTERPOLATIONS[plan.augment.warps])


def build(
    source: Source,
    device: torch.device,
    threads: int,
    decoder: Decoder | None = None,
    feed: Callable[[types.BatchInfo], Any] | None = None,
) -> Pipeline:
    """The pipeline, not yet running. device: where the images come out. decoder: `auto`'s by default. feed: as in
    `graph`."""
    on_gpu = device.type == "cuda"
    return graph(
        source,
        decoder or Decoder(resolve("auto", device)),
        on_gpu,
        feed,
        batch_size=source.plan.micro_batch,
        num_threads=threads,
        device_id=device.index or 0 if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
    )


def output_stream(device: torch.device) -> torch.cuda.Stream | None:
    """On what a pipeline is to hand its results over: without it, DALI waits on the host until they are there."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def batches(
    plan: Plan,
    index: Index,
    device: torch.device,
    threads: int,
    start_step: int = 0,
    stop_step: int | None = None,
    on_skip: Callable[[Skip], object] | None = None,
    decoder: Decoder | None = None,
) -> Generator[Images, None, None]:
    """This rank's micro-batches from `start_step` up to `stop_step` (default: the run's end), one after another.

    The pixels share memory with DALI: no copy is made, unless there are several views. Prefetching runs across the
    ends of epochs. An image that cannot be decoded raises RunError that names the file; or, with on_skip, another of
    its class takes its place from then on (see `decode_errors.substitutes`), which is reported once.
    """
    stop = plan.steps if stop_step is None else stop_step
    replacement = np.arange(len(index))

    def replace(numbers: NDArray[np.int64], tell: bool = True) -> bool:
        found = list(substitutes(index, numbers, replacement))
        for number, other, skip in found:
            replacement[replacement == number] = other
            if on_skip is not None and tell:
                on_skip(skip)
        return bool(found)

    if on_skip is not None:  # the headers that nobody could read, which all ranks know
        replace(np.flatnonzero(index.sizes[:, 0] == 0), tell=plan.rank == 0)
    done, total = 0, (stop - start_step) * plan.micro_batches
    while done < total:
        # A pipeline is made anew after an error: the batches that it had in hand are lost with the one that failed.
        source = Source(plan, index, start_step, stop, replacement.copy(), done)
        with Ahead(source, PREFETCH + 1) as feed:
            pipe = build(source, device, threads, decoder, feed)
            pipe.build()
            while done < total:
                try:
                    *views, numbers = pipe.run(output_stream(device))
                except RuntimeError as error:
                    suspects = source.numbers(done - source.first)
                    if on_skip is not None and replace(suspects):
                        break
                    raise decode_error(error, [index.paths[each] for each in suspects], index.sizes[suspects]) from None
                done += 1
                pixels = [torch.from_dlpack(each.as_tensor()) for each in views]
                joined = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
                yield Images(joined, torch.from_numpy(np.array(numbers.as_array())))
