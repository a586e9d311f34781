"""The training step alone, on a batch that is already on the device, compared with timm's loop in each memory format,
eager and compiled.

A step includes everything after the pipeline: mixing, network, losses with their mining, gradients, optimizer and
meters. It excludes the work of either loop at its log points.
"""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from torch import Tensor, nn

from fasttrain import recipes
from fasttrain.benchmarks import common
from fasttrain.benchmarks.common import FASTTRAIN, Row, race, require_even, row, seconds, synchronize
from fasttrain.config import toml
from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD, EmaConfig, InitConfig, Recipe
from fasttrain.data.index import Index
from fasttrain.distributed.ranks import Ranks
from fasttrain.losses.base import Output
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.distillation import Distillation
from fasttrain.models import Classifier
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan
from fasttrain.prepare import resolve_auto
from fasttrain.training.cuda_graphs import PATIENCE, Graphs
from fasttrain.training.step import DTYPES, Step
from fasttrain.utils.errors import UserError

EAGER = "fasttrain, eager"
REPLAYED = "fasttrain, replayed"
TIMM = "timm"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
T = TypeVar("T")
FEATURES = 3  # of the network with one parameter: one per color channel; also its number of classes


def recipe_of(
    recipe: Recipe,
    device: torch.device,
    *,
    batch_size: int | None = None,
    image_size: int | None = None,
    precision: str | None = None,
    compiled: str | None = None,
    workers: int = 0,
    settings: Sequence[str] = (),
) -> Recipe:
    """The recipe resolved for the device, with the given changes and random initial weights. It has so many epochs that
    it does not end.

    compiled: auto, on, off or graphs. settings: as in `--set`; they become part of the recipe's name. Raises UserError
    where the batch size is odd, because timm's Mixup needs even batches, and for a recipe with distillation, because
    benchmarks have no teacher.
    """
    if any(isinstance(loss, Distillation) for loss in recipe.losses):
        raise UserError(f"recipe {recipe.name!r} needs a teacher, which benchmarks do not have; name another recipe")
    changed = replace(
        recipe,
        batch_size=batch_size or recipe.batch_size,
        image_size=image_size or recipe.image_size,
        precision=precision or recipe.precision,
        epochs=10**6,
        init=InitConfig(force_scratch=True),
        machine=replace(recipe.machine, compile=compiled or recipe.machine.compile, workers=workers),
    )
    changed = toml.override(changed, *settings)
    require_even([changed.batch_size])
    return resolve_auto(replace(changed, name=", ".join([recipe.name, *settings])), device)


def step(
    recipes_to_measure: list[Recipe],
    device: torch.device,
    *,
    classes: int = 1000,
    rounds: int = 5,
    steps: int = 10,
    warm_up: int = 5,
    only: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Iterator[list[Row]]:
    """Seconds per step of each resolved recipe, over `steps` steps per round, after `warm_up` steps of compilation and
    tuning. Yields the rows of a recipe after every turn. timm's loop trains with cross entropy, whatever the recipe's
    losses are. only: patterns of the contenders' names. also: settings as in `--set`; fasttrain's step is also measured
    with each of them.

    On a GPU a row also has `host_ms`, the median time until the call of one step returns, and `peak_gib`, the peak
    memory of the contender's tensors. CUDA graphs have memory of their own, whose peak is unknown.
    """
    for recipe in recipes_to_measure:
        torch.compiler.reset()  # so that dynamo does not treat the shapes of another case as dynamic
        timers: dict[str, StepTimer] = {}

        def make_timer(
            name: str, make: Callable[[], FasttrainStep | TimmStep], timers: dict[str, StepTimer] = timers
        ) -> StepTimer:
            timers[name] = StepTimer(make, device, steps, warm_up)
            return timers[name]

        makers = contenders(recipe, device, classes, also)
        selected = {name: partial(make_timer, name, makers[name]) for name in common.select(makers, only)}
        case = f"{recipe.name}, {recipe.batch_size} x {recipe.image_size}², {recipe.precision}"
        for timings in race(case, selected, rounds):
            rows = [
                row("step", case, name, times, recipe.batch_size, **timers[name].details())
                for name, times in timings.times.items()
            ]
            yield common.compared_with_best(rows, f"{TIMM}*", timings.left_out)
        del timers, makers, selected
        gc.collect()


def contenders(
    recipe: Recipe, device: torch.device, classes: int, also: Sequence[str] = ()
) -> dict[str, Callable[[], "FasttrainStep | TimmStep"]]:
    """A function that builds each contender; compiled ones only if the recipe is compiled. also: see `step`."""
    index = synthetic(recipe, classes)
    plan = Plan.of(recipe, index)
    indices = torch.from_numpy(plan.images(0, 0).copy())
    rows = recipe.batch_size * plan.views_total
    pixels = torch.randint(0, 256, (rows, recipe.image_size, recipe.image_size, 3), dtype=torch.uint8).to(device)
    planes = pixels[: recipe.batch_size].permute(0, 3, 1, 2).contiguous()  # the memory format of timm's loader
    labels = torch.from_numpy(index.labels)[indices].to(device)

    def fasttrain_step(variant: Recipe) -> FasttrainStep:
        torch.manual_seed(variant.seed)
        plan = Plan.of(variant, index)
        batch = Images(pixels[: variant.batch_size * plan.views_total], indices)
        return FasttrainStep(variant, Classifier.of(variant, classes), plan, index, device, forever(batch))

    def timm_step(**options: Any) -> TimmStep:
        torch.manual_seed(recipe.seed)
        model = timm.create_model(recipe.arch, num_classes=classes)
        feed = prefetched(planes, labels)
        return TimmStep(recipe, model, classes, device, feed, item=False, fused=True, **options)

    compiled = recipe.machine.compile != "off"
    makers: dict[str, Callable[[], FasttrainStep | TimmStep]] = {FASTTRAIN: partial(fasttrain_step, recipe)}
    for setting in also:
        variant = resolve_auto(toml.override(recipe, setting), device)
        makers[f"{FASTTRAIN}, {setting}"] = partial(fasttrain_step, variant)
    if rows > recipe.batch_size:
        variant = replace(recipe, losses=recipes.COMBINATIONS["ce"], ema=EmaConfig())
        makers["fasttrain, CE on one view"] = partial(fasttrain_step, variant)
    if compiled:
        if recipe.machine.compile == "graphs":
            variant = replace(recipe, machine=replace(recipe.machine, compile="on"))
            makers["fasttrain, compiled"] = partial(fasttrain_step, variant)
        makers[EAGER] = partial(fasttrain_step, replace(recipe, machine=replace(recipe.machine, compile="off")))
    if device.type == "cuda" and importlib.util.find_spec("apex"):
        variant = replace(recipe, optim=replace(recipe.optim, impl="apex"))
        makers["fasttrain, apex's SGD"] = partial(fasttrain_step, variant)
    for mode in ("eager", "compiled") if compiled else ("eager",):
        for layout, memory_format in LAYOUTS.items():
            options = {"compiled": mode == "compiled", "layout": memory_format}
            makers[f"{TIMM}, {layout}, {mode}"] = partial(timm_step, **options)
    return makers


def forever(value: Any) -> Iterator[Any]:
    """Yield the same value without end."""
    while True:
        yield value


def prefetched(pixels: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same batch without end, each time normalized as timm's PrefetchLoader does. pixels: uint8 [B, 3, H,
    W]."""
    mean, std = (
        torch.tensor(value, device=pixels.device).view(1, 3, 1, 1) * 255 for value in (IMAGENET_MEAN, IMAGENET_STD)
    )
    while True:
        yield pixels.float().sub_(mean).div_(std), labels


def synthetic(recipe: Recipe, classes: int) -> Index:
    """An index with labels only and enough images for the recipe's batches. Its files do not exist."""
    per_class = max(2 * recipe.images_per_class, -(-recipe.batch_size // classes))
    count = per_class * classes
    sizes = np.full((count, 2), recipe.image_size, np.int32)
    labels = np.repeat(np.arange(classes), per_class)
    return Index(("",) * count, ("",) * count, labels, sizes, tuple(f"{label:08}" for label in range(classes)))


class FasttrainStep:
    """Fasttrain's step on one device. model: on the CPU. feed: yields the micro-batches. A call trains one step and
    returns its loss, a scalar on the device."""

    cudnn_benchmark = True  # like in the training loop

    def __init__(
        self, recipe: Recipe, model: nn.Module, plan: Plan, index: Index, device: torch.device, feed: Iterator[Images]
    ) -> None:
        ranks = Ranks(rank=0, world=1, local_rank=0, local_world=1, device=device)
        self.train = Step(recipe, plan, model, index, ranks)
        self.feed, self.steps_done = feed, 0
        self.allocates = recipe.machine.compile != "graphs"

    @property
    def warm(self) -> bool:
        """Whether every CUDA graph has been recorded."""
        return self.train.graphs is None or self.train.graphs.complete

    def __call__(self) -> Tensor:
        loss = self.train(self.steps_done, self.feed)
        self.steps_done += 1
        return loss


class TimmStep:
    """A step of timm's training script: Mixup (as CutMix) on the device, autocast, soft-target cross entropy, SGD and a
    schedule by updates.

    feed: yields normalized float32 images [B, 3, H, W] and labels int64 [B] on the device. item: wait for the loss in
    every step. fused: use torch's fused SGD, which is not timm's default. layout: the memory format of weights and
    images.
    """

    cudnn_benchmark = True  # like in the script
    allocates = warm = True

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        classes: int,
        device: torch.device,
        feed: Iterator[tuple[Tensor, Tensor]],
        *,
        compiled: bool = False,
        item: bool = True,
        fused: bool = False,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        from timm.data import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
        from timm.utils import AverageMeter, NativeScaler

        self.feed, self.item, self.device, self.layout = feed, item, device, layout
        dtype = DTYPES[recipe.precision]
        self.autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)
        model = model.to(device).to(memory_format=layout)
        self.optimizer = create_optimizer_v2(
            model,
            opt="momentum",  # timm's `sgd` is Nesterov's
            lr=recipe.peak_lr,
            momentum=recipe.optim.momentum,
            weight_decay=recipe.optim.weight_decay,
            filter_bias_and_bn=not recipe.optim.decay_norm_bias,
            **({"fused": True} if fused else {}),
        )
        self.scaler = NativeScaler(device.type) if dtype == torch.float16 else None
        smoothing = next((loss.smoothing for loss in recipe.losses if isinstance(loss, CrossEntropy)), 0.0)
        shares = recipe.mix
        self.mixup = None
        self.criterion: nn.Module = LabelSmoothingCrossEntropy(smoothing)
        if shares.cutmix or shares.mixup:
            self.mixup = Mixup(
                mixup_alpha=shares.mixup_alpha if shares.mixup else 0,
                cutmix_alpha=shares.cutmix_alpha if shares.cutmix else 0,
                prob=shares.cutmix + shares.mixup,
                switch_prob=shares.cutmix / (shares.cutmix + shares.mixup),
                label_smoothing=smoothing,
                num_classes=classes,
            )
            self.criterion = SoftTargetCrossEntropy()
        self.schedule = CosineLRScheduler(self.optimizer, t_initial=10**6, warmup_t=1000, t_in_epochs=False)
        self.losses, self.times, self.updates = AverageMeter(), AverageMeter(), 0
        self.network: Callable[[Tensor], Tensor] = model.train()
        if compiled:
            # By default, dynamo treats a second memory format of the same network as dynamic strides.
            self.network = torch.compile(self.network, dynamic=False)
        self.optimizer.zero_grad()
        self.step_start = time.time()

    def __call__(self) -> Tensor:
        images, targets = next(self.feed)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        images = images.contiguous(memory_format=self.layout)
        with self.autocast():
            output = self.network(images)
            loss = self.criterion(output, targets)
        if self.scaler is not None:
            self.scaler(loss, self.optimizer)
        else:
            loss.backward()
            self.optimizer.step()
        if self.item:
            self.losses.update(loss.item(), images.size(0))
        self.updates += 1
        self.optimizer.zero_grad()
        self.times.update(time.time() - self.step_start)
        self.step_start = time.time()
        self.schedule.step_update(num_updates=self.updates, metric=self.losses.avg)
        return loss.detach()


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Set torch.backends.cudnn.benchmark in the block: whether cuDNN tries its algorithms once per shape."""
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous


class StepTimer:
    """Builds and warms up a contender. A call is one turn of `steps` steps and returns the seconds per step."""

    def __init__(
        self, make: Callable[[], "FasttrainStep | TimmStep"], device: torch.device, steps: int, warm_up: int
    ) -> None:
        self.device, self.steps = device, steps
        before = self._allocated()
        self.step = make()
        with cudnn_benchmark(self.step.cudnn_benchmark):
            warm_up_step(self.step, warm_up)
        synchronize(device)
        gc.collect()
        self.state_bytes = self._allocated() - before
        self.peak_bytes = 0  # allocated in a step, without the state
        self.host_seconds: list[float] = []

    def __call__(self) -> float:
        with cudnn_benchmark(self.step.cudnn_benchmark):
            if self.device.type != "cuda":
                return seconds(self.step, self.device, self.steps)
            torch.cuda.empty_cache()  # memory of another contender may be too fragmented to reuse
            self.step()
            self.host_seconds.append(host_seconds(self.step, self.device, 1))
            before = self._allocated()
            torch.cuda.reset_peak_memory_stats(self.device)
            elapsed = seconds(self.step, self.device, self.steps)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device) - before)
            return elapsed

    def details(self) -> dict[str, float]:
        """Host time and peak memory; empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        peak = {"peak_gib": (self.state_bytes + self.peak_bytes) / 2**30} if self.step.allocates else {}
        return {"host_ms": statistics.median(self.host_seconds) * 1e3, **peak}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def warm_up_step(step: "FasttrainStep | TimmStep", steps: int) -> None:
    """Run `steps` steps, and at most 2 * PATIENCE more until the contender is warm."""
    for _ in range(steps):
        step()
    for _ in range(2 * PATIENCE):
        if step.warm:
            break
        step()


def host_seconds(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds until a call returns, the mean over `calls` calls. The device is idle at the start; nothing waits for
    it."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - start
    synchronize(device)
    return elapsed / calls


class HostOnlyRecorder:
    """Replaces the recorder of CUDA graphs. It runs the work when it records, and its replays do nothing, so that only
    the host's part of a step remains."""

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        return work(), lambda: None


class OneParameter(nn.Module):
    """A network that costs almost nothing. Images [B, 3, H, W] to FEATURES logits: their mean colors times one
    parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.weight


class OneParameterOutput(OneParameter):
    """The same, with the output type of fasttrain's networks."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return Output(logits, logits)


def host(
    device: torch.device, *, rounds: int = 15, steps: int = 100, warm_up: int = 20, only: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """Seconds until the call of a step returns: the loops' own cost on the host. The network has one parameter and the
    batch is eight images of 8 x 8 pixels, which add almost nothing. On a GPU, fasttrain's replayed step is the real
    one. On a CPU, which would also do the GPU's work, it is replayed without that work."""
    recipe = recipe_of(recipes.for_arch("resnet18"), device, batch_size=8, image_size=8, compiled="off")
    index = synthetic(recipe, FEATURES)
    plan = Plan.of(recipe, index)
    indices = torch.from_numpy(plan.images(0, 0).copy())
    pixels = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, device=device)
    planes = pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(index.labels)[indices].to(device)

    def timm_step(**options: Any) -> TimmStep:
        return TimmStep(recipe, OneParameter(), FEATURES, device, prefetched(planes, labels), **options)

    def fasttrain_step(variant: Recipe) -> FasttrainStep:
        return FasttrainStep(variant, OneParameterOutput(), plan, index, device, forever(Images(pixels, indices)))

    on_cpu = device.type == "cpu"
    replayed = fasttrain_step(recipe if on_cpu else replace(recipe, machine=replace(recipe.machine, compile="graphs")))
    if on_cpu:
        replayed.train.graphs = Graphs(device, recipe.mix.kinds, HostOnlyRecorder())
    all_steps: dict[str, FasttrainStep | TimmStep] = {
        FASTTRAIN: fasttrain_step(recipe),
        f"{REPLAYED}, without its work" if on_cpu else REPLAYED: replayed,
        f"{TIMM}, .item() each step": timm_step(),
        f"{TIMM}, no .item()": timm_step(item=False),
        f"{TIMM}, no .item(), fused SGD": timm_step(item=False, fused=True),
    }
    selected = {name: all_steps[name] for name in common.select(all_steps, only)}
    for contender in selected.values():
        warm_up_step(contender, warm_up)
    makers = {name: partial(partial, host_seconds, contender, device, steps) for name, contender in selected.items()}
    for timings in race("host", makers, rounds):
        yield [row("host", "one parameter", name, times) for name, times in timings.times.items()]
