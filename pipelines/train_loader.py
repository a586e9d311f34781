"""The training pipeline, from image files to augmented uint8 batches; one definition for GPU and CPU."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from fasttrain.data.index import Index
from fasttrain.pipelines import erasing, operations
from fasttrain.pipelines.ahead import PrefetchedSource
from fasttrain.pipelines.decode_errors import Skip, Substitutes, check_sizes, decode_error
from fasttrain.pipelines.decoders import Decoder, resolve
from fasttrain.pipelines.image_input import image_inputs, image_values, read_images
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.named_inputs import Input, read_inputs
from fasttrain.pipelines.operations import Arguments
from fasttrain.pipelines.plan import Draws, Plan, operations_per_image

PREFETCH = 2  # batches that are prepared ahead of the current one

_INTERPOLATIONS = {"nearest": types.INTERP_NN, "linear": types.INTERP_LINEAR}


def batch_inputs(plan: Plan, index: Index) -> dict[str, Input]:
    """The graph's inputs, by name: those of `image_inputs`, and these. The inputs of view 1 are named
    `view1.flip_start` and so on.

    number: the image's number in the index. region_start, region_shape: the region that is decoded or read, (top, left)
    and (height, width) in pixels of the stored image; the smallest that holds all views' crops.
    """
    inputs = image_inputs(index) | {"number": Input("INT64", 0)}
    inputs |= {"region_start": Input("INT32", 1), "region_shape": Input("INT32", 1)}
    for view in range(plan.views_total):
        inputs |= {f"view{view}.{name}": value for name, value in view_inputs(plan).items()}
    return inputs


def view_inputs(plan: Plan) -> dict[str, Input]:
    """The inputs of each view, by name.

    crop_start, crop_shape: the view's crop in the decoded region, in pixels; only with several views. flip_start,
    flip_end: the corners (y, x) between which the crop is resized, relative to its size; a resize from right to left is
    a flip. op0.kind and so on: the arguments of the first operation. erase_start, erase_shape: the box to erase, in
    pixels of the resized image.
    """
    inputs: dict[str, Input] = {}
    if plan.views_total > 1:
        inputs |= {"crop_start": Input("INT32", 1), "crop_shape": Input("INT32", 1)}
    inputs |= {"flip_start": Input("FLOAT", 1), "flip_end": Input("FLOAT", 1)}
    for slot in range(operations_per_image(plan.augment)):
        inputs |= {f"op{slot}.{name}": Input(*value) for name, value in operations.INPUTS.items()}
    if plan.augment.erase:
        inputs |= {"erase_start": Input("FLOAT", 1), "erase_shape": Input("FLOAT", 1)}
    return inputs


@dataclass(frozen=True)
class Source:
    """Feeds DALI the graph's inputs, batch after batch, each computed only from the plan.

    substitutes: replaces images that cannot be decoded; None: none are replaced. skip_batches: how many batches to skip
    at the start.
    """

    plan: Plan
    index: Index
    start_step: int
    stop_step: int
    substitutes: Substitutes | None = None
    skip_batches: int = 0

    def __call__(self, info: types.BatchInfo) -> tuple[Any, ...]:
        """The inputs of batch `info.iteration`, in the order of `batch_inputs`. Raises StopIteration at the end."""
        step, _ = self.position(info.iteration)
        if step >= self.stop_step:
            raise StopIteration
        values = self.values(step, self.samples(info.iteration))
        return tuple(values[name] for name in batch_inputs(self.plan, self.index))

    def values(self, step: int, samples: NDArray[np.int64]) -> dict[str, Any]:
        """The inputs of a batch of samples, by name; the first dimension is the sample. step: the global step."""
        plan = self.plan
        indices = plan.image_of(samples)
        views = plan.all_draws(step, samples, self.index.sizes[indices])
        start, shape = plan.region(views)
        values: dict[str, Any] = image_values(self.index, indices, (start, shape)) | {
            "number": indices,
            "region_start": start,
            "region_shape": shape,
        }
        for view, draws in enumerate(views):
            values |= {f"view{view}.{name}": value for name, value in self._view_values(draws, start).items()}
        return values

    def _view_values(self, draws: Draws, region_start: NDArray[np.int32]) -> dict[str, NDArray]:
        plan, crop, zeros = self.plan, draws.crop, np.zeros(len(region_start))
        values: dict[str, NDArray] = {
            "crop_start": crop[:, :2] - region_start,
            "crop_shape": crop[:, 2:],
            "flip_start": np.stack([zeros, draws.flip], 1).astype(np.float32),
            "flip_end": np.stack([zeros + 1, ~draws.flip], 1).astype(np.float32),
            "erase_start": draws.erased[:, :2].astype(np.float32),
            "erase_shape": draws.erased[:, 2:].astype(np.float32),
        }
        for slot in range(operations_per_image(plan.augment)):
            arguments = operations.arguments(draws.op[:, slot], draws.strength[:, slot], plan.image_size)
            values |= {f"op{slot}.{name}": value for name, value in arguments._asdict().items()}
        return {name: np.ascontiguousarray(value) for name, value in values.items()}

    def indices(self, batch: int) -> NDArray[np.int64]:
        """The indices of a batch's images, int64 [micro_batch]."""
        return self.plan.image_of(self.samples(batch))

    def samples(self, batch: int) -> NDArray[np.int64]:
        """A batch's samples, int64 [micro_batch], without those that cannot be decoded."""
        step, micro = self.position(batch)
        samples = self.plan.samples(step, micro)
        return samples if self.substitutes is None else self.substitutes.apply(step, samples)

    def position(self, batch: int) -> tuple[int, int]:
        """Global step and micro-batch of a batch, counted from 0 after the skipped ones."""
        step, micro = divmod(self.skip_batches + batch, self.plan.micro_batches)
        return self.start_step + step, micro


@pipeline_def(enable_conditionals=True)
def graph(
    source: Source, decoder: Decoder, on_gpu: bool, feed: Callable[[types.BatchInfo], Any] | None = None
) -> tuple[Any, ...]:
    """read → decode the region that the views need → for each view: crop → resize with flip → operations → erase.

    Returns uint8 HWC images, one output per view, their indices, and their sizes. feed: what DALI calls
    for each batch; `source` by default.
    """
    plan = source.plan
    # Stored pixels are not copied as they come: a memory map does not change, and most of an image is not needed.
    nodes = read_inputs(feed or source, batch_inputs(plan, source.index), copy=source.index.encoded)
    images, size = read_images(nodes, decoder, on_gpu, (nodes["region_start"], nodes["region_shape"]))
    views = []
    for view in range(plan.views_total):
        views.append(_view(images, _with_prefix(f"view{view}", nodes), plan, on_gpu))
    return *views, nodes["number"], size


def _with_prefix(prefix: str, nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The nodes whose names start with `prefix.`, by their names without it."""
    return {name.removeprefix(f"{prefix}."): node for name, node in nodes.items() if name.startswith(f"{prefix}.")}


def _view(images: Any, nodes: Mapping[str, Any], plan: Plan, on_gpu: bool) -> Any:
    """One view of the decoded images. nodes: those of `view_inputs`."""
    size = plan.image_size
    if plan.views_total > 1:
        start, shape = nodes["crop_start"], nodes["crop_shape"]
        images = fn.slice(images, start, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False)
    images = fn.resize(
        images,
        size=[size, size],
        roi_start=nodes["flip_start"],
        roi_end=nodes["flip_end"],
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    for slot in range(operations_per_image(plan.augment)):
        images = _operate(images, Arguments(**_with_prefix(f"op{slot}", nodes)), plan, on_gpu)
    if plan.augment.erase:
        images = erasing.erase(images, nodes["erase_start"], nodes["erase_shape"])
    return images


def _operate(images: Any, arguments: Arguments, plan: Plan, on_gpu: bool) -> Any:
    if on_gpu:
        arguments = arguments._replace(kernel=arguments.kernel.gpu())
    return operations.apply(images, arguments, plan.image_size, _INTERPOLATIONS[plan.augment.warps])


def build(
    source: Source,
    device: torch.device,
    threads: int,
    decoder: Decoder | None = None,
    feed: Callable[[types.BatchInfo], Any] | None = None,
) -> Pipeline:
    """The pipeline, not yet built by DALI. device: that of the output. decoder: `auto` by default. feed: see
    `graph`."""
    return graph(
        source,
        decoder or Decoder(resolve("auto", device)),
        device.type == "cuda",
        feed,
        **pipeline_options(device, source.plan.micro_batch, threads),
    )


def pipeline_options(device: torch.device, batch_size: int, threads: int) -> dict[str, Any]:
    """DALI's options of a pipeline whose output is on this device."""
    return {
        "batch_size": batch_size,
        "num_threads": threads,
        "device_id": device.index or 0 if device.type == "cuda" else None,
        "prefetch_queue_depth": PREFETCH,
    }


def output_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The CUDA stream that receives a pipeline's output. Without it, DALI makes the host wait for the output."""
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
    """This rank's micro-batches, from `start_step` up to `stop_step` (default: the run's end).

    The pixels share memory with DALI; with several views they are copied. Prefetching crosses epoch boundaries. Raises
    RunError, which names the file, if an image cannot be decoded. With on_skip, another image of its class replaces it
    at this step (see `Substitutes`), and on_skip is called once for each such image.
    """
    decoder = decoder or Decoder(resolve("auto", device))
    stop = plan.steps if stop_step is None else stop_step
    substitutes = Substitutes(plan, index, decoder, device) if on_skip is not None else None

    def report(planned: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        if on_skip is not None and substitutes is not None:
            for skip in substitutes.new_skips(planned, used):
                on_skip(skip)

    if substitutes is not None and plan.rank == 0:  # files without a readable header are known before the first step
        unreadable = np.array(sorted(substitutes.suspects), np.int64)
        report(unreadable, substitutes.apply(start_step, unreadable))
    elif substitutes is not None:
        substitutes.reported |= substitutes.suspects
    done, total = 0, (stop - start_step) * plan.micro_batches
    while done < total:
        # After an error the pipeline is built again, because its prefetched batches are lost.
        source = Source(plan, index, start_step, stop, substitutes, done)
        with PrefetchedSource(source, PREFETCH + 1) as feed:
            pipe = build(source, device, threads, decoder, feed)
            pipe.build()
            while done < total:
                batch = done - source.skip_batches
                try:
                    *views, numbers, headers = pipe.run(output_stream(device))
                    indices = np.array(numbers.as_array())
                    check_sizes(np.array(headers.as_array()), index.sizes[indices])
                except RuntimeError as error:
                    step, _ = source.position(batch)
                    used = source.samples(batch)
                    if substitutes is not None and substitutes.add_suspects(step, used):
                        break
                    raise decode_error(error, index, plan.image_of(used)) from None
                done += 1
                report(plan.images(*source.position(batch)), indices)
                pixels = [torch.from_dlpack(view.as_tensor()) for view in views]
                rows = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
                yield Images(rows, torch.from_numpy(indices))
