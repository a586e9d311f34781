"""The challenge's submission: a CSV of one predicted class for each test image, and a strict scorer for it."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fasttrain.dataset import shown
from fasttrain.errors import UserError
from fasttrain.files import opened, replacing

HEADER, LABELS_HEADER = ("Image IDs", "Predictions"), ("Image IDs", "Labels")


def require_own(path: Path) -> None:
    """UserError unless `path` can be written without losing what is no submission."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {shown(path)}: there is no folder {shown(path.parent)}")
    if path.exists() and not _is_submission(path):
        raise UserError(f"{shown(path)} is there and is no submission; name another file")


def write(path: Path, ids: Sequence[str], classes: Sequence[int]) -> None:
    """Write predictions, sorted by id as text; ids are the names of the images' files. Raises UserError where two ids
    end in the same name, or `path` is something else than a submission."""
    names = [each.rsplit("/", 1)[-1] for each in ids]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two images are called {shown(twice[0])!r}; a submission needs names that differ")
    require_own(path)
    with replacing(path) as aside, aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(sorted(zip(names, map(int, classes), strict=True)))


def _is_submission(path: Path) -> bool:
    try:
        with opened(path) as file:
            return file.readline(64).strip() == ",".join(HEADER).encode()
    except OSError:
        return False


def read(path: Path, header: tuple[str, str]) -> dict[str, int]:
    """{image: class} of a submission or a file of labels: the header line, then rows of an id and a whole number.

    Raises UserError that names the line: a row of another shape, an id twice, a class that is no number.
    """
    found: dict[str, int] = {}
    try:
        with io.TextIOWrapper(opened(path), encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            first = next(rows, None)
            if first is None or tuple(first) != header:
                raise UserError(f"{shown(path)} line 1 must be the header {','.join(header)}")
            for row in rows:
                where = f"{shown(path)} line {rows.line_num}"
                if len(row) != 2:
                    raise UserError(f"{where}: a row is an id and a class, not {len(row)} values")
                name, text = row
                if name in found:
                    raise UserError(f"{where}: {shown(name)!r} is named a second time")
                if not (text.isascii() and text.isdigit() and len(text) < 10):
                    raise UserError(f"{where}: {shown(text)!r} is no class; classes are whole numbers from 0")
                found[name] = int(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {shown(path)}: {shown(str(error))}") from None
    return found


def score(submission: Path, labels: Path) -> tuple[float, int]:
    """Top-1 of a submission and the number of images.

    Strict, where the challenge's own scorer passes over what is missing: UserError unless each image of the labels is
    there once and no other is. Any whole number is a class: labels need not have an image of each.
    """
    truth, told = read(labels, LABELS_HEADER), read(submission, HEADER)
    if not truth:
        raise UserError(f"{shown(labels)} names no image")
    for what, names in (("lacks", truth.keys() - told.keys()), ("has the foreign", told.keys() - truth.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{shown(submission)} {what} image {shown(min(names))!r}{more}")
    return sum(told[name] == label for name, label in truth.items()) / len(truth), len(truth)
