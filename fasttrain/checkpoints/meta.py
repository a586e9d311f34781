"""meta.json, which describes a checkpoint: its schema, and how it is read and written.

A file may come from anybody, so every value is checked before it is used, and the file has a checksum of its own.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_json
from fasttrain.utils.text import printable

FORMAT = 3
META = "meta.json"
MODEL, TRAIN = "model.safetensors", "train.safetensors"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30  # finite in float32, and so are sums


def _is_text(value: Any) -> bool:
    return type(value) is str


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(holds, value))


def _dict_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is dict and all(map(holds, value.values()))


def _is_sum_and_share(value: Any) -> bool:
    return _list_of(_is_number)(value) and len(value) == 2


# Every key, and what its value must be. The recipe is checked where it is built, the tensors where they are loaded.
SCHEMA: dict[str, Callable[[Any], bool]] = {
    # checkpoint.save writes these.
    "format": lambda value: value == FORMAT,
    "step": _is_count,  # steps done
    "archived": lambda value: type(value) is bool,  # never removed
    "scaler": _dict_of(_is_number),  # the state of torch's GradScaler; empty without float16
    "versions": lambda value: type(value) is dict,  # of fasttrain, torch, timm and DALI
    "sha256": lambda value: type(value) is dict and all(_is_text(value.get(name)) for name in (MODEL, TRAIN)),
    # resume.run_fingerprint
    "recipe": lambda value: type(value) is dict,  # as in recipe.toml
    "classes": lambda value: _list_of(_is_text)(value) and 0 < len(value) == len(set(value)),
    "data": _is_text,  # a fingerprint of the training images' names and labels
    "sizes": _is_text,  # a fingerprint of the training images' heights and widths
    "val": lambda value: value is None or _is_text(value),  # resume.val_fingerprint
    # The plan
    "epoch_steps": _is_positive,  # steps per epoch
    "world": _is_positive,  # ranks
    "shift": _is_count,  # see Plan.shift
    "length": _is_count,  # see Plan.length
    "seconds": _is_number,  # used up to here, of a run that ends by time
    # The meter
    "meters": _list_of(_dict_of(_is_sum_and_share)),  # of each rank: sum and share of each value, by name
    "streak": _is_count,  # failed steps in a row
    # Progress.to_meta
    "best": lambda value: value is None or _is_number(value),
    "peak": lambda value: value is None or _is_number(value),
    "stale": _is_count,
    "scores": lambda value: value is None or type(value) is dict,
    "rewinds": _is_count,
    "logged": _dict_of(_list_of(_is_number)),
}
_OPTIONAL = ("versions", "scores", "val", "peak", "stale", "length", "seconds")  # older checkpoints may not have them


def read(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's meta.json. Raises UserError where it is missing, damaged, too large, of another
    format, or a value is not of its type."""
    file = folder / META
    try:
        meta = read_json(file)
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{printable(file)} cannot be read as a checkpoint's: {printable(str(error))}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{printable(file)} cannot be read as a checkpoint's: it holds no object")
    # Format first: earlier formats had no checksum.
    if meta.get("format") != FORMAT:
        was = printable(repr(meta.get("format"))[:40])
        raise UserError(f"{printable(folder)} has checkpoint format {was}; this fasttrain reads {FORMAT}")
    try:
        intact = meta.pop("checksum", None) == _checksum(meta)
    except RecursionError:  # json reads deeper nesting than it writes
        intact = False
    if not intact:
        raise UserError(f"{printable(file)} is damaged: it does not have the checksum that it names")
    for key, is_valid in SCHEMA.items():
        if key not in meta and key in _OPTIONAL:
            continue
        if key not in meta:
            raise UserError(f"{printable(file)} cannot be read as a checkpoint's: it has no {key!r}")
        if not is_valid(meta[key]):
            raise UserError(f"{printable(file)} cannot be read as a checkpoint's: its {key!r} has the wrong type")
    return meta


def write(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, with its checksum, into a folder. Raises OSError."""
    content = meta | {"checksum": _checksum(meta)}
    (folder / META).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def holds(folder: Path, key: str, value: Any) -> bool:
    """Whether a checkpoint's meta.json has this value; False for a checkpoint that is damaged."""
    try:
        return bool(read(folder)[key] == value)
    except UserError:
        return False


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
