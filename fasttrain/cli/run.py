"""`fasttrain run`: train a network."""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain.cli.options import (
    DATA,
    FOLDER,
    SET_HELP,
    GroupedCommand,
    absolute,
    data_option,
    machine_option,
    model_option,
    output_option,
    program,
    shell_word,
    training_option,
    writes_files,
)
from fasttrain.cli.recipes import chosen_recipe, on_demo_set
from fasttrain.config.choices import DEVICES, LINKS, LOSS_COMBINATIONS, ON_BAD
from fasttrain.distributed import signals
from fasttrain.utils.decoder_messages import Messages, shown_once
from fasttrain.utils.errors import Stopped, UserError
from fasttrain.utils.output import tolerant_output

if TYPE_CHECKING:
    from fasttrain.config.schema import DataConfig, Recipe
    from fasttrain.data.index import Index
    from fasttrain.data.open_data import Part, Parts
    from fasttrain.distributed.ranks import Ranks
    from fasttrain.train import Result


@click.command(cls=GroupedCommand)
@model_option("--arch", metavar="A", help="Network: tresnet_xl, resnest101e, seresnext101_32x4d or any other of timm.")
@model_option(
    "--recipe",
    "recipe_name",
    metavar="NAME|FILE.toml",
    help="Recipe by name (see `fasttrain recipes`), small_data/A for any network A, or a TOML file; excludes --arch.",
)
@model_option("--loss", type=click.Choice(LOSS_COMBINATIONS),
              help="With --arch: the losses. Default: ce; the others fine-tune the weights of --init.")  # fmt: skip
@model_option("--init", metavar="RUN|FILE", help="Weights to start from: a run's best, or a file of timm's weights.")
@data_option("--data", multiple=True, type=DATA, metavar="DIR|FILE",
             help="Training images: DIR/<class>/<image> or DIR/train; a pack, a table (.csv), tar shards, parquet or "
             "Arrow files, or their address. Repeatable. Default: the demo set.")  # fmt: skip
@data_option("--val", type=DATA, metavar="DIR|FILE", help="Validation images. Default: DIR/val, or the file's.")
@data_option("--on-bad", type=click.Choice(ON_BAD),
             help="A training image that cannot be decoded ends the run or is replaced. Default: stop.")  # fmt: skip
@data_option("--links", type=click.Choice(LINKS),
             help="Take links to places inside the folder, or follow all links. Default: inside.")  # fmt: skip
@training_option("--folds", type=click.IntRange(2, 1000), metavar="N",
                 help="Cross-validation: N runs, each validated on another Nth of the images.")  # fmt: skip
@training_option("--fold", type=click.IntRange(0), metavar="K", help="With --folds: only this run, counted from 0.")
@training_option("--epochs", type=click.IntRange(1), help="Passes over the images. Default: the recipe's.")
@training_option("--budget", metavar="TIME", help="Train for 2h, 90m or 45s instead of --epochs; ends annealed.")
@training_option("--until", metavar="TIME", help="The same, until 18:30 or 2027-01-31T18:30.")
@training_option("--batch-size", type=click.IntRange(1), help="Images per step, over all ranks. Default: the recipe's.")
@training_option("--image-size", type=click.IntRange(8), help="Side of the images, in pixels. Default: the recipe's.")
@training_option(
    "--lr", type=float, help="Peak learning rate, as it is. Default: the recipe's, scaled by the batch size."
)
@training_option("--seed", type=click.IntRange(0), help="Random seed. Default: the recipe's.")
@training_option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@machine_option("--device", type=click.Choice(DEVICES), help="Default: auto, a GPU where there is one.")
@machine_option(
    "--workers", type=click.IntRange(0, 1024), help="DALI threads per rank. Default: 0, this rank's share of the cores."
)
@machine_option("--compile/--no-compile", "compiled", default=None, help="Use torch.compile. Default: on a GPU.")
@output_option("--out", type=FOLDER, metavar="DIR", help="The run's folder. Default: runs/<recipe>.")
@output_option("--resume", default="auto", metavar="auto|never|PATH", show_default=True,
               help="Resume from the run's last checkpoint, start over (the old run's folder is renamed), or resume "
               "from PATH: a checkpoint, or a run's folder, for its last one.")  # fmt: skip
@output_option("--dry-run", is_flag=True, help="Check everything, print what would be done, and stop.")
def run(out: str | None, resume: str, dry_run: bool, fold: int | None, **options: Any) -> None:
    """Train a network.

    Without --data it trains on a small generated set for a few epochs. A run that was stopped resumes with the same
    command. With several GPUs:

        torchrun --nproc-per-node N -m fasttrain run …
    """
    started = time.monotonic()
    if dry_run:
        _run(out, resume, dry_run, fold, Messages(), started, **options)
        return
    signals.install()
    try:
        with shown_once() as messages, tolerant_output():
            _run(out, resume, dry_run, fold, messages, started, **options)
    finally:
        signals.restore()


def _run(
    out: str | None, resume: str, dry_run: bool, fold: int | None, messages: Messages, started: float, **options: Any
) -> None:
    from fasttrain.config import toml
    from fasttrain.distributed.ranks import ranks
    from fasttrain.evaluation.cross_validation import fold_folder
    from fasttrain.prepare import resolve_auto

    if signals.received():
        line = f"stopped by {signals.received()} before a step was done; the same command starts again"
        raise Stopped(line if writes_files() else "")
    recipe, on_demo = recipe_of(**options)
    toml.to_toml(recipe)  # raises now for what recipe.toml could not hold
    folder = Path(out or Path("runs", recipe.name))
    folds = options["folds"]
    if fold is not None and (not folds or fold >= folds):
        raise UserError(f"--fold {fold}: name --folds N too, with an N above {fold}")
    if folds and fold is None and recipe.budget.until:
        raise UserError("--until is for one run; with --folds name one --fold, or give each run a --budget")
    if folds and resume not in ("auto", "never"):
        raise UserError("--resume PATH is for one run; with --folds it is auto or never")

    with ranks(recipe.machine.device, recipe.machine.hang_timeout) as rank:
        if on_demo and rank.first:
            click.echo(
                f"no --data: training on the demo set, {recipe.image_size} px, {recipe.epochs} epochs. "
                f"Your own images: {program()} run --arch {recipe.arch} --data DIR  (DIR/<class>/<image>)",
                err=True,
            )
        recipe = resolve_auto(recipe, rank.device)
        if not folds:
            run_one(recipe, folder, resume, dry_run, rank, messages, started)
            return
        if recipe.data.folds != folds:
            raise UserError(f"--folds {folds} and --set data.folds={recipe.data.folds} disagree; leave one of them out")
        numbers = range(folds) if fold is None else (fold,)
        for number in numbers:  # what is wrong with one is said before any is trained
            check_fold(replace(recipe, data=replace(recipe.data, fold=number)), rank)
        for number in numbers:
            if rank.any(bool(signals.received())):
                raise Stopped(
                    f"stopped by {signals.received() or 'a signal to another rank'}; the same command resumes"
                )
            of_fold = replace(recipe, data=replace(recipe.data, fold=number))
            run_one(of_fold, fold_folder(folder, number), resume, dry_run, rank, messages, started)
            started = time.monotonic()
        if rank.first and not dry_run:
            print_folds(folder, folds)


def run_one(
    recipe: "Recipe", folder: Path, resume: str, dry_run: bool, rank: "Ranks", messages: Messages, started: float
) -> None:
    """Train a resolved recipe into a folder, or say what that would be. With folds, also write the probabilities of the
    images that the run has not trained on. started: see `train`."""
    from fasttrain.checkpoints.run_dir import lock, open_run, require_outside
    from fasttrain.config import toml
    from fasttrain.data.open_data import data_line, find_parts, open_parts
    from fasttrain.data.preload import preload
    from fasttrain.data.stage import staged
    from fasttrain.prepare import summary
    from fasttrain.train import train

    def opened() -> "tuple[Parts, tuple[Index, Index | None]]":
        parts = find_parts(data)
        return parts, open_parts(parts, data)

    data = staged(recipe.data, recipe.machine.stage)
    parts, (train_index, val_index) = rank.in_turn(opened)
    for part in (*parts.train, *parts.val):
        require_outside(folder, part.path)
    if dry_run:
        if rank.first:
            click.echo(f"{toml.to_toml(recipe)}\n{summary(recipe, train_index, val_index, rank, folder, parts)}")
        return
    if recipe.machine.preload and rank.local_rank == 0:
        preload([index for index in (train_index, val_index) if index is not None])
    if rank.first:
        click.echo(data_line(parts, train_index, val_index, data), err=True)
    with lock(folder) if rank.first else nullcontext():
        start = rank.from_first(lambda: open_run(folder, resume, toml.to_toml(recipe)))
        own = messages if rank.first else Messages()  # rank 0 says what is found
        result = train(recipe, folder, train_index, val_index, rank, start, own, started)
        if data.folds and val_index is not None:
            write_held_out(recipe, folder, val_index, rank)
    if rank.first:
        print_result(result, folder, parts.val, recipe)


def check_fold(recipe: "Recipe", rank: "Ranks") -> None:
    """Raises UserError where a fold's run could not make its batches."""
    from fasttrain.data.open_data import open_data
    from fasttrain.data.stage import staged
    from fasttrain.pipelines.plan import Plan

    data = staged(recipe.data, recipe.machine.stage)
    index, _ = rank.in_turn(lambda: open_data(data))
    Plan.of(recipe, index, rank.world, rank.rank)


def write_held_out(recipe: "Recipe", folder: Path, val_index: "Index", rank: "Ranks") -> None:
    """Write the probabilities of a run's best checkpoint for its own fold."""
    from fasttrain.evaluation import predictions
    from fasttrain.evaluation.cross_validation import HELD_OUT
    from fasttrain.predict import predict

    rank.any(False)  # wait until rank 0 has saved the checkpoint
    decoder = recipe.machine.decoder
    predicted = predict(folder, lambda *_: val_index, rank, workers=recipe.machine.workers, decoder=decoder)
    if predicted is not None:
        predictions.save(predicted, folder / HELD_OUT)


def print_folds(folder: Path, folds: int) -> None:
    """Print what the folds give together, or which are missing."""
    from fasttrain.evaluation import cross_validation
    from fasttrain.utils.text import printable

    lines = cross_validation.combine(folder, folds)
    if lines is None:
        done = sum((cross_validation.fold_folder(folder, n) / cross_validation.HELD_OUT).exists() for n in range(folds))
        click.echo(f"{done} of {folds} folds are done; once all are, {printable(folder)} gets their scores")
        return
    click.echo(f"{lines}\nwrote {printable(folder / cross_validation.OUT_OF_FOLD)}")
    click.echo(f"next: {program()} eval {shell_word(folder)} --data DIR, the folds' ensemble on other images")


def recipe_of(
    *,
    arch: str | None,
    recipe_name: str | None,
    loss: str | None,
    init: str | None,
    data: tuple[str, ...],
    val: str | None,
    on_bad: str | None,
    links: str | None,
    folds: int | None,
    epochs: int | None,
    budget: str | None,
    until: str | None,
    batch_size: int | None,
    image_size: int | None,
    lr: float | None,
    seed: int | None,
    settings: tuple[str, ...],
    device: str | None,
    workers: int | None,
    compiled: bool | None,
) -> "tuple[Recipe, bool]":
    """The recipe that the options describe, and whether it trains on the demo set."""
    from fasttrain import recipes
    from fasttrain.config import toml
    from fasttrain.utils.durations import seconds_of, seconds_until

    by_rule = (recipe_name or "").startswith(recipes.PREFIX) and not str(recipe_name).endswith(".toml")
    of_arch = str(recipe_name).removeprefix(recipes.PREFIX) if by_rule and not arch and not loss else ""
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
        ("--lr", "optim.lr", lr),
        ("--lr", "optim.lr_batch", None if lr is None else 0),
    ]
    for option, key, value in changes:
        if value is not None:
            recipe = toml.override(recipe, (key, value), option=option)
    return toml.override(recipe, *settings), on_demo


def count_images(data: "DataConfig", folds: int | None) -> int:
    """How many images a run trains on."""
    from fasttrain.data.open_data import open_data
    from fasttrain.data.stage import staged

    index, _ = open_data(replace(staged(data, ""), val="", folds=0))
    return len(index) * (folds - 1) // folds if folds else len(index)


def print_result(result: "Result", folder: Path, val: "list[Part]", recipe: "Recipe") -> None:
    """Print the scores, where the checkpoints are, and the command to evaluate them."""
    from fasttrain.evaluation.metrics import described
    from fasttrain.utils.text import printable

    place = printable(folder)
    if result.best is not None:
        last = f"top-1 {result.scores.top1:.2%}, top-5 {result.scores.top5:.2%}, " if result.scores else ""
        click.echo(f"{last}best {described(recipe.evaluation.best, result.best)}")
    click.echo(f"run folder: {place}  ({result.steps} steps; best checkpoint: {place}/best, last: {place}/last)")
    if recipe.data.folds:
        return
    val_folder = val[0].path if len(val) == 1 else "DIR"
    click.echo(f"next: {program()} eval {shell_word(folder)} --data {shell_word(val_folder)}")
