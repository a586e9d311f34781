"""The training step alone, on a batch that is on the device: the project's compared with timm's loop, in each memory
format, eager and compiled.

A step is everything from the pipeline's pixels on: mixing, network, losses with their mining, gradients, optimizer and
meters. What either loop does at its log points is left out.
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
from fasttrain.benchmarks.common import OWN, Row, race, require_even, row, seconds, synchronize
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
FEATURES = 3  # of the network of one parameter: one a colour, and as many classes


def recipe_of(
    found: Recipe,
    device: torch.device,
    *,
    batch_size: int | None = None,
    image_size: int | None = None,
    precision: str | None = None,
    compiled: str | None = None,
    workers: int = 0,
    settings: Sequence[str] = (),
) -> Recipe:
    """A recipe resolved for the device, from random weights; with another size, precision and compile (auto, on, off
    or graphs) where given, and settings as `--set` has them, which its name tells. It never ends. Raises UserError
    where the batch is odd, since timm's Mixup takes even ones only, and for a recipe that distils: there is no teacher
    here."""
    if any(isinstance(loss, Distillation) for loss in found.losses):
        raise UserError(f"recipe {found.name!r} distils from a teacher, which benchmarks do not have; name another")
    changed = replace(
        found,
        batch_size=batch_size or found.batch_size,
        image_size=image_size or found.image_size,
        precision=precision or found.precision,
        epochs=10**6,
        init=InitConfig(force_scratch=True),
        machine=replace(found.machine, compile=compiled or found.machine.compile, workers=workers),
    )
    changed = toml.override(changed, *settings)
    require_even([changed.batch_size])
    return resolve_auto(replace(changed, name=", ".join([found.name, *settings])), device)


def step(
    chosen: list[Recipe],
    device: torch.device,
    *,
    classes: int = 1000,
    rounds: int = 5,
    steps: int = 10,
    warm_up: int = 5,
    only: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Iterator[list[Row]]:
    """Seconds per step of each resolved recipe, over `steps` steps in each round, after `warm_up` steps that compile
    and tune: the rows of a recipe, again after every turn. timm's loop trains with cross entropy whatever the
    recipe's losses are. only: patterns of the contenders' names. also: settings, as `--set` takes them, each of which
    makes the project's step once more with it.

    On a GPU a row also has `host_ms`, the median time until the call of one step returns, and `peak_gib`, the memory
    that the contender's tensors take at most; that of CUDA graphs is their own and not known.
    """
    for recipe in chosen:
        torch.compiler.reset()  # so that shapes of another case do not count as dynamic ones
        made: dict[str, Turns] = {}

        def turns(name: str, make: Callable[[], Ours | Timm], made: dict[str, Turns] = made) -> Turns:
            made[name] = Turns(make, device, steps, warm_up)
            return made[name]

        makers = contenders(recipe, device, classes, also)
        wanted = {name: partial(turns, name, makers[name]) for name in common.chosen(makers, only)}
        case = f"{recipe.name}, {recipe.batch_size} x {recipe.image_size}², {recipe.precision}"
        for so_far in race(case, wanted, rounds):
            rows = [
                row("step", case, name, times, recipe.batch_size, **made[name].told())
                for name, times in so_far.timed.items()
            ]
            yield common.compared_with_best(rows, f"{TIMM}*", so_far.left_out)
        del made, makers, wanted
        gc.collect()


def contenders(
    recipe: Recipe, device: torch.device, classes: int, also: Sequence[str] = ()
) -> dict[str, Callable[[], "Ours | Timm"]]:
    """What makes each contender; compiled ones where the recipe is compiled. also: see `step`."""
    index = synthetic(recipe, classes)
    plan = Plan.of(recipe, index)
    numbers = torch.from_numpy(plan.images(0, 0).copy())
    rows = recipe.batch_size * plan.views_total
    pixels = torch.randint(0, 256, (rows, recipe.image_size, recipe.image_size, 3), dtype=torch.uint8).to(device)
    planes = pixels[: recipe.batch_size].permute(0, 3, 1, 2).contiguous()  # the layout that timm's loader gives
    labels = torch.from_numpy(index.labels)[numbers].to(device)

    def ours(each: Recipe) -> Ours:
        torch.manual_seed(each.seed)
        plan = Plan.of(each, index)
        batch = Images(pixels[: each.batch_size * plan.views_total], numbers)
        return Ours(each, Classifier.of(each, classes), plan, index, device, forever(batch))

    def timms(**how: Any) -> Timm:
        torch.manual_seed(recipe.seed)
        model = timm.create_model(recipe.arch, num_classes=classes)
        return Timm(recipe, model, classes, device, prefetched(planes, labels), item=False, fused=True, **how)

    compiled = recipe.machine.compile != "off"
    made: dict[str, Callable[[], Ours | Timm]] = {OWN: partial(ours, recipe)}
    for setting in also:
        made[f"{OWN}, {setting}"] = partial(ours, resolve_auto(toml.override(recipe, setting), device))
    if rows > recipe.batch_size:
        plain = replace(recipe, losses=recipes.COMBINATIONS["ce"], ema=EmaConfig())
        made["fasttrain, CE on one view"] = partial(ours, plain)
    if compiled:
        if recipe.machine.compile == "graphs":
            made["fasttrain, compiled"] = partial(ours, replace(recipe, machine=replace(recipe.machine, compile="on")))
        made[EAGER] = partial(ours, replace(recipe, machine=replace(recipe.machine, compile="off")))
    if device.type == "cuda" and importlib.util.find_spec("apex"):
        made["fasttrain, apex's SGD"] = partial(ours, replace(recipe, optim=replace(recipe.optim, impl="apex")))
    for mode in ("eager", "compiled") if compiled else ("eager",):
        for layout, memory_format in LAYOUTS.items():
            made[f"{TIMM}, {layout}, {mode}"] = partial(timms, compiled=mode == "compiled", layout=memory_format)
    return made


def forever(value: Any) -> Iterator[Any]:
    """The same value again and again."""
    while True:
        yield value


def prefetched(pixels: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch as timm's PrefetchLoader gives it, normalised anew each time. pixels: uint8 [B, 3, H, W]."""
    mean, std = (
        torch.tensor(each, device=pixels.device).view(1, 3, 1, 1) * 255 for each in (IMAGENET_MEAN, IMAGENET_STD)
    )
    while True:
        yield pixels.float().sub_(mean).div_(std), labels


def synthetic(recipe: Recipe, classes: int) -> Index:
    """An index of labels only, with images enough for the recipe's batches. The files do not exist."""
    each = max(2 * recipe.images_per_class, -(-recipe.batch_size // classes))
    count = each * classes
    sizes = np.full((count, 2), recipe.image_size, np.int32)
    labels = np.repeat(np.arange(classes), each)
    return Index(("",) * count, ("",) * count, labels, sizes, tuple(f"{label:08}" for label in range(classes)))


class Ours:
    """The project's step on one device, again and again. `feed` gives the micro-batches, one after another; the model
    comes from the CPU. Calling it trains one step and gives its loss, a scalar on the device."""

    cudnn_benchmark = True  # as the loop sets it

    def __init__(
        self, recipe: Recipe, model: nn.Module, plan: Plan, index: Index, device: torch.device, feed: Iterator[Images]
    ) -> None:
        alone = Ranks(rank=0, world=1, local_rank=0, local_world=1, device=device)
        self.train = Step(recipe, plan, model, torch.from_numpy(index.labels), alone)
        self.feed, self.done = feed, 0
        self.allocates = recipe.machine.compile != "graphs"

    @property
    def warm(self) -> bool:
        """Whether all that is to be replayed has been recorded."""
        return self.train.graphs is None or self.train.graphs.complete

    def __call__(self) -> Tensor:
        loss = self.train(self.done, self.feed)
        self.done += 1
        return loss


class Timm:
    """A step of timm's training script: Mixup (as CutMix) on the device, autocast, soft-target cross entropy, SGD, a
    schedule by updates, and, with `item`, a wait for the loss in every step.

    `feed` gives normalised float32 images [B, 3, H, W] and labels int64 [B] on the device. fused: torch's fused SGD,
    which timm does not take by itself. layout: the memory format of weights and images.
    """

    cudnn_benchmark = True  # as the script sets it
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
            # Without `dynamic`, dynamo takes a second layout of the same network for a dynamic one.
            self.network = torch.compile(self.network, dynamic=False)
        self.optimizer.zero_grad()
        self.since = time.time()

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
        self.times.update(time.time() - self.since)
        self.since = time.time()
        self.schedule.step_update(num_updates=self.updates, metric=self.losses.avg)
        return loss.detach()


@contextmanager
def cudnn_benchmark(wanted: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms at the first call of each shape, meanwhile."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Turns:
    """A contender's turns, of so many steps each, and what they took."""

    def __init__(self, make: Callable[[], "Ours | Timm"], device: torch.device, steps: int, warm_up: int) -> None:
        self.device, self.steps = device, steps
        before = self._allocated()
        self.step = make()
        with cudnn_benchmark(self.step.cudnn_benchmark):
            warmed(self.step, warm_up)
        synchronize(device)
        gc.collect()
        self.state = self._allocated() - before
        self.most = 0
        self.host: list[float] = []

    def __call__(self) -> float:
        with cudnn_benchmark(self.step.cudnn_benchmark):
            if self.device.type != "cuda":
                return seconds(self.step, self.device, self.steps)
            torch.cuda.empty_cache()  # what another contender left could be too fragmented to use
            self.step()
            self.host.append(returned(self.step, self.device, 1))
            before = self._allocated()
            torch.cuda.reset_peak_memory_stats(self.device)
            spent = seconds(self.step, self.device, self.steps)
            self.most = max(self.most, torch.cuda.max_memory_allocated(self.device) - before)
            return spent

    def told(self) -> dict[str, float]:
        """What is known besides the time; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        peak = {"peak_gib": (self.state + self.most) / 2**30} if self.step.allocates else {}
        return {"host_ms": statistics.median(self.host) * 1e3, **peak}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def warmed(step: "Ours | Timm", steps: int) -> None:
    """So many steps, and more until the contender is warm, or has had time enough for that."""
    for _ in range(steps):
        step()
    for _ in range(2 * PATIENCE):
        if step.warm:
            break
        step()


def returned(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds until a call returns, the device being idle at first and not waited for."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    spent = time.perf_counter() - start
    synchronize(device)
    return spent / calls


class HostAlone:
    """In place of a GPU's recorder: it does what it records, and what it replays does nothing, so that only the host's
    part of a step is left."""

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        return work(), lambda: None


class OneParameter(nn.Module):
    """Images [B, 3, H, W] to FEATURES logits, their mean colours times one parameter: a network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.weight


class OneParameterOutput(OneParameter):
    """The same in the form in which the project's networks answer."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return Output(logits, logits)


def host(
    device: torch.device, *, rounds: int = 15, steps: int = 100, warm_up: int = 20, only: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """Seconds until the call of a step returns, with a network of one parameter and eight images of 8 x 8 pixels, so
    that hardly anything else is measured: what the loops themselves ask of the host. That of the project's replayed
    step is of the real one on a GPU. On a CPU, which does a GPU's work too, it is without that work."""
    recipe = recipe_of(recipes.for_arch("resnet18"), device, batch_size=8, image_size=8, compiled="off")
    index = synthetic(recipe, FEATURES)
    plan = Plan.of(recipe, index)
    numbers = torch.from_numpy(plan.images(0, 0).copy())
    pixels = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, device=device)
    planes = pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(index.labels)[numbers].to(device)

    def timms(**how: Any) -> Timm:
        return Timm(recipe, OneParameter(), FEATURES, device, prefetched(planes, labels), **how)

    def ours(each: Recipe) -> Ours:
        return Ours(each, OneParameterOutput(), plan, index, device, forever(Images(pixels, numbers)))

    alone = device.type == "cpu"
    replayed = ours(recipe if alone else replace(recipe, machine=replace(recipe.machine, compile="graphs")))
    if alone:
        replayed.train.graphs = Graphs(device, recipe.mix.kinds, HostAlone())
    made: dict[str, Ours | Timm] = {
        OWN: ours(recipe),
        f"{REPLAYED}, without its work" if alone else REPLAYED: replayed,
        f"{TIMM}, .item() each step": timms(),
        f"{TIMM}, no .item()": timms(item=False),
        f"{TIMM}, no .item(), fused SGD": timms(item=False, fused=True),
    }
    wanted = {name: made[name] for name in common.chosen(made, only)}
    for each in wanted.values():
        warmed(each, warm_up)
    turns = {name: partial(partial, returned, each, device, steps) for name, each in wanted.items()}
    for so_far in race("host", turns, rounds):
        yield [row("host", "one parameter", name, times) for name, times in so_far.timed.items()]
