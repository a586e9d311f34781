"""Recipes by name, and recipes as text: TOML in, TOML out, and single settings by dotted key."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fasttrain.config.schema import AugmentConfig, DataConfig, EmaConfig, MixConfig, OptimConfig, Recipe
from fasttrain.losses import LOSSES
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.base import Loss
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.distillation import Distillation
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_text
from fasttrain.utils.text import printable

T = TypeVar("T")

_TOML_LENGTH, _TOML_DOTS = 1 << 16, 1000  # most characters, and most dots in a line

# What `--loss` names: the losses of the report's three combinations.
COMBINATIONS: dict[str, tuple[Loss, ...]] = {
    "ce": (CrossEntropy(smoothing=0.1),),
    "ce+triplet": (CrossEntropy(smoothing=0.1), Triplet(margin=0.3)),
    "ce+arcface": (CrossEntropy(smoothing=0.1), ArcFace(scale=30.0, margin_rad=0.5)),
}


def second_stage(recipe: Recipe, combination: str) -> Recipe:
    """The recipe that goes on from `recipe`'s weights with another loss added, for four fifths of its epochs (200 of
    the report's 250): warm-up, cosine and learning rate start again. Triplet has 4 images of each class in a batch."""
    return replace(
        recipe,
        name=recipe.name.removesuffix("-ce") + f"-{combination}",
        epochs=recipe.epochs * 4 // 5,
        losses=COMBINATIONS[combination],
        images_per_class=4 if combination == "ce+triplet" else 0,
    )


# ---- DeepBlueAI (Luo, Li and Zhang, "A Technical Report for VIPriors Image Classification Challenge", 2020)

_RESNEST = Recipe(
    name="deepblueai/resnest101e-ce",
    arch="resnest101e",
    batch_size=128,
    epochs=250,
    losses=COMBINATIONS["ce"],
    augment=AugmentConfig(autoaugment="imagenet-24"),
)
_SERESNEXT = replace(_RESNEST, name="deepblueai/seresnext101_32x4d-ce", arch="seresnext101_32x4d")
_TRESNET = replace(_RESNEST, name="deepblueai/tresnet_xl-ce", arch="tresnet_xl", batch_size=256)
_SEVEN = (
    _RESNEST,
    second_stage(_RESNEST, "ce+triplet"),
    second_stage(_RESNEST, "ce+arcface"),
    _TRESNET,
    second_stage(_TRESNET, "ce+triplet"),
    _SERESNEXT,
    second_stage(_SERESNEXT, "ce+arcface"),
)
ENSEMBLE = tuple(recipe.name for recipe in _SEVEN)
# The report's text says that this model was trained at 448 pixels, its table mostly has 224.
_RESNEST_448 = replace(_RESNEST, name="deepblueai/resnest101e-ce-448", image_size=448)

# ---- Bag of Tricks (He et al. 2018, arXiv 1812.01187): ResNet-50 at batch 1024, each recipe one rung above another

_EFFICIENT = Recipe(
    name="bag_of_tricks/efficient",
    arch="resnet50",
    batch_size=1024,
    epochs=120,
    losses=(CrossEntropy(smoothing=0.0),),
    optim=OptimConfig(nesterov=True, decay_norm_bias=False, warmup_epochs=5.0, schedule="step"),
    augment=AugmentConfig(autoaugment="none"),
    mix=MixConfig(cutmix=0.0),
)
_BASELINE = replace(
    _EFFICIENT,
    name="bag_of_tricks/baseline",
    batch_size=256,
    precision="fp32",
    zero_gamma=False,
    optim=replace(_EFFICIENT.optim, decay_norm_bias=True, warmup_epochs=0.0),
)
_D = replace(_EFFICIENT, name="bag_of_tricks/resnet-d", arch="resnet50d")
_COSINE = replace(_D, name="bag_of_tricks/cosine", optim=replace(_D.optim, schedule="cosine"))
_SMOOTHING = replace(_COSINE, name="bag_of_tricks/smoothing", losses=(CrossEntropy(smoothing=0.1),))
_DISTILLED = replace(
    _SMOOTHING, name="bag_of_tricks/distillation", losses=(*_SMOOTHING.losses, Distillation(temperature=20.0))
)
_MIXUP = replace(
    _SMOOTHING, name="bag_of_tricks/mixup", mix=MixConfig(cutmix=0.0, mixup=1.0, mixup_alpha=0.2), epochs=200
)
_BOTH = replace(_MIXUP, name="bag_of_tricks/mixup-distillation", losses=_DISTILLED.losses)

# ---- Attract-and-Repulse (arXiv 2206.06168). Its parts are known and its constants are not: these are our constants


def stage1(recipe: Recipe) -> Recipe:
    """Stage 1 of Attract-and-Repulse (our constants) in place of a network's stage 1: symmetric cross entropy attracts
    the images of a class, a contrastive term that fades repulses each from all others, under RandAugment and random
    erasing. Every image is seen in two views a step."""
    return replace(
        recipe,
        name=f"attract_repulse/stage1-{recipe.arch}",
        losses=(SymmetricCrossEntropy(), Contrastive(decay="cosine")),
        augment=AugmentConfig(autoaugment="none", randaugment=2, randaugment_magnitude=9, erase=0.25),
    )


def stage2(recipe: Recipe) -> Recipe:
    """Stage 2 (our constants), from the weights of a stage 1: a mean teacher, which sees a view of its own, gives soft
    labels too. What counts in the end is the teacher."""
    return replace(
        recipe,
        name=recipe.name.replace("stage1-", "stage2-"),
        epochs=recipe.epochs * 4 // 5,
        losses=(*recipe.losses, MeanTeacher(ramp_epochs=5.0)),
        ema=EmaConfig(decay=0.999),
    )


_ATTRACTING = tuple(stage1(each) for each in (_RESNEST, _TRESNET, _SERESNEXT))

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *_SEVEN,
        _RESNEST_448,
        *(_BASELINE, _EFFICIENT, _D, _COSINE, _SMOOTHING, _DISTILLED, _MIXUP, _BOTH),
        *_ATTRACTING,
        *map(stage2, _ATTRACTING),
    )
}


def for_arch(arch: str, combination: str = "ce") -> Recipe:
    """The report's recipe of a network and a key of COMBINATIONS. Where it has none, the same rules: stage 1 with
    batch 128 and 90 epochs for a network that is not the report's, and stage 2 from there as in `second_stage`."""
    report = {recipe.name: recipe for recipe in _SEVEN}
    name = f"deepblueai/{arch}-{combination}"
    if name in report:
        return report[name]
    first = report.get(f"deepblueai/{arch}-ce") or Recipe(name=arch, arch=arch, losses=COMBINATIONS["ce"])
    return first if combination == "ce" else second_stage(first, combination)


def demo(recipe: Recipe, folder: Path, parameters: int, ranks: int = 1) -> Recipe:
    """`recipe` on the demo set in `folder`, in minutes on a CPU: small images and batches and few epochs, the fewer
    (at a lower learning rate) for a network of more than 30 million parameters. Crops keep at least half of an
    image, since of 64 pixels less shows little. The batch is of some 25 images that divide among the ranks."""
    large = parameters > 30_000_000
    per_class = min(recipe.images_per_class, 4)
    least = ranks * max(1, per_class)
    return replace(
        recipe,
        name=f"demo-{recipe.name.rsplit('/', 1)[-1].removesuffix('-ce')}",
        image_size=64,
        batch_size=max(25 // least, 1) * least,
        images_per_class=per_class,
        epochs=4 if large else 32,
        optim=replace(recipe.optim, lr=0.01 if large else 0.05, lr_batch=0),
        augment=replace(recipe.augment, crop_area=(0.5, 1.0)),
        data=DataConfig(train=(str(folder / "train"),), val=str(folder / "val")),
    )


def by_name(name: str) -> Recipe:
    """A recipe of `RECIPES`, or of a TOML file when `name` ends in .toml."""
    if name.endswith(".toml"):
        try:
            text = read_text(name, _TOML_LENGTH)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot read the recipe {printable(name)}: {printable(why)}") from None
        return from_toml(text, where=printable(name))
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
    """Text that `from_toml` turns back into an equal recipe, and that is safe to print. UserError where the recipe
    names a file or folder in bytes that are no UTF-8: TOML has no way to write those."""
    table = to_dict(recipe)
    for text in _texts(table):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                f"{printable(text)} is not UTF-8, and a recipe could not name it; rename it, or name a link to it"
            )
    import tomli_w  # not needed to train, and not everywhere where kernels are measured

    text = tomli_w.dumps(table)
    return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08X}" for c in text)


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def from_toml(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe. A key that is left out has its default; an unknown one is an error that names the nearest."""
    try:
        table = _parsed(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid TOML: {printable(str(error))}") from None
    return from_dict(table, where)


def _parsed(text: str) -> dict[str, Any]:
    """What TOML of anybody's says. ValueError where it is none, or would keep tomllib busy: for a key of many parts
    that takes time with the square of their number."""
    if len(text) > _TOML_LENGTH or any(line.count(".") > _TOML_DOTS for line in text.splitlines()):
        raise ValueError("it is too long for a recipe")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_dict(table: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain values, as `to_dict` and TOML have them. `where` is named in errors."""
    table = dict(table)
    table.setdefault("losses", {CrossEntropy.name: {}})
    table.setdefault("name", Path(where).stem)
    if "arch" not in table:
        raise UserError(f'{where}: no `arch`; name the network, as in arch = "tresnet_xl"')
    return _build(Recipe, table, where, "")


def override(recipe: Recipe, *settings: str | tuple[str, object], by: str = "--set") -> Recipe:
    """`recipe` with settings changed, all at once: by text such as `optim.weight_decay=5e-5` or `epochs=10`, whose
    value is read as TOML and, where it is not TOML, as plain text; or by a key and its value.

    `by` is the option to name in errors.
    """
    table = to_dict(recipe)
    for setting in settings:
        _set(table, *(_read(setting, by) if isinstance(setting, str) else setting), by)
    return _build(Recipe, table, by, "")


def _read(setting: str, by: str) -> tuple[str, object]:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{by} {printable(setting)}: expected key=value or part.key=value")
    try:
        return key, _parsed(f"value = {text}")["value"]
    except ValueError:
        return key, text


def _set(table: dict[str, Any], key: str, value: object, by: str) -> None:
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


def _nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    return f"; there are: {', '.join(prefix + each for each in known)}" if known else ""


_ONCE_TRUE_OR_FALSE = ("machine.align",)  # settings that were, and may still be written so: on and off


def _build(cls: type[T], table: dict[str, Any], where: str, prefix: str) -> T:
    """A frozen dataclass from a table of plain values, each checked against the field's type."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise UserError(f"{where}: no key {prefix + key!r}{_nearest(key, fields, prefix)}")
        if type(value) is bool and prefix + key in _ONCE_TRUE_OR_FALSE:
            value = "on" if value else "off"
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
            raise UserError(f"{where}: {key} must be a table of settings, not {_told(value)}")
        return _build(hint, value, where, key + ".")
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(value, list) and (kinds[-1] is types.EllipsisType or kinds[-1] is ...):
            return tuple(_typed(kinds[0], each, where, key) for each in value)
        if isinstance(value, list) and len(value) == len(kinds):
            return tuple(_typed(kind, each, where, key) for kind, each in zip(kinds, value, strict=True))
        size = "any number" if kinds[-1] is ... else str(len(kinds))
        raise UserError(f"{where}: {key} must be a list of {size} of {kinds[0].__name__}, not {_told(value)}")
    if hint in (int, float) and type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {key} must be a number of 64 bits, not {_told(value)}")
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a finite number, not {value!r}")
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
        raise UserError(f"{where}: {key} must be {kind}, not {_told(value)}")
    return value


def _told(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or lists in lists
        return "what cannot be told here"
    return text if len(text) <= 200 else f"{text[:199]}…"
