"""A table of images: a CSV file (or a .tsv file with tabs) with the columns path, label and perhaps split and weight.

A path is relative to the table's folder. Splits are called train, val (or valid, or validation) and test; without that
column, all images are of one split. An image of weight 2 is drawn twice as often in training as one of weight 1, and
one of weight 0 never. Other columns are not used.
"""

import csv
import hashlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.data.headers import EXTENSIONS
from fasttrain.data.index import MAX_WEIGHT, Index, of_samples
from fasttrain.data.layout import VAL_NAMES
from fasttrain.data.scan import Limits, sizes_of, stamp
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened
from fasttrain.utils.text import printable

ENDINGS = (".csv", ".tsv")
_COLUMNS = ("path", "label", "split", "weight")


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str
    weight: float | None


def is_table(path: str | Path) -> bool:
    return str(path).lower().endswith(ENDINGS) and os.path.isfile(path)


def open_table(path: str | Path, limits: Limits, *, progress: bool = True) -> dict[str, Index]:
    """The indices of a table's splits, by name; `train` where it has no column for them.

    Images that cannot be used have the size 0 and a problem. Raises UserError, which names the line, where a row is
    malformed, an image is listed twice, or a path is not of an image, leaves the table's folder or does not exist.
    """
    table, rows = Path(path), list(_rows(Path(path)))
    root = os.path.realpath(table.parent)
    seen: dict[str, _Row] = {}
    for row in rows:
        where = f"{printable(table)} line {row.line}: {printable(row.path)}"
        if (other := seen.setdefault(row.path, row)) is not row:
            disagrees = "" if other.label == row.label else f", with the label {printable(other.label)!r}"
            raise UserError(f"{where} is also in line {other.line}{disagrees}")
        if not row.path.lower().endswith(EXTENSIONS):
            raise UserError(f"{where} is not an image; images end in {', '.join(EXTENSIONS)}")
        if not _inside(root, row.path, limits):
            raise UserError(f"{where} is not in the table's folder; with --links follow it is taken")
        if not os.path.isfile(os.path.join(root, row.path)):
            raise UserError(f"{where} is not there")
    if not rows:
        raise UserError(f"{printable(table)} lists no images")
    samples = of_samples([row.path for row in rows], [row.label for row in rows], table)
    ordered = [rows[row] for row in samples.order]
    splits = [row.split for row in ordered]
    weights = None if rows[0].weight is None else np.array([row.weight for row in ordered], np.float64)
    indices = {}
    for split in dict.fromkeys(row.split for row in rows):
        chosen = [number for number, name in enumerate(splits) if name == split]
        ids = tuple(samples.ids[number] for number in chosen)
        paths = tuple(os.path.join(root, image_id) for image_id in ids)
        digest = hashlib.sha256(f"table\0{root}\0".encode(errors="surrogateescape"))
        for image_id, full in zip(ids, paths, strict=True):
            digest.update(stamp(image_id, os.stat(full)).encode(errors="surrogateescape"))
        sizes, problems = sizes_of(paths, digest.hexdigest(), progress, limits)
        index = Index(paths, ids, samples.labels[chosen], sizes, samples.classes, problems)
        if weights is not None:
            index = replace(index, weights=weights[chosen])
        indices[split] = index
    return indices


def _inside(root: str, path: str, limits: Limits) -> bool:
    """Whether a path is in the table's folder, also where links lead; with `follow`, any path is taken."""
    if limits.links == "follow":
        return True
    if os.path.isabs(path) or ".." in path.split("/"):
        return False
    return os.path.realpath(os.path.join(root, path)).startswith(root + os.sep)


def _rows(table: Path) -> Iterator[_Row]:
    """The rows of a table. Raises UserError, which names the line, where one is malformed."""
    try:
        with io.TextIOWrapper(opened(table), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            header = [name.strip().lower() for name in next(reader, [])]
            missing = [name for name in _COLUMNS[:2] if name not in header]
            if missing or len(set(header)) < len(header):
                raise UserError(
                    f"{printable(table)} line 1 must name the columns path and label, and may name split and weight; "
                    f"it has {printable(', '.join(header)[:100]) or 'none'}"
                )
            columns = {name: header.index(name) for name in _COLUMNS if name in header}
            for values in reader:
                where = f"{printable(table)} line {reader.line_num}"
                if not values:
                    continue
                if len(values) != len(header):
                    raise UserError(f"{where} has {len(values)} values, and line 1 names {len(header)} columns")
                path, label = (values[columns[name]].strip() for name in _COLUMNS[:2])
                split = values[columns["split"]].strip().lower() if "split" in columns else "train"
                split = "val" if split in VAL_NAMES else split
                weight = _weight(values[columns["weight"]], where) if "weight" in columns else None
                if not path or not label or "\0" in path:
                    raise UserError(f"{where} has no path or no label")
                if split not in ("train", "val", "test"):
                    raise UserError(f"{where} has the split {printable(split)!r}; splits are train, val and test")
                yield _Row(reader.line_num, os.path.normpath(path), label, split, weight)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {printable(table)}: {printable(str(error))}") from None


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text) if text.strip() else 1.0
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= MAX_WEIGHT:
        raise UserError(f"{where} has the weight {printable(text)!r}; a weight is a number of 0 or more")
    return weight
