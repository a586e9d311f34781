"""Training end to end: the real `train`, compared with the two things that it is made of and with timm's.

C is the step alone on a batch that is on the device, D the pipeline alone, its output normalised on the device, and E
the run; what E reaches of the slower of the two is eta = E / min(C, D), in images a second.
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
from fasttrain.benchmarks.common import OWN, Row, race, row, wall
from fasttrain.benchmarks.step import LAYOUTS, TIMM, Timm, Turns, contenders, cudnn_benchmark
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
    chosen: list[Recipe],
    index: Index,
    ranks: Ranks,
    *,
    rounds: int = 3,
    steps: int = 60,
    warm_up: int = 20,
    only: Sequence[str] = (),
) -> Iterator[list[Row]]:
    """Seconds per step of the real loop, with `eta`; of its parts; and of timm's loader with timm's loop, compiled
    where the recipe is: the rows of a recipe, again after every turn. Each over `steps` steps in each round,
    after `warm_up` steps; the run has LEAST_STEPS at least. The index is taken as often as that takes, and for batches
    of P x K images as if of other classes. only: patterns of the contenders' names.

    The recipes are resolved ones; `machine.workers` says how many threads, or processes, all loaders have (0: the
    project's default, and one per core for timm's).
    """
    for recipe in chosen:
        torch.compiler.reset()
        images = whole(index, recipe, warm_up + steps)
        case = f"{recipe.name}, {recipe.batch_size} x {recipe.image_size}², {recipe.precision}"
        makers = turns(recipe, images, ranks, steps, warm_up)
        wanted = {name: makers[name] for name in common.chosen(makers, only)}
        for so_far in race(case, wanted, rounds):
            medians = {name: statistics.median(times) for name, times in so_far.timed.items()}
            parts = [medians[name] for name in (STEP, PIPELINE) if name in medians]
            rows = []
            for name, times in so_far.timed.items():
                eta = {"eta": max(parts) / medians[name]} if name == OWN and len(parts) == 2 else {}
                rows.append(row("train", case, name, times, recipe.batch_size, **eta))
            yield common.compared_with_best(rows, f"{TIMM}*", so_far.left_out)
        gc.collect()


def whole(index: Index, recipe: Recipe, steps: int) -> Index:
    """Images for one epoch of so many steps, and of LEAST_STEPS at least."""
    images = pipeline.repeated(index, recipe.batch_size * max(steps, pipeline.LEAST_STEPS))
    return pipeline.relabelled(images, 2 * recipe.images_per_class) if recipe.images_per_class else images


def turns(
    recipe: Recipe, index: Index, ranks: Ranks, steps: int, warm_up: int
) -> dict[str, Callable[[], Callable[[], float]]]:
    """What makes each contender's turns, which give seconds per step."""
    device, classes = ranks.device, len(index.classes)
    work = pipeline.Work(
        index=index,
        batch=recipe.batch_size,
        size=recipe.image_size,
        policy=recipe.augment.autoaugment,
        cutmix=False,  # it is part of the step
        device=device,
        dtype=DTYPES[recipe.precision],
        workers=ranks.threads(recipe.machine.workers),
        processes=recipe.machine.workers or ranks.cores,
    )

    def timms(layout: torch.memory_format) -> Callable[[], float]:
        model = timm.create_model(recipe.arch, num_classes=classes)
        compiled = recipe.machine.compile != "off"
        options: dict[str, Any] = {"compiled": compiled, "item": False, "fused": True, "layout": layout}
        return partial(timms_run, Timm(recipe, model, classes, device, iter(()), **options), work, steps, warm_up)

    own = partial(
        pipeline.ours,
        images_per_class=recipe.images_per_class,
        augment=recipe.augment,
        decoder=decoder_of(recipe, device),
    )
    return {
        OWN: lambda: partial(run, recipe, index, ranks, steps, warm_up),
        STEP: lambda: Turns(contenders(recipe, device, classes)[OWN], device, steps, warm_up),
        PIPELINE: lambda: partial(pipeline.turn, own, work, steps),
        **{f"{TIMM}, {name}": partial(timms, layout) for name, layout in LAYOUTS.items()},
    }


def run(recipe: Recipe, index: Index, ranks: Ranks, steps: int, warm_up: int) -> float:
    """Seconds a step of a real run of one epoch, into a folder that is gone afterwards: from the rates in its log,
    at log points `steps` apart at most, after at least `warm_up` steps. Its checkpoint comes after the last of them."""
    machine = replace(recipe.machine, log_steps=min(recipe.machine.log_steps, steps), tensorboard=False)
    short = replace(recipe, epochs=1, machine=machine)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        open_run(out, "never", toml.to_toml(short))
        train(short, out, index, None, ranks)
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    gc.collect()
    return seconds_a_step([told for told in map(json.loads, lines) if told["event"] == "train"], recipe, warm_up)


def seconds_a_step(points: list[dict[str, Any]], recipe: Recipe, warm_up: int) -> float:
    """The mean over all steps between log points that follow the first `warm_up` steps."""
    spent, counted, before = 0.0, 0, 0
    for point in points:
        count = point["step"] - before
        if before >= warm_up:
            spent += count * recipe.batch_size / point["images_per_s"]
            counted += count
        before = point["step"]
    return spent / counted


def timms_run(step: Timm, work: pipeline.Work, steps: int, warm_up: int) -> float:
    """Seconds a step of timm's loop over timm's loader, which is made for this and gone afterwards."""

    def train_on(count: int) -> None:
        for _ in range(count):
            step()

    with closing(endless(work)) as stream, cudnn_benchmark(step.cudnn_benchmark):
        step.feed = stream
        train_on(warm_up)
        spent = wall(partial(train_on, steps), work.device)
    step.feed = iter(())
    del stream
    gc.collect()
    return spent / steps


def endless(work: pipeline.Work) -> pipeline.Stream:
    """timm's loader, epoch after epoch."""
    loader = pipeline.timm_loader(work)
    while True:
        yield from loader
