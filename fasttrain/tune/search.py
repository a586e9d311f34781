"""What is searched: settings of a recipe, each with its range."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

if TYPE_CHECKING:
    from optuna import Trial

_FORM = re.compile(r"\s*([\w.]+)\s*=\s*(log|uniform|int|choice)\s*\((.*)\)\s*", re.DOTALL)
_EXAMPLES = "optim.lr=log(1e-3,1), mix.cutmix=uniform(0,1), epochs=int(20,90) or batch_size=choice(32,64)"
_MOST_CHOICES = 100


@dataclass(frozen=True)
class Range:
    """The values of a setting. kind: `log` and `uniform` (numbers between the two of `values`, drawn by their logarithm
    or evenly), `int` (whole numbers), or `choice` (one of `values`)."""

    key: str
    kind: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> "Range":
        """Raises UserError where the text is not a range."""
        match = _FORM.fullmatch(text)
        if not match:
            raise UserError(f"--search {printable(text)}: expected a setting and its range, as in {_EXAMPLES}")
        key, kind, inside = match.groups()
        values = _values(inside)
        if kind == "choice":
            if not 2 <= len(values) <= _MOST_CHOICES:
                raise UserError(f"--search {printable(text)}: give 2 to {_MOST_CHOICES} choices")
            return cls(key, kind, values)
        whole = all(type(value) is int for value in values)
        if not (len(values) == 2 and all(type(value) in (int, float) for value in values) and values[0] < values[1]):
            raise UserError(f"--search {printable(text)}: {kind} takes two increasing numbers")
        if kind == "log" and values[0] <= 0:
            raise UserError(f"--search {printable(text)}: log takes numbers above 0")
        if kind == "int" and not whole:
            raise UserError(f"--search {printable(text)}: int takes whole numbers")
        return cls(key, kind, values)

    def __str__(self) -> str:
        return f"{self.key}={self.kind}({', '.join(map(_text, self.values))})"

    @property
    def words(self) -> list[str]:
        """The choices as Optuna stores them, which cannot store lists; empty for other kinds."""
        return [_text(value) for value in self.values] if self.kind == "choice" else []

    def suggest(self, trial: "Trial") -> Any:
        """A value for a trial of Optuna, as it is stored."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.words)
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(self.key, low, high)
        return trial.suggest_float(self.key, low, high, log=self.kind == "log")

    def with_value(self, value: Any) -> "Range":
        """The range, extended to a value where it does not have it."""
        if self.stored(value) is not None:
            return self
        if self.kind == "choice":
            values = (*self.values, value)
            return replace(self, values=tuple(sorted(values)) if type(value) in (int, float) else values)
        return replace(self, values=(min(*self.values, value), max(*self.values, value)))

    def stored(self, value: Any) -> Any:
        """How Optuna stores a value of the setting; None where the value is not in the range."""
        if self.kind == "choice":
            return next((_text(choice) for choice in self.values if choice == value), None)
        low, high = self.values
        return value if type(value) in (int, float) and low <= value <= high else None


def _values(text: str) -> tuple[Any, ...]:
    """Values with commas between them. Words need no quotes, unless some value is a list."""
    try:
        return tuple(toml.value_of(f"[{text}]"))
    except ValueError:
        return tuple(_value(part.strip()) for part in text.split(","))


def _value(text: str) -> Any:
    try:
        return toml.value_of(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    """A value as text: TOML, and JSON."""
    return json.dumps(value)


def ranges_of(texts: Sequence[str], recipe: Recipe, images: int) -> list[Range]:
    """The ranges that --search names, or the usual ones. images: how many a trial trains on. Raises UserError where a
    range or a setting is wrong."""
    ranges = [Range.parse(text) for text in texts] if texts else usual(recipe, images)
    keys = [each.key for each in ranges]
    for each in ranges:
        if keys.count(each.key) > 1:
            raise UserError(f"--search names {each.key} twice")
        if each.key.split(".")[0] in ("data", "machine", "checkpoint", "evaluation", "resume", "name", "seed", "arch"):
            raise UserError(f"--search {each.key}: this says where or how to run, not how to train")
        low, *_, high = each.values
        between = () if each.kind in ("choice", "int") else (low + 0.37 * (high - low),)
        for value in (*each.values, *between):
            toml.override(recipe, (each.key, value), option=f"--search {each.key}")
    return ranges


def usual(recipe: Recipe, images: int) -> list[Range]:
    """Learning rate, weight decay, batch size, and how strongly images are augmented and mixed. Each range has the
    recipe's own value, unless that is a batch of more images than there are."""
    sizes = {recipe.batch_size, *(size for size in (16, 32, 64, 128, 256) if size * 8 <= images)}
    batches = sorted(size for size in sizes if size <= images and size % max(1, recipe.images_per_class) == 0)
    ranges = [
        # With lr_batch, the learning rate is the one of a batch of 256, and smaller batches get a part of it.
        Range("optim.lr", "log", (0.01, 3.0) if recipe.optim.lr_batch else (0.001, 1.0)),
        Range("optim.weight_decay", "log", (1e-5, 1e-2)),
        Range("augment.crop_area", "choice", ([0.08, 1.0], [0.25, 1.0], [0.5, 1.0])),
        Range("mix.cutmix", "choice", (0.0, 0.5)),
    ]
    if not recipe.augment.randaugment:
        ranges.append(Range("augment.autoaugment", "choice", ("none", "imagenet")))
    ranges = [each.with_value(value_in(recipe, each.key)) for each in ranges]
    return [*ranges, Range("batch_size", "choice", tuple(batches))] if len(batches) > 1 else ranges


def value_in(recipe: Recipe, key: str) -> Any:
    """A setting of a recipe as a plain value; None where the recipe does not have it."""
    value: Any = toml.to_dict(recipe)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def values_of(recipe: Recipe, ranges: Sequence[Range]) -> dict[str, Any]:
    """The recipe's own values, as Optuna stores them, of those settings whose range has them."""
    found = {each.key: each.stored(value_in(recipe, each.key)) for each in ranges}
    return {key: stored for key, stored in found.items() if stored is not None}
