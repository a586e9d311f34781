"""The training pipeline beside other loaders: images a second, and where the project's own spends its time.

Every loader takes the same files and delivers the same kind of batch: random-resized-cropped, flipped, AutoAugmented
or not, CutMixed or not, normalised, channels-last, on the device. The peers have as many threads, or
processes, as there are cores; the project has what a run gives it, which on a GPU is two less.
"""

import gc
import itertools
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
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
from fasttrain.benchmarks.common import OWN, Row, race, require_even, row, wall
from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, MixConfig
from fasttrain.data.index import Index
from fasttrain.kernels.mix import mix
from fasttrain.pipelines.ahead import Ahead
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import PREFETCH, Source, batches, build, output_stream
from fasttrain.prepare import resolve_auto
from fasttrain.training.step import DTYPES
from fasttrain.utils.tensors import to_device

WARM_UP = 6  # batches, which fill the loaders' queues
LEAST_STEPS = 50  # in an epoch
POLICIES = ("none", "imagenet")
GROUPED, LINEAR = "fasttrain, P x K batches", "fasttrain, linear warps"
TIMM, TORCHVISION, STOCK = "timm", "torchvision v2", "DALI's stock pipeline"
LOADERS = (OWN, GROUPED, LINEAR, TIMM, TORCHVISION, STOCK)  # not every case has all
# Stages of the project's graph by the operator that each ends with; what follows them are AutoAugment, which ends
# with the graph, and the mix kernel, which makes it the whole.
# (the crop is decoded, or cut out of the decoded image)
STAGES = {"read": ("Read",), "decode the crop": ("ImageSlice", "Slice"), "resize, flip": ("Resize",)}
LAST_STAGES = ("AutoAugment", "normalise, mix")


@dataclass(frozen=True)
class Work:
    """What a loader has to do: batches of `batch` images of the index, size x size, through an AutoAugment policy
    (of POLICIES) and, with cutmix, CutMix in every batch, as `dtype` on the device. workers: the project's threads;
    processes: the peers' threads or processes. An index that is not repeated ends an epoch often, which costs some
    loaders more than others."""

    index: Index
    batch: int
    size: int
    policy: str
    cutmix: bool
    device: torch.device
    dtype: torch.dtype
    workers: int
    processes: int


class Delivered(NamedTuple):
    """images: [batch, 3, size, size] in channels_last layout. labels: int64 [batch], each image's own. targets: what a
    loss takes; the labels where nothing is mixed."""

    images: Tensor
    labels: Tensor
    targets: Any


Stream = Generator[Any, None, None]  # of Delivered, or of what a cut pipeline gives
Loader = Callable[[Work], Stream]


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
) -> Iterator[list[Row]]:
    """Seconds per batch of every loader, for each batch size and policy, each over `steps` batches in each round: the
    rows of a case, again after every turn. only: patterns of the loaders' names. decoder: the project's.

    images_per_class: of the batches of P classes x K images (0: leave that contender out), for which the images are
    taken to be of other classes. profile: also the project's pipeline cut after each of its stages, as rows of the
    work `stages` that have `us_per_image`, the microseconds an image that the stage adds to those before it, in the
    fastest rounds. Raises UserError where batches to be mixed are odd, which timm's Mixup does not take.
    """
    if cutmix:
        require_even(batch_sizes)
    own = partial(ours, decoder=decoder)
    for batch, policy in itertools.product(batch_sizes, policies):
        images = repeated(index, batch * max(LEAST_STEPS, WARM_UP + steps))
        work = Work(images, batch, image_size, policy, cutmix, device, dtype, workers, processes)
        contenders: dict[str, Loader] = {OWN: own}
        if images_per_class:
            contenders[GROUPED] = partial(grouped, images_per_class=images_per_class, decoder=decoder)
        if policy != "none":
            contenders[LINEAR] = partial(own, augment=AugmentConfig(autoaugment=policy, warps="linear"))
        contenders |= {TIMM: timms, TORCHVISION: torchvisions, STOCK: stock}
        contenders = {name: contenders[name] for name in common.chosen(contenders, only, LOADERS)}
        cuts = stages(work, decoder) if profile and OWN in contenders else {}
        turns = {name: partial(partial, turn, loader, work, steps) for name, loader in {**contenders, **cuts}.items()}
        case = f"{batch} x {image_size}², AutoAugment {policy}"
        for so_far in race(case, turns, rounds):
            timed = so_far.timed
            rows = [row("pipeline", case, name, timed[name], batch) for name in contenders if name in timed]
            if cuts and timed.keys() >= {OWN, *cuts}:
                told = {name: timed[name] for name in cuts} | {LAST_STAGES[1]: timed[OWN]}
                rows += of_stages(case, told, batch)
            yield common.compared_with_best(rows, TIMM, so_far.left_out)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a network's input on a device; precision: of config.PRECISIONS."""
    return DTYPES[resolve_auto(replace(recipes.for_arch("resnet18"), precision=precision), device).precision]


def of_stages(case: str, timed: dict[str, list[float]], batch: int) -> list[Row]:
    """Rows of a pipeline cut after each of its stages, from the times of all up to each, in order. What a stage adds
    is told by the fastest rounds: a difference of medians would carry what disturbed either."""
    rows: list[Row] = []
    for name, times in timed.items():
        before = rows[-1].least if rows else 0.0
        whole = row("stages", case, f"{'+ ' if rows else ''}{name}", times, batch)
        rows.append(replace(whole, details={"us_per_image": (whole.least - before) / batch * 1e6}))
    return rows


def turn(loader: Loader, work: Work, steps: int) -> float:
    """Seconds per batch over so many, after those that the loader's queues hold: torch's DataLoader asks each process
    for two batches at once. The loader is made for this and gone afterwards, because one that waits still works
    ahead."""
    with closing(loader(work)) as stream:
        take(stream, WARM_UP + 2 * work.processes)
        spent = wall(partial(take, stream, steps), work.device)
    del stream
    gc.collect()
    return spent / steps


def take(stream: Iterator[Any], count: int) -> None:
    """That many batches of a stream; RuntimeError where it ends before."""
    for done in range(count):
        if next(stream, None) is None:
            raise RuntimeError(f"a loader ended after {done} of {count} batches")


def repeated(index: Index, least: int) -> Index:
    """The index as often as it takes for so many images."""
    times = -(-least // len(index))
    return replace(
        index,
        paths=index.paths * times,
        ids=index.ids * times,
        labels=np.tile(index.labels, times),
        sizes=np.tile(index.sizes, (times, 1)),
    )


def relabelled(index: Index, per_class: int) -> Index:
    """The index as if each `per_class` images after another were a class of their own; the last few are left out."""
    count = len(index) // per_class * per_class
    labels = np.arange(count) // per_class
    return Index(
        index.paths[:count],
        index.ids[:count],
        labels,
        index.sizes[:count],
        tuple(f"{label:08}" for label in range(count // per_class)),
    )


def plan_of(work: Work, images_per_class: int = 0, augment: AugmentConfig | None = None) -> Plan:
    """The project's plan for the work: endless, its draws those of training."""
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


def ours(
    work: Work, images_per_class: int = 0, augment: AugmentConfig | None = None, decoder: Decoder | None = None
) -> Stream:
    """The project's pipeline and its mix kernel; augment: other settings than the policy's own."""
    plan = plan_of(work, images_per_class, augment)
    known = torch.from_numpy(work.index.labels)
    for step, (pixels, numbers) in enumerate(batches(plan, work.index, work.device, work.workers, decoder=decoder)):
        params = to_device(torch.from_numpy(plan.mix_params(step, 0)[0]), work.device)
        mixed = mix(pixels, params, IMAGENET_MEAN, IMAGENET_STD, work.dtype)
        labels = to_device(known[numbers], work.device)
        targets = (labels, labels[mixed.partner], mixed.lam) if work.cutmix else labels
        yield Delivered(mixed.images, labels, targets)


def grouped(work: Work, images_per_class: int, decoder: Decoder | None = None) -> Stream:
    """The project's pipeline in batches of P classes x K images, the images taken to be of classes of 2 K."""
    return ours(replace(work, index=relabelled(work.index, 2 * images_per_class)), images_per_class, decoder=decoder)


class Files:
    """An index in the form in which timm's ImageDataset takes its files."""

    def __init__(self, index: Index) -> None:
        self.paths, self.labels = index.paths, index.labels.tolist()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return open(self.paths[number], "rb"), self.labels[number]


def timm_loader(work: Work) -> Any:
    """timm's loader of PIL images with its AutoAugment, its prefetcher normalising on the device."""
    from timm.data import ImageDataset, create_loader

    return create_loader(
        ImageDataset("", reader=Files(work.index)),
        input_size=(3, work.size, work.size),
        batch_size=work.batch,
        is_training=True,
        auto_augment=None if work.policy == "none" else "original",  # timm's name of the paper's policy
        color_jitter=None,
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_workers=work.processes,
        pin_memory=work.device.type == "cuda",
        device=work.device,
    )


def timms(work: Work) -> Stream:
    """timm's loader, its Mixup (as CutMix), and the layout that its training script asks for."""
    loader = timm_loader(work)
    mixing = _timm_mixup(work)
    while True:
        for images, labels in loader:
            mixed, targets = mixing(images, labels) if mixing else (images, labels)
            yield Delivered(mixed.to(work.dtype, memory_format=torch.channels_last), labels, targets)


def _timm_mixup(work: Work) -> Any:
    from timm.data import Mixup

    if not work.cutmix:
        return None
    return Mixup(mixup_alpha=0, cutmix_alpha=1.0, prob=1.0, label_smoothing=0, num_classes=len(work.index.classes))


class Decoded(Dataset[tuple[Tensor, int]]):
    """An index decoded by torchvision and put through a transform: uint8 [3, size, size] and the label."""

    def __init__(self, index: Index, transform: Callable[[Tensor], Tensor]) -> None:
        self.paths, self.labels, self.transform = index.paths, index.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image

        return self.transform(decode_image(self.paths[number], ImageReadMode.RGB)), self.labels[number]


def torchvisions(work: Work) -> Stream:
    """torchvision's v2 transforms on tensors, in torch's DataLoader; normalising and CutMix on the device."""
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(work.size, antialias=True), v2.RandomHorizontalFlip()]
    if work.policy != "none":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=128))
    loader = DataLoader(
        Decoded(work.index, v2.Compose(steps)),
        work.batch,
        shuffle=True,
        num_workers=work.processes,
        pin_memory=work.device.type == "cuda",
        drop_last=True,
        persistent_workers=work.processes > 0,
    )
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    cutmix = v2.CutMix(num_classes=len(work.index.classes)) if work.cutmix else None
    while True:
        for pixels, labels in loader:
            images = normalise(pixels.to(work.device, non_blocking=True))
            labels = labels.to(work.device, non_blocking=True)
            mixed, targets = cutmix(images, labels) if cutmix else (images, labels)
            yield Delivered(mixed.to(work.dtype, memory_format=torch.channels_last), labels, targets)


@pipeline_def(enable_conditionals=True)
def stock_graph(work: Work) -> tuple[Any, Any]:
    """What DALI's documentation puts together: its reader, its random operators, its `reduced_image_net`."""
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
        output_layout="HWC",  # channels_last, so that nothing has to turn it round
        mean=[255 * each for each in IMAGENET_MEAN],
        std=[255 * each for each in IMAGENET_STD],
        mirror=fn.random.coin_flip(),
    )
    return images, labels


def stock(work: Work) -> Stream:
    """DALI without any of the project's graph, handed over without a copy; timm's Mixup (as CutMix) on the device."""
    pipe = stock_graph(
        work,
        batch_size=work.batch,
        num_threads=work.processes,
        device_id=work.device.index or 0 if work.device.type == "cuda" else None,
        prefetch_queue_depth=2,
        seed=0,
    )
    pipe.build()
    mixing = _timm_mixup(work)
    while True:
        pixels, told = pipe.run(output_stream(work.device))
        images = torch.from_dlpack(pixels.as_tensor()).permute(0, 3, 1, 2).to(work.dtype)
        labels = to_device(torch.from_dlpack(told.as_tensor())[:, 0].long(), work.device)
        mixed, targets = mixing(images, labels) if mixing else (images, labels)
        yield Delivered(mixed, labels, targets)


def stages(work: Work, decoder: Decoder | None = None) -> dict[str, Loader]:
    """The project's pipeline up to each of its stages but the last, which makes it the whole, in their order."""
    found: dict[str, Loader] = {
        name: partial(cut, operators=operators, decoder=decoder) for name, operators in STAGES.items()
    }
    return found if work.policy == "none" else {**found, LAST_STAGES[0]: partial(cut, operators=(), decoder=decoder)}


def cut(work: Work, operators: tuple[str, ...], decoder: Decoder | None = None) -> Stream:
    """The project's graph up to its one operator of these kinds, or whole where there are none: what DALI gives."""
    plan = plan_of(work)
    source = Source(plan, work.index, 0, plan.steps)
    with Ahead(source, PREFETCH + 1) as feed:
        pipe = build(source, work.device, work.workers, decoder, feed)
        if operators:
            end_with(pipe, operators)
        pipe.build()
        while True:
            yield pipe.run(output_stream(work.device))


def end_with(pipe: Pipeline, operators: tuple[str, ...]) -> None:
    """Cut a graph that is not built yet after its one operator of these kinds. What comes from outside stays an output,
    so that the work of planning a batch is in every stage."""
    kinds: dict[str, dict[int, Any]] = {}
    waiting = list(pipe._graph_out)
    while waiting:
        node = waiting.pop().source
        of_kind = kinds.setdefault(re.sub(r"^_+|_\d+$", "", node.name), {})
        if node.id not in of_kind:
            of_kind[node.id] = node
            for each in node.inputs:
                waiting += each if isinstance(each, list | tuple) else [each]
    (last,) = (node for kind in operators for node in kinds.get(kind, {}).values())
    pipe.set_outputs(*last.outputs, *(output for node in kinds["ExternalSource"].values() for output in node.outputs))
