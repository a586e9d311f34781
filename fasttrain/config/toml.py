"""Recipes as text: TOML in, TOML out, and single settings by dotted key."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from fasttrain.config.schema import Recipe
from fasttrain.losses import LOSSES
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

T = TypeVar("T")
TEXT_LENGTH, _DOTS = 1 << 16, 1000  # most characters, and most dots in a line
_ONCE_TRUE_OR_FALSE = ("machine.align",)  # settings that were, and may still be written so: on and off


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
    """What untrusted TOML says. ValueError where it is none, or would keep tomllib busy: for a key of many parts
    that takes time with the square of their number."""
    if len(text) > TEXT_LENGTH or any(line.count(".") > _DOTS for line in text.splitlines()):
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
            raise UserError(f"{by}: no part {'.'.join(parts[: depth + 1])!r}{nearest(part, known)}")
        at = at[part]
    if last not in at:
        raise UserError(f"{by}: no key {key!r}{nearest(last, at, prefix=key[: -len(last)])}")
    if isinstance(at[last], dict):
        raise UserError(f"{by}: {key!r} is a part; set one of its keys: {', '.join(f'{key}.{k}' for k in at[last])}")
    at[last] = value


def nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
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
            raise UserError(f"{where}: no key {prefix + key!r}{nearest(key, fields, prefix)}")
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
            raise UserError(f"{where}: no loss {name!r}{nearest(name, LOSSES)}")
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
