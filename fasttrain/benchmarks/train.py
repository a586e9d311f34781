"""Training end to end: the real `train`, compared with its two parts and with timm's loader and loop.

C is the step alone, on a batch that is already on the device. D is the pipeline alone, with normalization on the
device. E is the full run. Its efficiency relative to the slower part is eta = E / min(C, D), in images per second.
"""

import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from fasttrain.benchmarks import common, pipeline
from fasttrain.benchmarks.common import FASTTRAIN, Row, race, row, wall_seconds
from fasttrain.benchmarks.step import LAYOUTS, TIMM, StepTimer, TimmStep, contenders, cudnn_benchmark
from fasttrain.checkpoints.run_dir import open_run
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index
from fasttrain.distributed.ranks import Ranks
from fasttrain.prepare import decoder_of
from fasttrain.train import train
from fasttrain.training.step import DTYPES

STEP, PIPELINE = "C: its step alone", "D: its pipeline alone"


def end_to_end(
    recipes: list[Recipe],
    index: Index,
    ranks: Ranks,
    *,
    rounds: int = 3,
    steps: int = 60,
    warm_up: int = 20,
    only: Sequence[str] = (),
) -> Iterator[list[Row]]:
    """Seconds per step of the real loop, with `eta`; of its parts; and of timm's loader with timm's loop, which is
    compiled if the recipe is. Each is measured over `steps` steps per round, after `warm_up` steps. Yields the rows of
    a recipe after every turn.

    recipes: resolved ones; their `machine.workers` is the number of threads or processes of all loaders (0: fasttrain's
    default, and one per core for timm). index: its images are repeated until an epoch has enough steps, at least
    MIN_STEPS, and are relabeled for batches of P x K images. only: patterns of the contenders' names.
    """
    for recipe in recipes:
        torch.compiler.reset()
        images = epoch_index(index, recipe, warm_up + steps)
        case = f"{recipe.name}, {recipe.batch_size} x {recipe.image_size}², {recipe.precision}"
        makers = contender_makers(recipe, images, ranks, steps, warm_up)
        selected = {name: makers[name] for name in common.select(makers, only)}
        for timings in race(case, selected, rounds):
            medians = {name: statistics.median(times) for name, times in timings.times.items()}
            parts = [medians[name] for name in (STEP, PIPELINE) if name in medians]
            rows = []
            for name, times in timings.times.items():
                eta = {"eta": max(parts) / medians[name]} if name == FASTTRAIN and len(parts) == 2 else {}
                rows.append(row("train", case, name, times, recipe.batch_size, **eta))
            yield common.compared_with_best(rows, f"{TIMM}*", timings.left_out)
        gc.collect()


def epoch_index(index: Index, recipe: Recipe, steps: int) -> Index:
    """Images for one epoch of `steps` steps, or of MIN_STEPS if that is more."""
    images = pipeline.repeated(index, recipe.batch_size * max(steps, pipeline.MIN_STEPS))
    return pipeline.relabeled(images, 2 * recipe.images_per_class) if recipe.images_per_class else images


def contender_makers(
    recipe: Recipe, index: Index, ranks: Ranks, steps: int, warm_up: int
) -> dict[str, Callable[[], Callable[[], float]]]:
    """For each contender, a function that builds its turn; a turn returns seconds per step."""
    device, classes = ranks.device, len(index.classes)
    work = pipeline.Workload(
        index=index,
        batch=recipe.batch_size,
        size=recipe.image_size,
        policy=recipe.augment.autoaugment,
        cutmix=False,  # the step does it
        device=device,
        dtype=DTYPES[recipe.precision],
        workers=ranks.threads(recipe.machine.workers),
        processes=recipe.machine.workers or ranks.cores,
    )

    def timm_turn(layout: torch.memory_format) -> Callable[[], float]:
        model = timm.create_model(recipe.arch, num_classes=classes)
        compiled = recipe.machine.compile != "off"
        options: dict[str, Any] = {"compiled": compiled, "item": False, "fused": True, "layout": layout}
        step = TimmStep(recipe, model, classes, device, iter(()), **options)
        return partial(timm_seconds_per_step, step, work, steps, warm_up)

    loader = partial(
        pipeline.fasttrain_batches,
        images_per_class=recipe.images_per_class,
        augment=recipe.augment,
        decoder=decoder_of(recipe, device),
    )
    return {
        FASTTRAIN: lambda: partial(run_seconds_per_step, recipe, index, ranks, steps, warm_up),
        STEP: lambda: StepTimer(contenders(recipe, device, classes)[FASTTRAIN], device, steps, warm_up),
        PIPELINE: lambda: partial(pipeline.seconds_per_batch, loader, work, steps),
        **{f"{TIMM}, {name}": partial(timm_turn, layout) for name, layout in LAYOUTS.items()},
    }


def run_seconds_per_step(recipe: Recipe, index: Index, ranks: Ranks, steps: int, warm_up: int) -> float:
    """Seconds per step of a real run of one epoch in a temporary folder. They come from the rates in its log, after at
    least `warm_up` steps. Log points are at most `steps` steps apart, and the checkpoint comes after the last one."""
    log_steps = min(recipe.machine.log_steps, steps)
    machine = replace(recipe.machine, log_steps=log_steps, tensorboard=False, track=())
    one_epoch = replace(recipe, epochs=1, machine=machine)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        open_run(out, "never", toml.to_toml(one_epoch))
        train(one_epoch, out, index, None, ranks)
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    gc.collect()
    log_points = [event for event in map(json.loads, lines) if event["event"] == "train"]
    return seconds_per_step(log_points, recipe, warm_up)


def seconds_per_step(log_points: list[dict[str, Any]], recipe: Recipe, warm_up: int) -> float:
    """Mean over the steps between log points, from the first log point after `warm_up` steps."""
    elapsed, counted, previous = 0.0, 0, 0
    for point in log_points:
        count = point["step"] - previous
        if previous >= warm_up:
            elapsed += count * recipe.batch_size / point["images_per_s"]
            counted += count
        previous = point["step"]
    return elapsed / counted


def timm_seconds_per_step(step: TimmStep, work: pipeline.Workload, steps: int, warm_up: int) -> float:
    """Seconds per step of timm's loop over timm's loader, which is built for this call and closed."""

    def train_on(count: int) -> None:
        for _ in range(count):
            step()

    with closing(timm_stream(work)) as stream, cudnn_benchmark(step.cudnn_benchmark):
        step.feed = stream
        train_on(warm_up)
        elapsed = wall_seconds(partial(train_on, steps), work.device)
    step.feed = iter(())
    del stream
    gc.collect()
    return elapsed / steps


def timm_stream(work: pipeline.Workload) -> pipeline.Stream:
    """The batches of timm's loader, epoch after epoch without end."""
    loader = pipeline.timm_loader(work)
    while True:
        yield from loader
