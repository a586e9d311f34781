"""`fasttrain run`: train a network."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain.cli.options import (
    DATA,
    FOLDER,
    SET_HELP,
    GroupedCommand,
    data_option,
    machine_option,
    model_option,
    output_option,
    program,
    shell_word,
    training_option,
    writes_files,
)
from fasttrain.config.choices import DEVICES, LINKS, LOSS_COMBINATIONS, ON_BAD
from fasttrain.distributed import signals
from fasttrain.utils.decoder_messages import Messages, shown_once
from fasttrain.utils.errors import Stopped, UserError
from fasttrain.utils.output import tolerant_output

if TYPE_CHECKING:
    from fasttrain.config.schema import Recipe
    from fasttrain.data.open_data import Part
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
    "--lr", type=float, help="Peak learning rate, not scaled by the batch size. Default: the recipe's, which is."
)
@training_option("--seed", type=click.IntRange(0), help="Random seed. Default: the recipe's.")
@training_option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@machine_option("--device", type=click.Choice(DEVICES), help="Default: auto, a GPU where there is one.")
@machine_option(
    "--workers", type=click.IntRange(0, 1024), help="DALI threads per rank. Default: 0, this rank's share of the cores."
)
@machine_option("--compile/--no-compile", "compiled", default=None, help="Use torch.compile. Default: on a GPU.")
@machine_option("--track", multiple=True, metavar="TRACKER:PROJECT",
                help="Log to wandb:PROJECT, trackio:PROJECT or mlflow:EXPERIMENT as well. Repeatable.")  # fmt: skip
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
    from fasttrain.launch import check_fold, recipe_of
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
    """Train a resolved recipe into a folder, or say what that would be. started: see `train`."""
    from fasttrain.config import toml
    from fasttrain.launch import open_run_data, train_run
    from fasttrain.prepare import summary

    data = open_run_data(recipe, folder, rank)
    if dry_run:
        if rank.first:
            would = summary(recipe, data.train_index, data.val_index, rank, folder, data.parts)
            click.echo(f"{toml.to_toml(recipe)}\n{would}")
        return
    result = train_run(recipe, folder, data, resume, rank, messages, started)
    if rank.first:
        print_result(result, folder, data.parts.val, recipe)


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
