"""The challenge's submission: a CSV of one predicted class for each test image, and a strict scorer for it."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened, replacing
from fasttrain.utils.text import printable

HEADER, LABELS_HEADER = ("Image IDs", "Predictions"), ("Image IDs", "Labels")


def check_overwritable(path: Path) -> None:
    """UserError unless `path` can be written without losing what is no submission."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {printable(path)}: there is no folder {printable(path.parent)}")
    if path.exists() and not _is_submission(path):
        raise UserError(f"{printable(path)} is there and is no submission; name another file")


def write(path: Path, ids: Sequence[str], classes: Sequence[int]) -> None:
    """Write predictions, sorted by id as text; ids are the names of the images' files. Raises UserError where two ids
    end in the same name, or `path` is something else than a submission."""
    names = [each.rsplit("/", 1)[-1] for each in ids]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two images are called {printable(twice[0])!r}; a submission needs names that differ")
    check_overwritable(path)
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
                raise UserError(f"{printable(path)} line 1 must be the header {','.join(header)}")
            for row in rows:
                where = f"{printable(path)} line {rows.line_num}"
                if len(row) != 2:
                    raise UserError(f"{where}: a row is an id and a class, not {len(row)} values")
                name, text = row
                if name in found:
                    raise UserError(f"{where}: {printable(name)!r} is named a second time")
                if not (text.isascii() and text.isdigit() and len(text) < 10):
                    raise UserError(f"{where}: {printable(text)!r} is no class; classes are whole numbers from 0")
                found[name] = int(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {printable(path)}: {printable(str(error))}") from None
    return found


def score(submission: Path, labels: Path) -> tuple[float, int]:
    """Top-1 of a submission and the number of images.

    Strict, where the challenge's own scorer passes over what is missing: UserError unless each image of the labels is
    there once and no other is. Any whole number is a class: labels need not have an image of each.
    """
    truth, told = read(labels, LABELS_HEADER), read(submission, HEADER)
    if not truth:
        raise UserError(f"{printable(labels)} names no image")
    for what, names in (("lacks", truth.keys() - told.keys()), ("has the foreign", told.keys() - truth.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{printable(submission)} {what} image {printable(min(names))!r}{more}")
    return sum(told[name] == label for name, label in truth.items()) / len(truth), len(truth)
