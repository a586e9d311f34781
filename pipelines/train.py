"""The training pipeline: files to augmented uint8 batches, on a GPU or a CPU from one definition."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from fasttrain.dataset import Index
from fasttrain.pipelines import operations
from fasttrain.pipelines.faults import Skip, decode_error, substitutes
from fasttrain.pipelines.plan import Plan

PREFETCH = 2  # batches ahead of the one that trains

_ARGUMENTS = len(operations.DTYPES)


class Images(NamedTuple):
    """A batch from a pipeline: pixels uint8 [B, H, W, 3] on the pipeline's device, and numbers int64 [B] of the
    images in the index, on the CPU."""

    pixels: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Source:
    """DALI asks for batch after batch; each is worked out from the plan when it is asked for."""

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
        numbers = self.numbers(info.iteration)
        draws = self.plan.draws(step, numbers, self.index.sizes[numbers])
        crop = draws.crop
        batch: list[Any] = [
            [np.frombuffer(os.fsencode(self.index.paths[number]), np.uint8) for number in numbers],
            numbers,
            np.ascontiguousarray(crop[:, :2]),
            np.ascontiguousarray(crop[:, 2:]),
            # A resize that reads from right to left is a flip. Corners are (y, x), relative to the crop.
            np.stack([np.zeros(len(numbers)), draws.flip], 1).astype(np.float32),
            np.stack([np.ones(len(numbers)), ~draws.flip], 1).astype(np.float32),
        ]
        if self.plan.augment.autoaugment != "none":
            for slot in range(2):
                op, strength = draws.op[:, slot].copy(), draws.strength[:, slot].copy()
                batch += operations.arguments(op, strength, self.plan.image_size)
        return tuple(batch)

    def numbers(self, batch: int) -> NDArray[np.int64]:
        """The images of the batch-th batch, int64 [micro_batch]."""
        numbers = self.plan.images(*self.position(batch))
        return numbers if self.replacement is None else self.replacement[numbers]

    def position(self, batch: int) -> tuple[int, int]:
        """Global step and micro-batch of the batch-th batch after the first ones."""
        step, micro = divmod(self.first + batch, self.plan.micro_batches)
        return self.start_step + step, micro


@pipeline_def(enable_conditionals=True)
def graph(source: Source, on_gpu: bool, interp: types.DALIInterpType = types.INTERP_NN) -> tuple[Any, Any]:
    """read → decode the crop → resize, flipped or not → AutoAugment; uint8 HWC images and their numbers."""
    augmenting = source.plan.augment.autoaugment != "none"
    size = source.plan.image_size
    slots = 2 if augmenting else 0
    paths, numbers, anchor, shape, corner, opposite, *args = fn.external_source(
        source=source,
        num_outputs=6 + slots * _ARGUMENTS,
        batch=True,
        batch_info=True,
        dtype=[types.UINT8, types.INT64, types.INT32, types.INT32, types.FLOAT, types.FLOAT]
        + slots * list(operations.DTYPES),
        ndim=[1, 0, 1, 1, 1, 1] + slots * list(operations.NDIMS),
    )
    encoded = fn.io.file.read(paths)
    images = fn.decoders.image_slice(
        encoded,
        start=anchor,
        shape=shape,
        axis_names="HW",
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        # Boxes are planned from the header's size, which knows nothing of EXIF; PIL does not rotate either.
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    images = fn.resize(
        images,
        size=[size, size],
        roi_start=corner,
        roi_end=opposite,
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    if augmenting:
        images = _augment(images, args[:_ARGUMENTS], size, on_gpu, interp)
        images = _augment(images, args[_ARGUMENTS:], size, on_gpu, interp)
    return images, numbers


def _augment(images: Any, args: Any, size: int, on_gpu: bool, interp: types.DALIInterpType) -> Any:
    arguments = operations.Arguments(*args)
    if on_gpu:
        arguments = arguments._replace(kernel=arguments.kernel.gpu())
    return operations.apply(images, arguments, size, interp)


def build(
    source: Source, device: torch.device, threads: int, interp: types.DALIInterpType = types.INTERP_NN
) -> Pipeline:
    """The pipeline, not yet running. device: where the images come out. interp: DALI's interpolation of warps."""
    on_gpu = device.type == "cuda"
    return graph(
        source,
        on_gpu,
        interp,
        batch_size=source.plan.micro_batch,
        num_threads=threads,
        device_id=device.index or 0 if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
    )


def batches(
    plan: Plan,
    index: Index,
    device: torch.device,
    threads: int,
    start_step: int = 0,
    stop_step: int | None = None,
    on_skip: Callable[[Skip], object] | None = None,
    interp: types.DALIInterpType = types.INTERP_NN,
) -> Iterator[Images]:
    """This rank's micro-batches from `start_step` up to `stop_step` (default: the run's end), one after another.

    The pixels share memory with DALI: no copy is made. Prefetching runs across the ends of epochs. An image that
    cannot be decoded raises RunError that names the file; or, with on_skip, another of its class takes its place from
    then on (see `faults.substitutes`), which is told once. interp: of warps (see `build`).
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
        pipe = build(source, device, threads, interp)
        pipe.build()
        while done < total:
            try:
                pixels, numbers = pipe.run()
            except RuntimeError as error:
                suspects = source.numbers(done - source.first)
                if on_skip is not None and replace(suspects):
                    break
                raise decode_error(error, [index.paths[each] for each in suspects]) from None
            done += 1
            yield Images(torch.from_dlpack(pixels.as_tensor()), torch.from_dlpack(numbers.as_tensor()))
