"""Recipes by name. There is one file per source, headed by its commands, its reference and its results."""

from fasttrain.config.schema import Recipe
from fasttrain.config.toml import TEXT_LENGTH, from_toml, nearest
from fasttrain.recipes.attract_repulse import STAGE1, stage1, stage2
from fasttrain.recipes.bag_of_tricks import BASELINE, BOTH, COSINE, DISTILLED, EFFICIENT, MIXUP, RESNET_D, SMOOTHING
from fasttrain.recipes.deepblueai import COMBINATIONS, ENSEMBLE, RESNEST_448, SEVEN, second_stage
from fasttrain.recipes.demo_set import demo
from fasttrain.recipes.small_data import PREFIX, small_data
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_text
from fasttrain.utils.text import printable

__all__ = [
    "COMBINATIONS",
    "ENSEMBLE",
    "PREFIX",
    "RECIPES",
    "by_name",
    "demo",
    "for_arch",
    "second_stage",
    "small_data",
    "stage1",
    "stage2",
    "table",
]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *SEVEN,
        RESNEST_448,
        *(BASELINE, EFFICIENT, RESNET_D, COSINE, SMOOTHING, DISTILLED, MIXUP, BOTH),
        *STAGE1,
        *map(stage2, STAGE1),
    )
}


def for_arch(arch: str, combination: str = "ce") -> Recipe:
    """The DeepBlueAI report's recipe for a network and a key of COMBINATIONS. A network that the report does not train
    has batch 128 and 90 epochs in stage 1; stage 2 follows from it (see `second_stage`)."""
    report = {recipe.name: recipe for recipe in SEVEN}
    name = f"deepblueai/{arch}-{combination}"
    if name in report:
        return report[name]
    first = report.get(f"deepblueai/{arch}-ce") or Recipe(name=arch, arch=arch, losses=COMBINATIONS["ce"])
    return first if combination == "ce" else second_stage(first, combination)


def by_name(name: str) -> Recipe:
    """A recipe of `RECIPES`, or of a TOML file if `name` ends in .toml. Raises UserError where there is none."""
    if name.endswith(".toml"):
        try:
            text = read_text(name, TEXT_LENGTH)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot read the recipe {printable(name)}: {printable(why)}") from None
        return from_toml(text, where=printable(name))
    if name.startswith(PREFIX):
        raise UserError(
            f"{printable(name)} follows from the training images and the epochs, so only `run` takes it; "
            f"`fasttrain run --recipe {printable(name)} --data DIR --epochs N --dry-run` prints it"
        )
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}{nearest(name, RECIPES)}; `fasttrain recipes` lists them")
    return RECIPES[name]


def table() -> str:
    """The recipes with their main settings, one per line."""
    rows: list[tuple[str, ...]] = [("recipe", "network", "px", "batch", "peak lr", "epochs", "losses")]
    for recipe in RECIPES.values():
        losses = " + ".join(loss.name for loss in recipe.losses)
        numbers = (recipe.image_size, recipe.batch_size, f"{recipe.peak_lr:g}", recipe.epochs)
        rows.append((recipe.name, recipe.arch, *map(str, numbers), losses))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
