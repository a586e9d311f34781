"""Reads and writes recipes as TOML, and changes single settings by dotted key."""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fasttrain.config.schema import Recipe
from fasttrain.losses import LOSSES
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

T = TypeVar("T")
TEXT_LENGTH, _DOTS = 1 << 16, 1000  # maximum characters of a recipe, and dots in a line
_WORD_OR_TABLE = ("losses.cross_entropy.class_weights",)
_FORMERLY_BOOLEAN = ("machine.align",)  # settings that were booleans in older recipes


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, as in TOML and JSON. `losses` becomes a table of tables, keyed by the loss's name."""
    tables = dataclasses.asdict(recipe)
    tables["losses"] = {loss.name: dataclasses.asdict(loss) for loss in recipe.losses}  # type: ignore[call-overload]
    return _plain(tables)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's plain values by dotted key."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def to_toml(recipe: Recipe, comments: bool = False) -> str:
    """Text that `from_toml` turns back into an equal recipe, and that is safe to print.

    comments: write each setting's documentation above it. Raises UserError where the recipe names a file or folder
    whose name is not UTF-8, which TOML cannot hold.
    """
    table = to_dict(recipe)
    for text in _strings(table):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                f"{printable(text)} is not UTF-8, so a recipe cannot name it; rename it, or name a link to it"
            )
    import tomli_w  # kernels can be measured where it is not installed

    text = tomli_w.dumps(table)
    if comments:
        text = _with_comments(text, recipe)
    return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08X}" for c in text)


def _with_comments(text: str, recipe: Recipe) -> str:
    """A recipe's TOML with the documentation of each table and setting above it."""
    parts: dict[str, Any] = {"": recipe} | {f"losses.{loss.name}": loss for loss in recipe.losses}
    parts |= {name: value for name, value in vars(recipe).items() if dataclasses.is_dataclass(value)}
    lines, docs = [], field_docs(Recipe)
    for line in text.removesuffix("\n").split("\n"):  # not splitlines, which also splits at other characters
        if table := re.fullmatch(r"\[([\w.]+)\]", line):
            part: Any = type(parts[table[1]]) if table[1] in parts else None
            docs = field_docs(part) if part else {}
            summary = (inspect.getdoc(part) or "") if part else ""
            if summary:
                lines.append(f"# {summary.splitlines()[0]}")
        elif (key := re.match(r"(\w+) = ", line)) and key[1] in docs:
            lines.append(f"# {docs[key[1]]}")
        lines.append(line)
    return "\n".join(lines) + "\n"


@functools.cache
def field_docs(cls: Any) -> dict[str, str]:
    """The documentation of a settings class's fields: the string under each field, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in itertools.pairwise(definition.body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = text
    return docs


def _strings(value: Any) -> Iterator[str]:
    """All strings in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def from_toml(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe. A missing key gets its default. Raises UserError where a value is invalid or a key unknown; the
    error suggests the nearest key. `where` names the source in errors."""
    try:
        table = _parse(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid TOML: {printable(str(error))}") from None
    return from_dict(table, where)


def _parse(text: str) -> dict[str, Any]:
    """Parse untrusted TOML. Raises ValueError where it is not TOML, or is long enough to keep tomllib busy: its time
    grows with the square of the number of parts of a key."""
    if len(text) > TEXT_LENGTH or any(line.count(".") > _DOTS for line in text.splitlines()):
        raise ValueError("it is too long for a recipe")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_dict(table: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain values (see `to_dict`). Raises UserError like `from_toml`."""
    table = dict(table)
    table.setdefault("losses", {CrossEntropy.name: {}})
    table.setdefault("name", Path(where).stem)
    if "arch" not in table:
        raise UserError(f'{where}: no `arch`; name the network, as in arch = "tresnet_xl"')
    return _build(Recipe, table, where, "")


def override(recipe: Recipe, *settings: str | tuple[str, object], option: str = "--set") -> Recipe:
    """`recipe` with settings changed, all at once.

    A setting is text such as `optim.weight_decay=5e-5`, whose value is read as TOML and, where it is not TOML, as plain
    text; or a key and its value. `losses.triplet.margin=0.3` also adds the loss where the recipe does not have it.
    Raises UserError where a setting is invalid; the error names `option`.
    """
    table = to_dict(recipe)
    for setting in settings:
        _set(table, *(_parse_setting(setting, option) if isinstance(setting, str) else setting), option)
    return _build(Recipe, table, option, "")


def _parse_setting(setting: str, option: str) -> tuple[str, object]:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{option} {printable(setting)}: expected key=value or part.key=value")
    try:
        return key, value_of(text)
    except ValueError:
        return key, text


def value_of(text: str) -> Any:
    """The value that TOML such as `0.5`, `"word"` or `[1, 2]` stands for. Raises ValueError where it is not TOML."""
    return _parse(f"value = {text}")["value"]


def _set(table: dict[str, Any], key: str, value: object, option: str) -> None:
    """Set a dotted key of a recipe's plain values. A setting of a loss that the recipe does not have adds the loss."""
    *parts, last = key.split(".")
    if len(parts) == 2 and parts[0] == "losses" and parts[1] in LOSSES:
        table["losses"].setdefault(parts[1], _plain(dataclasses.asdict(LOSSES[parts[1]]())))
    inner = table
    for depth, part in enumerate(parts):
        if not isinstance(inner.get(part), dict):
            known = LOSSES if parts[:depth] == ["losses"] else [name for name in inner if isinstance(inner[name], dict)]
            raise UserError(f"{option}: no part {'.'.join(parts[: depth + 1])!r}{nearest(part, known)}")
        inner = inner[part]
    if last not in inner:
        raise UserError(f"{option}: no key {key!r}{nearest(last, inner, prefix=key[: -len(last)])}")
    if isinstance(inner[last], dict) and key not in _WORD_OR_TABLE:
        keys = ", ".join(f"{key}.{name}" for name in inner[last])
        raise UserError(f"{option}: {key!r} is a part; set one of its keys: {keys}")
    inner[last] = _plain(value)


def nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """The end of an error line about an unknown name: it suggests the nearest known name, or lists all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    return f"; there are: {', '.join(prefix + name for name in known)}" if known else ""


def _build(cls: type[T], table: dict[str, Any], where: str, prefix: str) -> T:
    """A frozen dataclass from plain values, which are checked against the types of its fields."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise UserError(f"{where}: no key {prefix + key!r}{nearest(key, fields, prefix)}")
        if type(value) is bool and prefix + key in _FORMERLY_BOOLEAN:
            value = "on" if value else "off"
        if key == "losses":
            values[key] = _build_losses(value, where)
        else:
            values[key] = _convert(hints[key], value, where, prefix + key)
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {prefix}{error}") from None


def _build_losses(table: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(table, dict):
        raise UserError(f"{where}: losses must be tables such as [losses.cross_entropy]")
    for name in table:
        if name not in LOSSES:
            raise UserError(f"{where}: no loss {name!r}{nearest(name, LOSSES)}")
    return tuple(_convert(LOSSES[name], settings, where, f"losses.{name}") for name, settings in table.items())


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} must be a table of settings, not {_short_repr(value)}")
        return _build(hint, value, where, key + ".")
    if hint == str | dict[str, float]:  # a word, or numbers by name
        if isinstance(value, str):
            return value
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} must be a word or a table of numbers, not {_short_repr(value)}")
        return {name: _convert(float, number, where, f"{key}.{name}") for name, number in value.items()}
    if typing.get_origin(hint) is tuple:
        item_types = typing.get_args(hint)
        if isinstance(value, list) and (item_types[-1] is types.EllipsisType or item_types[-1] is ...):
            return tuple(_convert(item_types[0], item, where, key) for item in value)
        if isinstance(value, list) and len(value) == len(item_types):
            return tuple(_convert(type_, item, where, key) for type_, item in zip(item_types, value, strict=True))
        size = "any number" if item_types[-1] is ... else str(len(item_types))
        raise UserError(
            f"{where}: {key} must be a list of {size} of {item_types[0].__name__}, not {_short_repr(value)}"
        )
    if hint in (int, float) and type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {key} must be a 64-bit number, not {_short_repr(value)}")
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a finite number, not {value!r}")
    if type(value) is not hint:
        kind = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]
        raise UserError(f"{where}: {key} must be {kind}, not {_short_repr(value)}")
    return value


def _short_repr(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deeply nested lists
        return "a value that cannot be printed"
    return text if len(text) <= 200 else f"{text[:199]}…"
