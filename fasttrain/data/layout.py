"""What the folders of a data set are for: class folders themselves, or train/ and val/ with class folders."""

import os
from pathlib import Path
from typing import NamedTuple

from fasttrain.data.headers import EXTENSIONS
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

VAL_NAMES = ("val", "valid", "validation")


class Splits(NamedTuple):
    """train: the folder of the training images' class folders. val: that of the validation images, or None. unused:
    other folders next to them."""

    train: Path
    val: Path | None = None
    unused: tuple[Path, ...] = ()


def find_splits(folder: Path, *, with_val: bool = True) -> Splits:
    """The splits of DIR/train/<class>/ and DIR/val/<class>/ (or valid, or validation); else `folder` itself is train.

    with_val: look for the validation images too. Raises UserError where a folder can be read in two ways, or one with
    the name of a validation folder has no class folders.
    """
    train = folder / "train"
    if not has_folders(train):
        return Splits(folder)
    others = [path for path in _visible_folders(folder) if path.name != "train"]
    vals = [folder / name for name in VAL_NAMES if os.path.lexists(folder / name)]
    classes = [path for path in others if path not in vals and _holds_images(path)] if _holds_images(train) else []
    if classes:
        other = printable(classes[0].name)
        raise UserError(
            f"{printable(folder)} has train/ with images and folders and, next to it, {other}/ with images: name the "
            f"folder of the class folders ({printable(train)}), or rename the class train"
        )
    if not with_val:
        return Splits(train, None, tuple(others))
    if len(vals) > 1:
        names = " and ".join(printable(path) for path in vals)
        raise UserError(f"{names} both look like validation images; name one of them")
    for val in vals:
        if not has_folders(val):
            what = "is a broken link" if not val.exists() else "has no class folders" if val.is_dir() else "is a file"
            raise UserError(
                f"{printable(val)} {what}: validation images belong in {printable(val)}/<class>/. To train without "
                f"them, name {printable(train)}"
            )
    return Splits(train, vals[0] if vals else None, tuple(path for path in others if path not in vals))


def has_folders(folder: Path) -> bool:
    """Whether a folder exists and has folders in it that are not hidden."""
    return folder.is_dir() and bool(_visible_folders(folder))


def _visible_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if _is_folder(entry) and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(folder)}: {error.strerror}") from None


def _holds_images(folder: Path) -> bool:
    """Whether there are images directly in a folder; False where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") for entry in entries)
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
