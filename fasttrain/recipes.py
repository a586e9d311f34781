"""Recipes by name, and recipes as text: TOML in, TOML out, and single settings by dotted key."""

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from fasttrain.config import Augment, Data, Recipe
from fasttrain.errors import UserError
from fasttrain.losses import LOSSES
from fasttrain.losses.cross_entropy import CrossEntropy

T = TypeVar("T")

_RESNEST = Recipe(
    name="deepblueai/resnest101e-ce",
    arch="resnest101e",
    batch_size=128,
    epochs=250,
    losses=(CrossEntropy(smoothing=0.1),),
    augment=Augment(autoaugment="imagenet-24"),
)
_SERESNEXT = replace(_RESNEST, name="deepblueai/seresnext101_32x4d-ce", arch="seresnext101_32x4d")
_TRESNET = replace(_RESNEST, name="deepblueai/tresnet_xl-ce", arch="tresnet_xl", batch_size=256)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (_TRESNET, _RESNEST, _SERESNEXT)}


def for_arch(arch: str) -> Recipe:
    """The report's recipe of a network, or the defaults (batch 128, 90 epochs, the same rules) for any other."""
    for recipe in RECIPES.values():
        if recipe.arch == arch:
            return recipe
    return Recipe(name=arch, arch=arch, losses=(CrossEntropy(smoothing=0.1),))


def demo(recipe: Recipe, folder: Path, parameters: int) -> Recipe:
    """`recipe` on the demo set in `folder`, in minutes on a CPU: small images and batches and few epochs, the fewer
    (at a lower learning rate) for a network of more than 30 million parameters. Crops keep at least half of an
    image, since of 64 pixels less shows little."""
    large = parameters > 30_000_000
    return replace(
        recipe,
        name=f"demo-{recipe.arch}",
        image_size=64,
        batch_size=25,
        epochs=4 if large else 32,
        optim=replace(recipe.optim, lr=0.01 if large else 0.05, lr_batch=0),
        augment=replace(recipe.augment, crop_area=(0.5, 1.0)),
        data=Data(train=(str(folder / "train"),), val=str(folder / "val")),
    )


def by_name(name: str) -> Recipe:
    """A recipe of `RECIPES`, or of a TOML file when `name` ends in .toml."""
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return from_toml(path.read_text(encoding="utf-8"), where=name)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the recipe {name}: {error}") from None
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}{_nearest(name, RECIPES)}; `fasttrain recipes` lists them")
    return RECIPES[name]


def table() -> str:
    """The recipes with what sets them apart, one a line."""
    rows: list[tuple[str, ...]] = [("recipe", "network", "px", "batch", "peak lr", "epochs", "losses")]
    for recipe in RECIPES.values():
        losses = " + ".join(loss.name for loss in recipe.losses)
        numbers = (recipe.image_size, recipe.batch_size, f"{recipe.peak_lr:g}", recipe.epochs)
        rows.append((recipe.name, recipe.arch, *map(str, numbers), losses))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as TOML and JSON have them. `losses` becomes a table of tables, keyed by the loss's name."""
    tables = dataclasses.asdict(recipe)
    tables["losses"] = {loss.name: dataclasses.asdict(loss) for loss in recipe.losses}  # type: ignore[call-overload]
    return _plain(tables)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def to_toml(recipe: Recipe) -> str:
    """Text that `from_toml` turns back into an equal recipe."""
    return tomli_w.dumps(to_dict(recipe))


def from_toml(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe. A key that is left out has its default; an unknown one is an error that names the nearest."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None
    return from_dict(table, where)


def from_dict(table: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain values, as `to_dict` and TOML have them. `where` is named in errors."""
    table = dict(table)
    table.setdefault("losses", {CrossEntropy.name: {}})
    table.setdefault("name", Path(where).stem)
    if "arch" not in table:
        raise UserError(f'{where}: no `arch`; name the network, as in arch = "tresnet_xl"')
    return _build(Recipe, table, where, "")


def override(recipe: Recipe, setting: str, by: str = "--set") -> Recipe:
    """`recipe` with one setting changed by text, such as `optim.weight_decay=5e-5` or `epochs=10`.

    The value is read as TOML and, where it is not TOML, as plain text. `by` is the option to name in errors.
    """
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{by} {setting}: expected key=value or part.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = to_dict(recipe)
    at = table
    *parts, last = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(at.get(part), dict):
            known = [name for name in at if isinstance(at[name], dict)]
            raise UserError(f"{by}: no part {'.'.join(parts[: depth + 1])!r}{_nearest(part, known)}")
        at = at[part]
    if last not in at:
        raise UserError(f"{by}: no key {key!r}{_nearest(last, at, prefix=key[: -len(last)])}")
    if isinstance(at[last], dict):
        raise UserError(f"{by}: {key!r} is a part; set one of its keys: {', '.join(f'{key}.{k}' for k in at[last])}")
    at[last] = value
    return _build(Recipe, table, by, "")


def _nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    return f"; there are: {', '.join(prefix + each for each in known)}" if known else ""


def _build(cls: type[T], table: dict[str, Any], where: str, prefix: str) -> T:
    """A frozen dataclass from a table of plain values, each checked against the field's type."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise UserError(f"{where}: no key {prefix + key!r}{_nearest(key, fields, prefix)}")
        if key == "losses":
            values[key] = _losses(value, where)
        else:
            values[key] = _typed(hints[key], value, where, prefix + key)
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {prefix}{error}") from None


def _losses(table: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(table, dict):
        raise UserError(f"{where}: losses must be tables such as [losses.cross_entropy]")
    for name in table:
        if name not in LOSSES:
            raise UserError(f"{where}: no loss {name!r}{_nearest(name, LOSSES)}")
    return tuple(_typed(LOSSES[name], settings, where, f"losses.{name}") for name, settings in table.items())


def _typed(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} must be a table of settings, not {value!r}")
        return _build(hint, value, where, key + ".")
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(value, list) and (kinds[-1] is types.EllipsisType or kinds[-1] is ...):
            return tuple(_typed(kinds[0], each, where, key) for each in value)
        if isinstance(value, list) and len(value) == len(kinds):
            return tuple(_typed(kind, each, where, key) for kind, each in zip(kinds, value, strict=True))
        size = "any number" if kinds[-1] is ... else str(len(kinds))
        raise UserError(f"{where}: {key} must be a list of {size} of {kinds[0].__name__}, not {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
        raise UserError(f"{where}: {key} must be {kind}, not {value!r}")
    return value
