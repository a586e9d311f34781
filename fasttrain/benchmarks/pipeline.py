"""The training pipeline compared with other loaders: images per second, and the time of each of fasttrain's stages.

Every loader reads the same files and yields the same kind of batch: random resized crops, flips, optional AutoAugment,
optional CutMix, normalized, in channels_last, on the device. The peers have one thread or process per core; fasttrain
has the threads of a run, which on a GPU are two fewer.
"""

import gc
import itertools
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import auto_augment
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasttrain import recipes
from fasttrain.benchmarks import common
from fasttrain.benchmarks.common import FASTTRAIN, Row, race, require_even, row, wall_seconds
from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, MixConfig
from fasttrain.data.index import Index, merge
from fasttrain.kernels.mix import mix
from fasttrain.pipelines.ahead import PrefetchedSource
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import PREFETCH, Source, batches, build, output_stream
from fasttrain.prepare import resolve_auto
from fasttrain.training.step import DTYPES
from fasttrain.utils.tensors import to_device

WARM_UP = 6  # batches that fill the loaders' queues
MIN_STEPS = 50  # per epoch
POLICIES = ("none", "imagenet")
GROUPED, LINEAR = "fasttrain, P x K batches", "fasttrain, linear warps"
TIMM, TORCHVISION, STOCK = "timm", "torchvision v2", "DALI's stock pipeline"
LOADERS = (FASTTRAIN, GROUPED, LINEAR, TIMM, TORCHVISION, STOCK)  # some cases have fewer
# The stages of fasttrain's graph, by the operator that each ends with. Two stages follow: AutoAugment, which ends the
# graph, and the mix kernel, which completes the pipeline. The crop is either decoded or sliced from the decoded image.
STAGES = {"read": ("Read",), "decode the crop": ("ImageSlice", "Slice"), "resize, flip": ("Resize",)}
LAST_STAGES = ("AutoAugment", "normalise, mix")


@dataclass(frozen=True)
class Workload:
    """What a loader must produce: batches of `batch` images of the index, size x size, augmented with a policy of
    POLICIES and, if `cutmix`, with CutMix in every batch, in `dtype` on the device. workers: fasttrain's threads;
    processes: the peers' threads or processes. A small index should be repeated: short epochs slow some loaders more
    than others."""

    index: Index
    batch: int
    size: int
    policy: str
    cutmix: bool
    device: torch.device
    dtype: torch.dtype
    workers: int
    processes: int


class Batch(NamedTuple):
    """images: [batch, 3, size, size] in channels_last layout. labels: int64 [batch], before mixing. targets: the
    loss's targets; the labels if nothing is mixed."""

    images: Tensor
    labels: Tensor
    targets: Any


Stream = Generator[Any, None, None]  # of Batch, or of the outputs of a truncated pipeline
Loader = Callable[[Workload], Stream]


def pipeline(
    index: Index,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_sizes: tuple[int, ...] = (64,),
    image_size: int = 224,
    policies: tuple[str, ...] = POLICIES,
    images_per_class: int = 4,
    cutmix: bool = True,
    workers: int = 2,
    processes: int = 2,
    rounds: int = 5,
    steps: int = 20,
    profile: bool = False,
    only: Sequence[str] = (),
    decoder: Decoder | None = None,
    packs: Mapping[str, Index] = MappingProxyType({}),
) -> Iterator[list[Row]]:
    """Seconds per batch of every loader, for each batch size and policy, over `steps` batches per round. Yields the
    rows of a case after every turn. only: patterns of the loaders' names. decoder: fasttrain's decoder. packs: packs of
    the images by name, each with a contender of its own.

    images_per_class: K of the batches of P classes x K images, for which the images are relabeled; 0 leaves that
    contender out. profile: also measure fasttrain's pipeline truncated after each stage. The rows of this work,
    `stages`, have `us_per_image`: the microseconds per image that the stage adds to the stages before it, in the
    fastest rounds. Raises UserError where a batch size is odd and `cutmix` is on, because timm's Mixup needs even
    batches.
    """
    if cutmix:
        require_even(batch_sizes)
    fasttrain = partial(fasttrain_batches, decoder=decoder)
    for batch, policy in itertools.product(batch_sizes, policies):
        images = repeated(index, batch * max(MIN_STEPS, WARM_UP + steps))
        work = Workload(images, batch, image_size, policy, cutmix, device, dtype, workers, processes)
        contenders: dict[str, Loader] = {FASTTRAIN: fasttrain}
        if images_per_class:
            contenders[GROUPED] = partial(grouped_batches, images_per_class=images_per_class, decoder=decoder)
        if policy != "none":
            contenders[LINEAR] = partial(fasttrain, augment=AugmentConfig(autoaugment=policy, warps="linear"))
        for name, packed in packs.items():
            # The peers read files, so a pack is a contender with an index of its own.
            same_count = repeated(packed, len(images))
            contenders[f"{FASTTRAIN}, {name}"] = partial(packed_batches, index=same_count, decoder=decoder)
        contenders |= {TIMM: timm_batches, TORCHVISION: torchvision_batches, STOCK: stock_dali_batches}
        contenders = {name: contenders[name] for name in common.select(contenders, only, LOADERS)}
        truncated = stages(work, decoder) if profile and FASTTRAIN in contenders else {}
        makers = {
            name: partial(partial, seconds_per_batch, loader, work, steps)
            for name, loader in {**contenders, **truncated}.items()
        }
        case = f"{batch} x {image_size}², AutoAugment {policy}"
        for timings in race(case, makers, rounds):
            times = timings.times
            rows = [row("pipeline", case, name, times[name], batch) for name in contenders if name in times]
            if truncated and times.keys() >= {FASTTRAIN, *truncated}:
                stage_times = {name: times[name] for name in truncated} | {LAST_STAGES[1]: times[FASTTRAIN]}
                rows += stage_rows(case, stage_times, batch)
            yield common.compared_with_best(rows, TIMM, timings.left_out)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a network's input on a device. precision: one of config.PRECISIONS."""
    return DTYPES[resolve_auto(replace(recipes.for_arch("resnet18"), precision=precision), device).precision]


def stage_rows(case: str, stage_times: dict[str, list[float]], batch: int) -> list[Row]:
    """Rows of a pipeline truncated after each of its stages. stage_times: seconds of all stages up to each, in order.
    The time that a stage adds is a difference of the fastest rounds, because a difference of medians includes
    disturbances."""
    rows: list[Row] = []
    for name, times in stage_times.items():
        previous = rows[-1].least if rows else 0.0
        cumulative = row("stages", case, f"{'+ ' if rows else ''}{name}", times, batch)
        rows.append(replace(cumulative, details={"us_per_image": (cumulative.least - previous) / batch * 1e6}))
    return rows


def seconds_per_batch(loader: Loader, work: Workload, steps: int) -> float:
    """Mean over `steps` batches, after the batches that the loader's queues hold: torch's DataLoader requests two
    batches from each process in advance. The loader is built for this call and closed, because an idle loader still
    prefetches."""
    with closing(loader(work)) as stream:
        take(stream, WARM_UP + 2 * work.processes)
        elapsed = wall_seconds(partial(take, stream, steps), work.device)
    del stream
    gc.collect()
    return elapsed / steps


def take(stream: Iterator[Any], count: int) -> None:
    """Take `count` batches from a stream. Raises RuntimeError where it ends early."""
    for done in range(count):
        if next(stream, None) is None:
            raise RuntimeError(f"a loader ended after {done} of {count} batches")


def repeated(index: Index, min_images: int) -> Index:
    """The index, repeated until it has at least `min_images` images."""
    times = -(-min_images // len(index))
    return merge([index] * times, [""] * times)


def relabeled(index: Index, per_class: int) -> Index:
    """The index with a new class for every `per_class` consecutive images; the remainder at the end is left out."""
    count = len(index) // per_class * per_class
    labels = np.arange(count) // per_class
    return replace(
        index,
        paths=index.paths[:count],
        ids=index.ids[:count],
        labels=labels,
        sizes=index.sizes[:count],
        classes=tuple(f"{label:08}" for label in range(count // per_class)),
    )


def plan_of(work: Workload, images_per_class: int = 0, augment: AugmentConfig | None = None) -> Plan:
    """A training plan for the workload. It has so many epochs that it does not end."""
    recipe = replace(
        recipes.for_arch("resnet18"),
        batch_size=work.batch,
        images_per_class=images_per_class,
        image_size=work.size,
        epochs=10**6,
        augment=augment or AugmentConfig(autoaugment=work.policy),
        mix=MixConfig(cutmix=float(work.cutmix)),
    )
    return Plan.of(recipe, work.index)


def fasttrain_batches(
    work: Workload, images_per_class: int = 0, augment: AugmentConfig | None = None, decoder: Decoder | None = None
) -> Stream:
    """Fasttrain's pipeline and mix kernel. augment: replaces the settings of the workload's policy."""
    plan = plan_of(work, images_per_class, augment)
    all_labels = torch.from_numpy(work.index.labels)
    for step, (pixels, indices) in enumerate(batches(plan, work.index, work.device, work.workers, decoder=decoder)):
        params = to_device(torch.from_numpy(plan.mix_params(step, 0)[0]), work.device)
        mixed = mix(pixels, params, IMAGENET_MEAN, IMAGENET_STD, work.dtype)
        labels = to_device(all_labels[indices], work.device)
        targets = (labels, labels[mixed.partner], mixed.lam) if work.cutmix else labels
        yield Batch(mixed.images, labels, targets)


def packed_batches(work: Workload, index: Index, decoder: Decoder | None = None) -> Stream:
    """Fasttrain's pipeline with another index of the same images."""
    return fasttrain_batches(replace(work, index=index), decoder=decoder)


def grouped_batches(work: Workload, images_per_class: int, decoder: Decoder | None = None) -> Stream:
    """Fasttrain's pipeline with batches of P classes x K images. The images are relabeled into classes of 2 K."""
    work = replace(work, index=relabeled(work.index, 2 * images_per_class))
    return fasttrain_batches(work, images_per_class, decoder=decoder)


class IndexReader:
    """Wraps an index as a reader for timm's ImageDataset."""

    def __init__(self, index: Index) -> None:
        self.paths, self.labels = index.paths, index.labels.tolist()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self.paths[index], "rb"), self.labels[index]


def timm_loader(work: Workload) -> Any:
    """timm's loader of PIL images with its AutoAugment. Its prefetcher normalizes on the device."""
    from timm.data import ImageDataset, create_loader

    return create_loader(
        ImageDataset("", reader=IndexReader(work.index)),
        input_size=(3, work.size, work.size),
        batch_size=work.batch,
        is_training=True,
        auto_augment=None if work.policy == "none" else "original",  # timm's name for the paper's policy
        color_jitter=None,
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_workers=work.processes,
        pin_memory=work.device.type == "cuda",
        device=work.device,
    )


def timm_batches(work: Workload) -> Stream:
    """timm's loader with its Mixup (as CutMix), in the memory format that its training script uses."""
    loader = timm_loader(work)
    mixup = _timm_mixup(work)
    while True:
        for images, labels in loader:
            mixed, targets = mixup(images, labels) if mixup else (images, labels)
            yield Batch(mixed.to(work.dtype, memory_format=torch.channels_last), labels, targets)


def _timm_mixup(work: Workload) -> Any:
    from timm.data import Mixup

    if not work.cutmix:
        return None
    return Mixup(mixup_alpha=0, cutmix_alpha=1.0, prob=1.0, label_smoothing=0, num_classes=len(work.index.classes))


class TorchvisionDataset(Dataset[tuple[Tensor, int]]):
    """Images decoded by torchvision and transformed: uint8 [3, size, size], with their labels."""

    def __init__(self, index: Index, transform: Callable[[Tensor], Tensor]) -> None:
        self.paths, self.labels, self.transform = index.paths, index.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image

        return self.transform(decode_image(self.paths[index], ImageReadMode.RGB)), self.labels[index]


def torchvision_batches(work: Workload) -> Stream:
    """torchvision's v2 transforms on tensors, in torch's DataLoader. Normalization and CutMix run on the device."""
    from torchvision.transforms import v2

    transforms = [v2.RandomResizedCrop(work.size, antialias=True), v2.RandomHorizontalFlip()]
    if work.policy != "none":
        transforms.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=128))
    loader = DataLoader(
        TorchvisionDataset(work.index, v2.Compose(transforms)),
        work.batch,
        shuffle=True,
        num_workers=work.processes,
        pin_memory=work.device.type == "cuda",
        drop_last=True,
        persistent_workers=work.processes > 0,
    )
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    cutmix = v2.CutMix(num_classes=len(work.index.classes)) if work.cutmix else None
    while True:
        for pixels, labels in loader:
            images = normalize(pixels.to(work.device, non_blocking=True))
            labels = labels.to(work.device, non_blocking=True)
            mixed, targets = cutmix(images, labels) if cutmix else (images, labels)
            yield Batch(mixed.to(work.dtype, memory_format=torch.channels_last), labels, targets)


@pipeline_def(enable_conditionals=True)
def stock_graph(work: Workload) -> tuple[Any, Any]:
    """A graph like those in DALI's documentation: its reader, its random operators, its `reduced_image_net`."""
    on_gpu = work.device.type == "cuda"
    encoded, labels = fn.readers.file(
        files=list(work.index.paths), labels=work.index.labels.tolist(), random_shuffle=True, initial_fill=1024
    )
    images = fn.decoders.image_random_crop(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        random_area=[0.08, 1.0],
        random_aspect_ratio=[3 / 4, 4 / 3],
    )
    images = fn.resize(images, size=[work.size, work.size], interp_type=types.INTERP_LINEAR, antialias=True)
    if work.policy != "none":
        images = auto_augment.auto_augment(images, policy_name="reduced_image_net", fill_value=128)
    images = fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",  # channels_last, so that no transpose is needed
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
        mirror=fn.random.coin_flip(),
    )
    return images, labels


def stock_dali_batches(work: Workload) -> Stream:
    """`stock_graph`, whose output torch reads without a copy. timm's Mixup (as CutMix) runs on the device."""
    pipe = stock_graph(
        work,
        batch_size=work.batch,
        num_threads=work.processes,
        device_id=work.device.index or 0 if work.device.type == "cuda" else None,
        prefetch_queue_depth=2,
        seed=0,
    )
    pipe.build()
    mixup = _timm_mixup(work)
    while True:
        pixels, dali_labels = pipe.run(output_stream(work.device))
        images = torch.from_dlpack(pixels.as_tensor()).permute(0, 3, 1, 2).to(work.dtype)
        labels = to_device(torch.from_dlpack(dali_labels.as_tensor())[:, 0].long(), work.device)
        mixed, targets = mixup(images, labels) if mixup else (images, labels)
        yield Batch(mixed, labels, targets)


def stages(work: Workload, decoder: Decoder | None = None) -> dict[str, Loader]:
    """Fasttrain's pipeline truncated after each stage except the last, in order."""
    loaders: dict[str, Loader] = {
        name: partial(graph_outputs, operators=operators, decoder=decoder) for name, operators in STAGES.items()
    }
    if work.policy != "none":
        loaders[LAST_STAGES[0]] = partial(graph_outputs, operators=(), decoder=decoder)
    return loaders


def graph_outputs(work: Workload, operators: tuple[str, ...], decoder: Decoder | None = None) -> Stream:
    """DALI's outputs of fasttrain's graph, truncated after its only operator of these kinds. With no kinds, the full
    graph runs."""
    plan = plan_of(work)
    source = Source(plan, work.index, 0, plan.steps)
    with PrefetchedSource(source, PREFETCH + 1) as feed:
        pipe = build(source, work.device, work.workers, decoder, feed)
        if operators:
            truncate_after(pipe, operators)
        pipe.build()
        while True:
            yield pipe.run(output_stream(work.device))


def truncate_after(pipe: Pipeline, operators: tuple[str, ...]) -> None:
    """Truncate a graph that is not built yet after its only operator of these kinds. The external sources stay
    outputs, so that every stage includes the work of planning a batch."""
    nodes: dict[str, dict[int, Any]] = {}  # by kind and id
    pending = list(pipe._graph_out)
    while pending:
        node = pending.pop().source
        same_kind = nodes.setdefault(re.sub(r"^_+|_\d+$", "", node.name), {})
        if node.id not in same_kind:
            same_kind[node.id] = node
            for edges in node.inputs:
                pending += edges if isinstance(edges, list | tuple) else [edges]
    (last,) = (node for kind in operators for node in nodes.get(kind, {}).values())
    pipe.set_outputs(*last.outputs, *(output for node in nodes["ExternalSource"].values() for output in node.outputs))
