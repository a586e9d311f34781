"""The challenge's submission, a CSV of one predicted class per test image, and a strict scorer for it."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fasttrain.data.index import spelling
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened, replacing, require_writable_folder
from fasttrain.utils.text import printable

HEADER, LABELS_HEADER = ("Image IDs", "Predictions"), ("Image IDs", "Labels")


def check_overwritable(path: Path) -> None:
    """Raises UserError where `path` has no folder that can be written to, or exists and is not a submission."""
    require_writable_folder(path)
    if path.exists() and not _is_submission(path):
        raise UserError(f"{printable(path)} exists and is not a submission; name another file")


def class_numbers(classes: Sequence[str]) -> list[int]:
    """The integers that a submission writes for these classes: the names themselves where all are integers, which as
    text may be in another order; else their positions."""
    if all(name.isascii() and name.isdigit() for name in classes):
        return [int(name) for name in classes]
    return list(range(len(classes)))


def image_names(ids: Sequence[str]) -> list[str]:
    """The ids without folders, as a submission writes them. Raises UserError where two are then the same."""
    names = [id_.rsplit("/", 1)[-1] for id_ in ids]
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise UserError(f"two images are called {printable(duplicates[0])!r}; a submission needs unique names")
    return names


def write(path: Path, ids: Sequence[str], classes: Sequence[int]) -> None:
    """Write predictions, sorted by image name as text. Raises UserError like `image_names` and `check_overwritable`;
    RunError where the file cannot be written."""
    names = image_names(ids)
    check_overwritable(path)
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
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
    """{id: class} of a submission or a file of labels: the header line, then rows of an id and an integer.

    Raises UserError, which names the line, for a malformed row, a duplicate id, or a class that is not an integer.
    """
    classes: dict[str, int] = {}
    try:
        with io.TextIOWrapper(opened(path), encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            first = next(rows, None)
            if first and first[0].startswith("\ufeff"):
                raise UserError(
                    f"{printable(path)} starts with a byte order mark, as spreadsheets write it, which other programs "
                    "take for a part of the header; save it as plain UTF-8"
                )
            if first is None or tuple(first) != header:
                raise UserError(f"{printable(path)} line 1 must be the header {','.join(header)}")
            for row in rows:
                where = f"{printable(path)} line {rows.line_num}"
                if len(row) != 2:
                    raise UserError(f"{where}: a row is an id and a class, not {len(row)} values")
                name, text = row
                if name in classes:
                    raise UserError(f"{where}: {printable(name)!r} is listed a second time")
                if not (text.isascii() and text.isdigit() and len(text) < 10):
                    raise UserError(f"{where}: {printable(text)!r} is not a class; classes are integers from 0")
                classes[name] = int(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {printable(path)}: {printable(str(error))}") from None
    return classes


def score(submission: Path, labels: Path) -> tuple[float, int]:
    """Top-1 of a submission and the number of images.

    Raises UserError unless the submission has each image of the labels once, and no other; the challenge's own scorer
    skips missing images. Any integer from 0 is a class, since the labels need not have an image of each class.
    """
    truth, predicted = read(labels, LABELS_HEADER), read(submission, HEADER)
    if not truth:
        raise UserError(f"{printable(labels)} lists no images")
    for problem, names in (
        ("lacks", truth.keys() - predicted.keys()),
        ("has the unknown", predicted.keys() - truth.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            others = {spelling(name): name for name in truth.keys() ^ predicted.keys() ^ names}
            twin = others.get(spelling(min(names)))
            alike = f"; {twin!a} looks alike but is spelled with different characters" if twin is not None else ""
            raise UserError(f"{printable(submission)} {problem} image {printable(min(names))!r}{more}{alike}")
    return sum(predicted[name] == label for name, label in truth.items()) / len(truth), len(truth)
