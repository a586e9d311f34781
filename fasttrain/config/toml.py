"""Recipes as text: TOML in, TOML out, and single settings by dotted key."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from fasttrain.config.schema import Recipe
from fasttrain.losses import LOSSES
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

T = TypeVar("T")
TEXT_LENGTH, _DOTS = 1 << 16, 1000  # most characters of a recipe, and most dots in a line
_ONCE_BOOLEAN = ("machine.align",)  # settings that used to be true or false, and may still be written so


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, as in TOML and JSON. `losses` becomes a table of tables, keyed by the loss's name."""
    tables = dataclasses.asdict(recipe)
    tables["losses"] = {loss.name: dataclasses.asdict(loss) for loss in recipe.losses}  # type: ignore[call-overload]
    return _plain(tables)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def to_toml(recipe: Recipe, comments: bool = False) -> str:
    """Text that `from_toml` turns back into an equal recipe, and that is safe to print.

    comments: write each setting's documentation above it. Raises UserError where the recipe names a file or folder
    whose name is not UTF-8, which TOML cannot hold.
    """
    table = to_dict(recipe)
    for text in _texts(table):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                f"{printable(text)} is not UTF-8, and a recipe cannot name it; rename it, or name a link to it"
            )
    import tomli_w  # not needed to train, and not installed everywhere where kernels are measured

    text = tomli_w.dumps(table)
    if comments:
        text = _with_comments(text, recipe)
    return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08X}" for c in text)


def _with_comments(text: str, recipe: Recipe) -> str:
    """A recipe's TOML with the documentation of each table and setting above it."""
    parts: dict[str, Any] = {"": recipe} | {f"losses.{loss.name}": loss for loss in recipe.losses}
    parts |= {name: value for name, value in vars(recipe).items() if dataclasses.is_dataclass(value)}
    lines, docs = [], field_docs(Recipe)
    for line in text.splitlines():
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


def _texts(value: Any) -> Iterator[str]:
    """All strings in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def from_toml(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe. A missing key has its default; an unknown one is an error that names the nearest."""
    try:
        table = _parsed(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid TOML: {printable(str(error))}") from None
    return from_dict(table, where)


def _parsed(text: str) -> dict[str, Any]:
    """Parse untrusted TOML. ValueError where it is not TOML, or would keep tomllib busy: a key of many parts takes time
    with the square of their number."""
    if len(text) > TEXT_LENGTH or any(line.count(".") > _DOTS for line in text.splitlines()):
        raise ValueError("it is too long for a recipe")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_dict(table: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain values (see `to_dict`). `where` is named in errors."""
    table = dict(table)
    table.setdefault("losses", {CrossEntropy.name: {}})
    table.setdefault("name", Path(where).stem)
    if "arch" not in table:
        raise UserError(f'{where}: no `arch`; name the network, as in arch = "tresnet_xl"')
    return _build(Recipe, table, where, "")


def override(recipe: Recipe, *settings: str | tuple[str, object], by: str = "--set") -> Recipe:
    """`recipe` with settings changed, all at once.

    A setting is text such as `optim.weight_decay=5e-5`, whose value is read as TOML and, where it is not TOML, as plain
    text; or a key and its value. `losses.triplet.margin=0.3` also adds the loss where the recipe does not have it. `by`
    is the option to name in errors.
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
    """Set a dotted key of a recipe's plain values. A setting of a loss that the recipe does not have adds the loss."""
    *parts, last = key.split(".")
    if len(parts) == 2 and parts[0] == "losses" and parts[1] in LOSSES:
        table["losses"].setdefault(parts[1], _plain(dataclasses.asdict(LOSSES[parts[1]]())))
    inner = table
    for depth, part in enumerate(parts):
        if not isinstance(inner.get(part), dict):
            known = LOSSES if parts[:depth] == ["losses"] else [name for name in inner if isinstance(inner[name], dict)]
            raise UserError(f"{by}: no part {'.'.join(parts[: depth + 1])!r}{nearest(part, known)}")
        inner = inner[part]
    if last not in inner:
        raise UserError(f"{by}: no key {key!r}{nearest(last, inner, prefix=key[: -len(last)])}")
    if isinstance(inner[last], dict):
        keys = ", ".join(f"{key}.{name}" for name in inner[last])
        raise UserError(f"{by}: {key!r} is a part; set one of its keys: {keys}")
    inner[last] = value


def nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """The end of an error line about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    return f"; there are: {', '.join(prefix + each for each in known)}" if known else ""


def _build(cls: type[T], table: dict[str, Any], where: str, prefix: str) -> T:
    """A frozen dataclass from plain values, each checked against the field's type."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise UserError(f"{where}: no key {prefix + key!r}{nearest(key, fields, prefix)}")
        if type(value) is bool and prefix + key in _ONCE_BOOLEAN:
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
            raise UserError(f"{where}: {key} must be a table of settings, not {_brief(value)}")
        return _build(hint, value, where, key + ".")
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(value, list) and (kinds[-1] is types.EllipsisType or kinds[-1] is ...):
            return tuple(_typed(kinds[0], each, where, key) for each in value)
        if isinstance(value, list) and len(value) == len(kinds):
            return tuple(_typed(kind, each, where, key) for kind, each in zip(kinds, value, strict=True))
        size = "any number" if kinds[-1] is ... else str(len(kinds))
        raise UserError(f"{where}: {key} must be a list of {size} of {kinds[0].__name__}, not {_brief(value)}")
    if hint in (int, float) and type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {key} must be a number of 64 bits, not {_brief(value)}")
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a finite number, not {value!r}")
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
        raise UserError(f"{where}: {key} must be {kind}, not {_brief(value)}")
    return value


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or lists in lists
        return "a value that cannot be printed"
    return text if len(text) <= 200 else f"{text[:199]}…"
