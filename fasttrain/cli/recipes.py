"""`fasttrain recipes` and `fasttrain show`: the recipes, and what their networks see."""

from dataclasses import replace
from pathlib import Path

import click

from fasttrain.cli.options import (
    DATA,
    FILE,
    PNG_SOFTWARE,
    SET_HELP,
    GroupedCommand,
    data_option,
    model_option,
    output_option,
    require_png,
    training_option,
)
from fasttrain.utils.errors import UserError


@click.command("recipes", short_help="List the recipes, or print one.")
@click.argument("name", metavar="[NAME|FILE.toml]", required=False)
def recipes_(name: str | None) -> None:
    """List the recipes, or print one as TOML, with a comment for each setting.

    `fasttrain run --recipe FILE.toml` reads such a file.
    """
    from fasttrain import recipes
    from fasttrain.config import toml

    if name:
        click.echo(toml.to_toml(recipes.by_name(name), comments=True), nl=False)
        return
    click.echo(recipes.table())


@click.command(cls=GroupedCommand, short_help="Draw a batch as the network sees it.")
@model_option("--arch", metavar="A", help="Network whose recipe to show.")
@model_option("--recipe", "recipe_name", metavar="NAME|FILE.toml", help="Recipe to show.")
@data_option("--data", type=DATA, metavar="DIR|FILE", help="Training images. Default: the recipe's, or the demo set.")
@training_option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@output_option("--epoch", type=click.IntRange(0), default=0, show_default=True, help="Epoch of the batch, from 0.")
@output_option("--step", type=click.IntRange(0), default=0, show_default=True, help="Step in the epoch, from 0.")
@output_option("--images", type=click.IntRange(1), default=32, show_default=True, help="Images of the batch, at most.")
@output_option("--out", type=FILE, metavar="FILE.png", default=Path("batch.png"), show_default=True,
               help="Write the picture here.")  # fmt: skip
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
    from fasttrain.data.open_data import open_data
    from fasttrain.launch import absolute, chosen_recipe, on_demo_set
    from fasttrain.pipelines.plan import Plan
    from fasttrain.show_batch import draw_batch
    from fasttrain.utils.files import replacing
    from fasttrain.utils.text import printable

    recipe = chosen_recipe(arch, recipe_name)
    if data:
        recipe = replace(recipe, data=replace(recipe.data, train=(absolute(data),), val=""))
    elif not recipe.data.train:
        recipe = on_demo_set(recipe)
    recipe = toml.override(recipe, *settings)
    require_png(out, "--out")
    index, _ = open_data(replace(recipe.data, val=""))
    plan = Plan.of(recipe, index)
    if epoch >= plan.epochs or step >= plan.steps_per_epoch:
        raise UserError(
            f"--epoch {epoch} --step {step}: there are {plan.epochs} epochs of {plan.steps_per_epoch} steps"
        )
    info = PngInfo()
    info.add_text("Software", PNG_SOFTWARE)
    picture = draw_batch(plan, index, epoch * plan.steps_per_epoch + step, images)
    with replacing(out) as temporary:
        picture.save(temporary, pnginfo=info)
    click.echo(f"wrote {printable(out)}")
