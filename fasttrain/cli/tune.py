"""`fasttrain tune`: find settings by training with many of them."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import (
    DATA,
    FOLDER,
    PNG_SOFTWARE,
    SET_HELP,
    GroupedCommand,
    data_option,
    machine_option,
    model_option,
    output_option,
    program,
    shell_word,
    training_option,
    tuning_option,
)
from fasttrain.config.choices import CRITERIA, DEVICES, LINKS, LOSS_COMBINATIONS, ON_BAD
from fasttrain.distributed import signals
from fasttrain.utils.environment import torchrun_variable
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    from fasttrain.config.schema import Recipe
    from fasttrain.data.index import Index

SHARED_BYTES = 4 << 30  # a raw pack of the images is made where it has at most so many


@click.command(cls=GroupedCommand, short_help="Find settings by training with many of them.")
@model_option("--arch", metavar="A", help="Network, as in `run`.")
@model_option("--recipe", "recipe_name", metavar="NAME|FILE.toml", help="Recipe to start from; excludes --arch.")
@model_option("--loss", type=click.Choice(LOSS_COMBINATIONS), help="With --arch: the losses. Default: ce.")
@model_option("--init", metavar="RUN|FILE", help="Weights to start from, as in `run`.")
@data_option("--data", multiple=True, type=DATA, metavar="DIR|FILE",
             help="Training images, as in `run`; others are not used. Repeatable. Default: the demo set.")  # fmt: skip
@data_option("--on-bad", type=click.Choice(ON_BAD), help="As in `run`.")
@data_option("--links", type=click.Choice(LINKS), help="As in `run`.")
@training_option("--epochs", type=click.IntRange(1), help="Epochs of a trial. Default: the recipe's.")
@training_option("--image-size", type=click.IntRange(8), help="Side of the images, in pixels. Default: the recipe's.")
@training_option("--seed", type=click.IntRange(0), help="Seed of the trials and of the search. Default: the recipe's.")
@training_option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@tuning_option("--search", multiple=True, metavar="KEY=RANGE",
               help="A setting to search: log(LOW,HIGH), uniform(LOW,HIGH), int(LOW,HIGH) or choice(A,B,…). "
               "Repeatable. Default: learning rate, weight decay, batch size and augmentation.")  # fmt: skip
@tuning_option("--trials", type=click.IntRange(1), metavar="N",
               help="Trials in all, with earlier calls'. Default: 30, or any number with --budget.")  # fmt: skip
@tuning_option("--budget", metavar="TIME", help="How long this call may take, such as 2h or 90m.")
@tuning_option("--score", type=click.Choice(CRITERIA), default=None, help="What is to be best. Default: top1.")
@tuning_option("--folds", type=click.IntRange(2, 1000), default=5, show_default=True, metavar="N",
               help="Trials are validated on an Nth of the training images.")  # fmt: skip
@machine_option("--jobs", type=click.IntRange(1), help="Trials at a time. Default: the number of GPUs, or 1.")
@machine_option("--device", type=click.Choice(DEVICES), help="Default: auto, a GPU where there is one.")
@machine_option(
    "--workers", type=click.IntRange(0, 1024), help="DALI threads per trial. Default: 0, a share of the cores."
)
@output_option("--out", type=FOLDER, metavar="DIR", help="The search's folder. Default: runs/tune-<recipe>.")
def tune(
    arch: str | None,
    recipe_name: str | None,
    loss: str | None,
    init: str | None,
    data: tuple[str, ...],
    on_bad: str | None,
    links: str | None,
    epochs: int | None,
    image_size: int | None,
    seed: int | None,
    settings: tuple[str, ...],
    search: tuple[str, ...],
    trials: int | None,
    budget: str | None,
    score: str | None,
    folds: int,
    jobs: int | None,
    device: str | None,
    workers: int | None,
    out: str | None,
) -> None:
    """Find settings by training with many of them.

    The first trial has the recipe's own settings; later ones are chosen by Optuna. A trial is validated on a part of
    the training images, and stopped early where it is not among the best third. OUT/best.toml is the recipe that was
    best, OUT/trials.csv and OUT/trials.png show all. The same command goes on: after it was stopped, or with more
    --trials or --budget.
    """
    from fasttrain.checkpoints.run_dir import lock
    from fasttrain.data.open_data import open_data
    from fasttrain.evaluation.metrics import described
    from fasttrain.launch import recipe_of
    from fasttrain.tune import results
    from fasttrain.tune.search import ranges_of, values_of
    from fasttrain.tune.study import Search, first_rung, require_optuna
    from fasttrain.utils.durations import seconds_of
    from fasttrain.utils.text import printable

    if torchrun_variable("WORLD_SIZE", 1) > 1:
        raise UserError("`fasttrain tune` starts its runs itself; call it without torchrun, with --jobs N for N GPUs")
    require_optuna()
    started = time.monotonic()
    seconds = seconds_of(budget, "--budget") if budget else 0.0
    recipe, _ = recipe_of(
        arch=arch, recipe_name=recipe_name, loss=loss, init=init, data=data, on_bad=on_bad, links=links,
        epochs=epochs, image_size=image_size, seed=seed, settings=settings, device=device, workers=workers,
    )  # fmt: skip
    if score:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, best=score))
    val = recipe.data.val  # not used here, but by the run that follows
    recipe = replace(recipe, data=replace(recipe.data, val=""))
    folder = Path(out or Path("runs", f"tune-{recipe.name.replace('/', '-')}"))
    signals.install()
    with lock(folder):
        index, _ = open_data(replace(recipe.data, folds=0))
        ranges = ranges_of(search, recipe, len(index) * (folds - 1) // folds)
        shared = share(recipe, index, folder)
        rung, count = first_rung(recipe.epochs), jobs or gpus(recipe)
        of_trials = replace(
            recipe,
            data=replace(recipe.data, train=shared, folds=folds, fold=0),
            evaluation=replace(recipe.evaluation, every_epochs=rung, patience=0),
            checkpoint=replace(recipe.checkpoint, every_epochs=rung, keep=1),
            machine=replace(
                recipe.machine,
                tensorboard=False,
                track=(),
                workers=recipe.machine.workers or share_of_cores(count),
            ),
        )
        click.echo("searching " + ", ".join(map(str, ranges)), err=True)
        limit = trials or (0 if budget else 30)
        deadline = started + seconds if seconds else None
        found = Search(folder, of_trials, ranges, count, limit, deadline, lambda line: click.echo(line, err=True))
        try:
            found.run()
        finally:
            signals.restore()
            done = found.study.trials
            results.write_table(folder, done, ranges)
            drawn = results.draw(folder, done, ranges, recipe.evaluation.best, PNG_SOFTWARE)
            complete = [trial for trial in done if trial.state.name == "COMPLETE"]
            if complete:
                best = found.study.best_trial
                tuned = replace(
                    found.trial_recipe(best), name=f"{recipe.name}-tuned", data=replace(recipe.data, val=val)
                )
                tuned = replace(
                    tuned, evaluation=recipe.evaluation, checkpoint=recipe.checkpoint, machine=recipe.machine
                )
                results.write_best(folder, tuned)
        if not complete:
            raise UserError(
                "no trial has been trained to its end; call the command again with more --trials or --budget"
            )
    first, name = done[0], recipe.evaluation.best
    assert best.value is not None
    click.echo(f"best: trial {best.number}, {described(name, best.value)} on fold 0 of {folds}")
    if first.value is not None and best.number and values_of(recipe, ranges).keys() == first.params.keys():
        click.echo(f"the recipe's own settings: {described(name, first.value)}")
    for key, value in best.params.items():
        click.echo(f"  {key} = {value}")
    files = [results.BEST, results.TABLE, *([results.PICTURE] if drawn else [])]
    click.echo(f"wrote {', '.join(printable(folder / each) for each in files)}")
    options = "".join(f" --data {shell_word(each)}" for each in data)
    click.echo(f"next: {program()} run --recipe {shell_word(folder / results.BEST)}{options}")


def gpus(recipe: "Recipe") -> int:
    """How many trials run at a time: one per GPU, or one."""
    import torch

    return 1 if recipe.machine.device == "cpu" else max(1, torch.cuda.device_count())


def share_of_cores(jobs: int) -> int:
    """DALI threads of each of several trials at a time; 0, the default, for one."""
    return max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 else 0


def share(recipe: "Recipe", index: "Index", folder: Path) -> tuple[str, ...]:
    """The training images for the trials: where they are small enough, a pack of their pixels, so that they are decoded
    once; else those of the recipe. Raises UserError where the folder has a pack of other images."""
    from fasttrain.data import pack
    from fasttrain.data.folds import require_unique_ids
    from fasttrain.data.stores.pack import source_of
    from fasttrain.utils.text import printable

    require_unique_ids(index)

    size = int(index.sizes.astype("int64").prod(1).sum()) * 3
    path = folder / "images.safetensors"
    if not index.encoded or size > SHARED_BYTES:
        return recipe.data.train
    if not path.exists():
        pack.make(
            {"train": index}, path, pack.Encoding("raw", 0), workers=0, skip_bad=recipe.data.on_bad == "skip",
            command="fasttrain tune", say=lambda line: click.echo(line, err=True),
        )  # fmt: skip
    elif source_of(path) != pack.source({"train": index}):
        raise UserError(
            f"{printable(path)} was made from other images than {', '.join(map(printable, recipe.data.train))}; name "
            "another --out"
        )
    return (os.path.abspath(path),)
