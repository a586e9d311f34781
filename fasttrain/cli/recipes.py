"""`fasttrain recipes` and `fasttrain show`: what a recipe says, and what its network sees."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import (
    FOLDER,
    PNG_SOFTWARE,
    SET_HELP,
    require_png,
)
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    from fasttrain.config.schema import Recipe


@click.command("recipes")
@click.argument("name", required=False)
def recipes_(name: str | None) -> None:
    """List the recipes, or print one as TOML that `run --recipe FILE.toml` takes."""
    from fasttrain import recipes
    from fasttrain.config import toml

    if name:
        click.echo(toml.to_toml(recipes.by_name(name)), nl=False)
        return
    click.echo(recipes.table())


@click.command()
@click.option("--arch", metavar="A", help="Network whose recipe to show.")
@click.option("--recipe", "recipe_name", metavar="NAME|FILE.toml", help="Recipe to show.")
@click.option("--data", type=FOLDER, metavar="DIR", help="Training images. None: the recipe's, or the demo set.")
@click.option("--epoch", type=click.IntRange(0), default=0, show_default=True, help="Epoch, from 0.")
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Step of the epoch, from 0.")
@click.option("--images", type=click.IntRange(1), default=32, show_default=True, help="At most so many of the batch.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("batch.png"), show_default=True,
              help="PNG to write.")  # fmt: skip
def show(
    arch: str | None,
    recipe_name: str | None,
    data: str | None,
    epoch: int,
    step: int,
    images: int,
    settings: tuple[str, ...],
    out: Path,
) -> None:
    """Draw the batch that the network sees at a step: cropped, flipped, augmented and mixed, with its labels."""
    from PIL.PngImagePlugin import PngInfo

    from fasttrain.config import toml
    from fasttrain.data import index as dataset
    from fasttrain.pipelines.plan import Plan
    from fasttrain.show_batch import draw_batch
    from fasttrain.utils.text import printable

    recipe = chosen_recipe(arch, recipe_name)
    if data:
        recipe = replace(recipe, data=replace(recipe.data, train=(os.path.abspath(data),), val=""))
    elif not recipe.data.train:
        recipe = on_demo_set(recipe)
    recipe = toml.override(recipe, *settings)
    require_png(out, "--out")
    index, _ = dataset.open_data(replace(recipe.data, val=""))
    plan = Plan.of(recipe, index)
    if epoch >= plan.epochs or step >= plan.steps_per_epoch:
        span = f"{plan.epochs} epochs of {plan.steps_per_epoch} steps"
        raise UserError(f"--epoch {epoch} --step {step}: there are {span}")
    told = PngInfo()
    told.add_text("Software", PNG_SOFTWARE)
    draw_batch(plan, index, epoch * plan.steps_per_epoch + step, images).save(out, pnginfo=told)
    click.echo(f"wrote {printable(out)}")


def chosen_recipe(arch: str | None, recipe_name: str | None, loss: str | None = None) -> "Recipe":
    from fasttrain import recipes

    if recipe_name and (arch or loss):
        raise UserError("--recipe excludes --arch and --loss: a recipe names its network and its losses")
    if recipe_name:
        return recipes.by_name(recipe_name)
    if not arch:
        raise UserError("name a network with --arch (such as tresnet_xl) or a recipe with --recipe")
    from fasttrain.models import ARCHS

    recipe = recipes.for_arch(arch, loss or "ce")
    if arch not in ARCHS and int(os.environ.get("RANK", 0)) == 0:
        rule = f"batch {recipe.batch_size}, {recipe.epochs} epochs by default"
        click.echo(f"{arch} has no report recipe: {rule}", err=True)
    return recipe


def on_demo_set(recipe: "Recipe") -> "Recipe":
    """`recipe` on the demo set, which is made in the user's cache on first use."""
    import torch

    from fasttrain import recipes
    from fasttrain.data import demo_set
    from fasttrain.data import index as dataset
    from fasttrain.models import Classifier

    with torch.device("meta"):
        parameters = sum(each.numel() for each in Classifier(recipe.arch, len(demo_set.CLASSES)).parameters())
    folder = dataset.cache_dir() / "demo-1"
    demo_set.make(folder)
    return recipes.demo(recipe, folder, parameters, int(os.environ.get("WORLD_SIZE", 1)))
