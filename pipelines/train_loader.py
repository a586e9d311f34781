"""The training pipeline: image files to augmented uint8 batches, on a GPU or a CPU from one definition."""

import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from fasttrain.pipelines.operations import Arguments
from fasttrain.pipelines.plan import Draws, Plan, operations_of

PREFETCH = 2  # batches that are prepared ahead of the one that trains

_INTERPOLATIONS = {"nearest": types.INTERP_NN, "linear": types.INTERP_LINEAR}


class Input(NamedTuple):
    """DALI's type and number of dimensions, per image, of an input of the graph."""

    dtype: Any
    ndim: int


def batch_inputs(plan: Plan) -> dict[str, Input]:
    """The graph's inputs, by name. Those of view 1 are called `view1.flip_start` and so on.

    path: bytes of the file's name. number: the image's number in the index. region_start, region_shape: the region to
    decode, (top, left) and (height, width) in stored pixels, the smallest that holds the crops of all views.
    """
    inputs = {
        "path": Input(types.UINT8, 1),
        "number": Input(types.INT64, 0),
        "region_start": Input(types.INT32, 1),
        "region_shape": Input(types.INT32, 1),
    }
    for view in range(plan.views_total):
        inputs |= {f"view{view}.{name}": each for name, each in view_inputs(plan).items()}
    return inputs


def view_inputs(plan: Plan) -> dict[str, Input]:
    """The inputs of each view, by name.

    crop_start, crop_shape: the view's crop, relative to the decoded region; only with several views. flip_start,
    flip_end: the corners (y, x) from which and to which the crop is resized, relative to it: a resize from right to
    left is a flip. op0.kind and so on: the arguments of the first operation. erase_start, erase_shape: the rectangle to
    erase, in pixels of the finished image.
    """
    inputs: dict[str, Input] = {}
    if plan.views_total > 1:
        inputs |= {"crop_start": Input(types.INT32, 1), "crop_shape": Input(types.INT32, 1)}
    inputs |= {"flip_start": Input(types.FLOAT, 1), "flip_end": Input(types.FLOAT, 1)}
    for slot in range(operations_of(plan.augment)):
        inputs |= {f"op{slot}.{name}": Input(*each) for name, each in operation_graph.INPUTS.items()}
    if plan.augment.erase:
        inputs |= {"erase_start": Input(types.FLOAT, 1), "erase_shape": Input(types.FLOAT, 1)}
    return inputs


@dataclass(frozen=True)
class Source:
    """Gives DALI the graph's inputs, batch after batch, each computed from the plan alone.

    replacement: int64 [N], the image to take instead of each image; None: no replacements. first: batches to leave out.
    """

    plan: Plan
    index: Index
    start_step: int
    stop_step: int
    replacement: NDArray[np.int64] | None = None
    first: int = 0

    def __call__(self, info: types.BatchInfo) -> tuple[Any, ...]:
        """The inputs of batch `info.iteration`, in the order of `batch_inputs`. Raises StopIteration at the end."""
        step, _ = self.position(info.iteration)
        if step >= self.stop_step:
            raise StopIteration
        values = self.values(step, self.numbers(info.iteration))
        return tuple(values[name] for name in batch_inputs(self.plan))

    def values(self, step: int, numbers: NDArray[np.int64]) -> dict[str, Any]:
        """The inputs of a batch of images of a step, by name, each with a first dimension of images."""
        plan, sizes = self.plan, self.index.sizes[numbers]
        views = [plan.draws(step, numbers, sizes, view) for view in range(plan.views_total)]
        start = np.min([draws.crop[:, :2] for draws in views], 0)
        end = np.max([draws.crop[:, :2] + draws.crop[:, 2:] for draws in views], 0)
        values: dict[str, Any] = {
            "path": [np.frombuffer(os.fsencode(self.index.paths[number]), np.uint8) for number in numbers],
            "number": numbers,
            "region_start": start,
            "region_shape": end - start,
        }
        for view, draws in enumerate(views):
            values |= {f"view{view}.{name}": each for name, each in self._view_values(draws, start).items()}
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
        for slot in range(operations_of(plan.augment)):
            arguments = operations.arguments(draws.op[:, slot], draws.strength[:, slot], plan.image_size)
            values |= {f"op{slot}.{name}": each for name, each in arguments._asdict().items()}
        return {name: np.ascontiguousarray(each) for name, each in values.items()}

    def numbers(self, batch: int) -> NDArray[np.int64]:
        """The images of a batch, int64 [micro_batch]."""
        numbers = self.plan.images(*self.position(batch))
        return numbers if self.replacement is None else self.replacement[numbers]

    def position(self, batch: int) -> tuple[int, int]:
        """Global step and micro-batch of a batch, counted from `first`."""
        step, micro = divmod(self.first + batch, self.plan.micro_batches)
        return self.start_step + step, micro


@pipeline_def(enable_conditionals=True)
def graph(
    source: Source, decoder: Decoder, on_gpu: bool, feed: Callable[[types.BatchInfo], Any] | None = None
) -> tuple[Any, ...]:
    """read → decode the region that the views need → for each view: its crop → resize, flipped or not → operations →
    erase. Gives uint8 HWC images, view after view, and their numbers.

    feed: what gives the batches, `source` itself by default.
    """
    plan = source.plan
    inputs = batch_inputs(plan)
    given = fn.external_source(
        source=feed or source,
        num_outputs=len(inputs),
        batch=True,
        batch_info=True,
        dtype=[each.dtype for each in inputs.values()],
        ndim=[each.ndim for each in inputs.values()],
    )
    nodes = {name: given[at] for at, name in enumerate(inputs)}
    encoded = fn.io.file.read(nodes["path"])
    images = decode_region(encoded, nodes["region_start"], nodes["region_shape"], decoder, on_gpu)
    views = []
    for view in range(plan.views_total):
        views.append(_view(images, _under(f"view{view}", nodes), plan, on_gpu))
    return *views, nodes["number"]


def _under(prefix: str, nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The nodes whose names begin with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): node for name, node in nodes.items() if name.startswith(f"{prefix}.")}


def _view(images: Any, nodes: Mapping[str, Any], plan: Plan, on_gpu: bool) -> Any:
    """One view of the decoded images, from the nodes of `view_inputs`."""
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
    for slot in range(operations_of(plan.augment)):
        images = _operate(images, Arguments(**_under(f"op{slot}", nodes)), plan, on_gpu)
    if plan.augment.erase:
        images = operation_graph.erase(images, nodes["erase_start"], nodes["erase_shape"])
    return images


def _operate(images: Any, arguments: Arguments, plan: Plan, on_gpu: bool) -> Any:
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
    """The pipeline, not yet started. device: where the images come out. decoder: `auto`'s by default. feed: see
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
    """The CUDA stream on which a pipeline hands over its results. Without it DALI makes the host wait for them."""
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

    The pixels share memory with DALI; with several views they are copied. Prefetching runs across the ends of epochs.
    An image that cannot be decoded raises RunError that names the file. With on_skip, another image of its class
    replaces it from then on (see `decode_errors.substitutes`), and on_skip is called once.
    """
    stop = plan.steps if stop_step is None else stop_step
    replacement = np.arange(len(index))

    def replace_bad(numbers: NDArray[np.int64], report: bool = True) -> bool:
        found = list(substitutes(index, numbers, replacement))
        for number, other, skip in found:
            replacement[replacement == number] = other
            if on_skip is not None and report:
                on_skip(skip)
        return bool(found)

    if on_skip is not None:  # files without a readable header: all ranks know them, and one reports them
        replace_bad(np.flatnonzero(index.sizes[:, 0] == 0), report=plan.rank == 0)
    done, total = 0, (stop - start_step) * plan.micro_batches
    while done < total:
        # After an error the pipeline is built again: the batches that it had prefetched are lost with the failed one.
        source = Source(plan, index, start_step, stop, replacement.copy(), done)
        with Ahead(source, PREFETCH + 1) as feed:
            pipe = build(source, device, threads, decoder, feed)
            pipe.build()
            while done < total:
                try:
                    *views, numbers = pipe.run(output_stream(device))
                except RuntimeError as error:
                    suspects = source.numbers(done - source.first)
                    if on_skip is not None and replace_bad(suspects):
                        break
                    raise decode_error(error, [index.paths[each] for each in suspects], index.sizes[suspects]) from None
                done += 1
                pixels = [torch.from_dlpack(view.as_tensor()) for view in views]
                joined = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
                yield Images(joined, torch.from_numpy(np.array(numbers.as_array())))
