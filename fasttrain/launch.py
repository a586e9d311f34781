"""From options to a trained run: what `fasttrain run` and `fasttrain.fit` share."""

import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import torch

from fasttrain import recipes
from fasttrain.checkpoints.run_dir import lock, open_run, require_outside
from fasttrain.config import toml
from fasttrain.config.choices import LOSS_COMBINATIONS
from fasttrain.config.schema import DataConfig, Recipe
from fasttrain.data import demo_set
from fasttrain.data.index import Index
from fasttrain.data.open_data import Parts, data_line, find_parts, open_data, open_parts
from fasttrain.data.preload import preload
from fasttrain.data.stage import is_address, staged
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation import predictions
from fasttrain.evaluation.cross_validation import HELD_OUT
from fasttrain.models import ARCHS, Classifier, require_known
from fasttrain.pipelines.plan import Plan
from fasttrain.predict import predict
from fasttrain.train import Result, train
from fasttrain.training.trackers import require_installed
from fasttrain.utils.decoder_messages import Messages
from fasttrain.utils.durations import seconds_of, seconds_until
from fasttrain.utils.environment import torchrun_variable
from fasttrain.utils.errors import UserError


def recipe_of(
    *,
    arch: str | None = None,
    recipe_name: str | Recipe | None = None,
    loss: str | None = None,
    init: str | None = None,
    data: Iterable[str] = (),
    val: str | None = None,
    on_bad: str | None = None,
    links: str | None = None,
    folds: int | None = None,
    epochs: int | None = None,
    budget: str | None = None,
    until: str | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    settings: Iterable[str | tuple[str, object]] = (),
    device: str | None = None,
    workers: int | None = None,
    compiled: bool | None = None,
    track: Iterable[str] = (),
) -> tuple[Recipe, bool]:
    """The recipe that the options of `fasttrain run` describe, and whether it trains on the demo set. Raises UserError
    where they are wrong or exclude each other."""
    data, settings, track = tuple(data), tuple(settings), tuple(track)
    named = recipe_name if isinstance(recipe_name, str) else ""
    by_rule = named.startswith(recipes.PREFIX) and not named.endswith(".toml") and not arch and not loss
    of_arch = named.removeprefix(recipes.PREFIX) if by_rule else ""
    recipe = recipes.for_arch(of_arch) if of_arch else chosen_recipe(arch, recipe_name, loss)
    on_demo = not data and not recipe.data.train
    if on_demo:
        if val:
            raise UserError("--val without --data: name the training images too")
        recipe = on_demo_set(recipe)
        if folds:
            recipe = replace(recipe, data=replace(recipe.data, val=""))
    elif data:
        folders = tuple(absolute(folder) for folder in data)
        recipe = replace(recipe, data=replace(recipe.data, train=folders, val=""))
    if val:
        recipe = replace(recipe, data=replace(recipe.data, val=absolute(val)))
    if sum(each is not None for each in (epochs, budget, until)) > 1:
        raise UserError("--epochs, --budget and --until exclude each other")
    if of_arch:
        if budget or until:
            raise UserError(f"--recipe {recipe_name} follows from the epochs; leave --budget and --until out")
        opened = replace(recipe.data, on_bad=on_bad or recipe.data.on_bad, links=links or recipe.data.links)
        chosen = toml.override(recipe, *settings)  # --set may change the epochs and the batch, too
        batch = batch_size or (chosen.batch_size if chosen.batch_size != recipe.batch_size else None)
        recipe = recipes.small_data(recipe, count_images(opened, folds), epochs or chosen.epochs, batch)
    if until:
        now = datetime.now().astimezone()
        until = (now + timedelta(seconds=seconds_until(until, "--until", now))).isoformat(timespec="seconds")
    changes: list[tuple[str, str, object]] = [
        ("--epochs", "budget.seconds", 0.0 if epochs or until else None),
        ("--epochs", "budget.until", "" if epochs or budget else None),
        ("--budget", "budget.seconds", seconds_of(budget, "--budget") if budget else None),
        ("--until", "budget.until", until),
        ("--folds", "data.folds", folds),
        ("--epochs", "epochs", epochs),
        ("--batch-size", "batch_size", batch_size),
        ("--image-size", "image_size", image_size),
        ("--seed", "seed", seed),
        ("--workers", "machine.workers", workers),
        ("--device", "machine.device", device),
        ("--on-bad", "data.on_bad", on_bad),
        ("--links", "data.links", links),
        ("--init", "init.weights", init and os.path.abspath(init)),
        ("--compile", "machine.compile", None if compiled is None else "on" if compiled else "off"),
        ("--track", "machine.track", track or None),
        ("--lr", "optim.lr", lr),
        ("--lr", "optim.lr_batch", None if lr is None else 0),
    ]
    for option, key, value in changes:
        if value is not None:
            recipe = toml.override(recipe, (key, value), option=option)
    recipe = toml.override(recipe, *settings)
    if torchrun_variable("RANK", 0) == 0:
        require_installed(recipe.machine.track)
    return recipe, on_demo


def chosen_recipe(arch: str | None, recipe_name: str | Recipe | None, loss: str | None = None) -> Recipe:
    """The recipe that --recipe names or is, or that belongs to --arch and --loss."""

    if recipe_name and (arch or loss):
        raise UserError("--recipe excludes --arch and --loss: a recipe names its network and its losses")
    if isinstance(recipe_name, Recipe):
        return recipe_name
    if recipe_name:
        return recipes.by_name(recipe_name)
    if not arch:
        raise UserError("name a network with --arch (such as tresnet_xl) or a recipe with --recipe")

    require_known(arch)
    if loss is not None and loss not in LOSS_COMBINATIONS:
        raise UserError(f"--loss must be one of {', '.join(LOSS_COMBINATIONS)}, not {loss!r}")
    recipe = recipes.for_arch(arch, loss or "ce")
    if arch not in ARCHS and torchrun_variable("RANK", 0) == 0:
        defaults = f"batch {recipe.batch_size}, {recipe.epochs} epochs, AutoAugment, CutMix"
        print(f"no recipe for {arch}: using the defaults ({defaults}), and your options", file=sys.stderr)
    return recipe


def on_demo_set(recipe: Recipe) -> Recipe:
    """`recipe` on the demo set, which is drawn into the user's cache on first use."""

    with torch.device("meta"):
        model = Classifier(recipe.arch, len(demo_set.CLASSES))
    parameters = sum(p.numel() for p in model.parameters())
    return recipes.demo(recipe, demo_set.cached(), parameters, torchrun_variable("WORLD_SIZE", 1))


def count_images(data: DataConfig, folds: int | None) -> int:
    """How many images a run trains on."""

    index, _ = open_data(replace(staged(data, ""), val="", folds=0))
    return len(index) * (folds - 1) // folds if folds else len(index)


def absolute(name: str) -> str:
    """A path as an absolute one; an address such as s3://bucket/file as it is."""

    return name if is_address(name) else os.path.abspath(name)


def check_fold(recipe: Recipe, rank: Ranks) -> None:
    """Raises UserError where a fold's run could not make its batches."""

    data = staged(recipe.data, recipe.machine.stage)
    index, _ = rank.in_turn(lambda: open_data(data))
    Plan.of(recipe, index, rank.world, rank.rank)


def write_held_out(recipe: Recipe, folder: Path, val_index: Index, rank: Ranks) -> None:
    """Write the probabilities of a run's best checkpoint for its own fold."""

    rank.any(False)  # wait until rank 0 has saved the checkpoint
    decoder = recipe.machine.decoder
    predicted = predict(folder, lambda *_: val_index, rank, workers=recipe.machine.workers, decoder=decoder)
    if predicted is not None:
        predictions.save(predicted, folder / HELD_OUT)


@dataclass(frozen=True)
class RunData:
    """The images of a run. data: the recipe's settings, with the local copies of files that are copied first."""

    data: DataConfig
    parts: Parts
    train_index: Index
    val_index: Index | None


def open_run_data(recipe: Recipe, folder: Path, rank: Ranks) -> RunData:
    """Open the images of a run on this rank. Raises UserError where they cannot be used, or the run's folder is inside
    theirs."""
    data = staged(recipe.data, recipe.machine.stage)

    def opened() -> RunData:
        parts = find_parts(data)
        return RunData(data, parts, *open_parts(parts, data))

    run_data = rank.in_turn(opened)
    for part in (*run_data.parts.train, *run_data.parts.val):
        require_outside(folder, part.path)
    return run_data


def train_run(
    recipe: Recipe,
    folder: Path,
    run_data: RunData,
    resume: str,
    rank: Ranks,
    messages: Messages | None = None,
    started: float | None = None,
) -> Result:
    """Train a resolved recipe into a run's folder. With folds, also write the probabilities of the images that the run
    has not trained on. resume: see `open_run`. messages, started: see `train`. Raises like these two."""
    data, train_index, val_index = run_data.data, run_data.train_index, run_data.val_index
    if recipe.machine.preload and rank.local_rank == 0:
        preload([index for index in (train_index, val_index) if index is not None])
    if rank.first:
        print(data_line(run_data.parts, train_index, val_index, data), file=sys.stderr)
    with lock(folder) if rank.first else nullcontext():
        start = rank.from_first(lambda: open_run(folder, resume, toml.to_toml(recipe)))
        own = messages if messages and rank.first else Messages()  # rank 0 says what is found
        result = train(recipe, folder, train_index, val_index, rank, start, own, started)
        if data.folds and val_index is not None:
            write_held_out(recipe, folder, val_index, rank)
    return result
