"""`fasttrain run`: train a network."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import (
    COMBINATIONS,
    FOLDER,
    SET_HELP,
    program,
    shell_word,
    writes,
)
from fasttrain.cli.recipes import chosen_recipe, on_demo_set
from fasttrain.distributed import signals
from fasttrain.utils.errors import Stopped, UserError

if TYPE_CHECKING:
    pass


@click.command()
@click.option("--arch", metavar="A", help="Network: tresnet_xl, resnest101e, seresnext101_32x4d or any other of timm.")
@click.option("--recipe", "recipe_name", metavar="NAME|FILE.toml", help="Recipe instead of a network's own.")
@click.option("--loss", type=click.Choice(COMBINATIONS), default=None,
              help="With --arch: which of the report's losses. Default: ce; the others go on from --init.")  # fmt: skip
@click.option("--init", metavar="CKPT|FILE", help="Start from these weights: a run's (its best) or timm's in a .pth.")
@click.option("--data", multiple=True, type=FOLDER, metavar="DIR", help="Training images; repeatable. None: demo set.")
@click.option("--val", type=FOLDER, metavar="DIR", help="Validation images. Default: DIR/val beside DIR/train.")
@click.option("--out", type=FOLDER, metavar="DIR", help="The run's folder. Default: runs/<recipe>.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the images. Default: the recipe's.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, over all ranks. Default: the recipe's.")
@click.option("--image-size", type=click.IntRange(8),
              help="Side of the square training images, in pixels. Default: the recipe's.")  # fmt: skip
@click.option("--lr", type=float, help="Peak learning rate. Default: by the recipe's rule.")
@click.option("--seed", type=click.IntRange(0), help="Seed of weights and of every random draw. Default: the recipe's.")
@click.option("--workers", type=click.IntRange(0), help="DALI threads a rank. 0: this rank's share of the cores.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: auto, a GPU where there is one.")
@click.option(
    "--resume",
    default="auto",
    metavar="auto|never|PATH",
    show_default=True,
    help="Go on from the run's last checkpoint, start over (the old run is moved aside), or from PATH.",
)
@click.option("--on-bad", type=click.Choice(["stop", "skip"]), default=None,
              help="A training image that cannot be decoded ends the run (stop, default) or is replaced.")  # fmt: skip
@click.option("--compile/--no-compile", "compiled", default=None, help="torch.compile. Default: on for CUDA.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@click.option("--dry-run", is_flag=True, help="Print what would be done and stop.")  # fmt: skip
def run(
    arch: str | None,
    recipe_name: str | None,
    loss: str | None,
    init: str | None,
    data: tuple[str, ...],
    val: str | None,
    out: str | None,
    epochs: int | None,
    batch_size: int | None,
    image_size: int | None,
    lr: float | None,
    seed: int | None,
    workers: int | None,
    device: str | None,
    resume: str,
    on_bad: str | None,
    compiled: bool | None,
    settings: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Train a network.

    Without --data it trains on a drawn demo set, on small images for a few epochs. The same command again goes on
    where a run was stopped. Several GPUs: torchrun --nproc-per-node N -m fasttrain run …
    """
    if not dry_run:
        signals.install()
    from fasttrain.checkpoints.run_dir import lock, open_run
    from fasttrain.config import toml
    from fasttrain.data import index as dataset
    from fasttrain.distributed.ranks import ranks
    from fasttrain.prepare import resolve_auto
    from fasttrain.train import summary, train
    from fasttrain.utils.text import printable

    if signals.received():
        again = "before a step was done; the same command starts again"
        raise Stopped(f"stopped by {signals.received()} {again}" if writes() else "")
    recipe = chosen_recipe(arch, recipe_name, loss)
    on_demo = not data and not recipe.data.train
    if on_demo:
        if val:
            raise UserError("--val without --data: name the training images too")
        recipe = on_demo_set(recipe)
    elif data:
        folders = tuple(os.path.abspath(each) for each in data)
        recipe = replace(recipe, data=replace(recipe.data, train=folders, val=""))
    if val:
        recipe = replace(recipe, data=replace(recipe.data, val=os.path.abspath(val)))
    changes: list[tuple[str, object]] = [
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("image_size", image_size),
        ("seed", seed),
        ("machine.workers", workers),
        ("machine.device", device),
        ("data.on_bad", on_bad),
        ("init.weights", init and os.path.abspath(init)),
    ]
    if compiled is not None:
        changes.append(("machine.compile", "on" if compiled else "off"))
    if lr is not None:
        changes += [("optim.lr", lr), ("optim.lr_batch", 0)]
    for key, value in changes:
        if value is not None:
            by = "--init" if init and key == "init.weights" else "--" + key.split(".")[-1].replace("_", "-")
            recipe = toml.override(recipe, (key, value), by=by)
    recipe = toml.override(recipe, *settings)
    toml.to_toml(recipe)  # refuses what the run's folder could not keep, before anything is read
    folder = Path(out or Path("runs", recipe.name))

    with ranks(recipe.machine.device, recipe.machine.hang_timeout) as here:
        if on_demo and here.first:
            click.echo(
                f"no --data: training on the demo set, {recipe.image_size} px, {recipe.epochs} epochs. "
                f"Your own images: {program()} run --arch {recipe.arch} --data DIR  (DIR/<class>/<image>)",
                err=True,
            )
        recipe = resolve_auto(recipe, here.device)
        train_index, val_index = here.in_turn(lambda: dataset.open_data(recipe.data))
        if dry_run:
            if here.first:
                click.echo(f"{toml.to_toml(recipe)}\n{summary(recipe, train_index, val_index, here, folder)}")
            return
        with lock(folder) if here.first else nullcontext():
            start = here.from_first(lambda: open_run(folder, resume, toml.to_toml(recipe)))
            result = train(recipe, folder, train_index, val_index, here, start)
        if here.first:
            place = printable(folder)
            if result.best is not None:
                last = f"top-1 {result.scores.top1:.2%}, top-5 {result.scores.top5:.2%}, " if result.scores else ""
                click.echo(f"{last}best top-1 {result.best:.2%}")
            whole = f"best checkpoint: {place}/best, last: {place}/last"
            click.echo(f"run folder: {place}  ({result.steps} steps; {whole})")
            held_out = recipe.data.val or (os.path.commonpath(val_index.paths) if val_index else "DIR")
            click.echo(f"next: {program()} eval {shell_word(folder)} --data {shell_word(held_out)}")
