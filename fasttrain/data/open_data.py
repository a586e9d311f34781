"""Opens the images of a run or of an evaluation: which folders they are in, and their indices."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fasttrain.data.index import Index, merge, require_classes
from fasttrain.data.layout import find_splits
from fasttrain.data.scan import DEFAULT_LIMITS, Limits, scan
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

if TYPE_CHECKING:  # config imports torch, and commands that only read files need not wait for it
    from fasttrain.config.schema import DataConfig


def open_data(data: "DataConfig") -> tuple[Index, Index | None]:
    """The training index (several folders merged) and the validation index, or None where there is none.

    `DIR` with `train/<class>/…` inside stands for DIR/train; the images of DIR/val (or valid, or validation) are then
    the validation images, unless another folder is given. Raises UserError where the two do not have the same classes,
    or a folder can be read in two ways.
    """
    folders, vals, _ = data_folders(data)
    limits = Limits.of(data)
    indices = [scan(folder, keep_unreadable=data.on_bad == "skip", limits=limits) for folder in folders]
    train_index = merge(indices, folders)
    if not vals:
        return train_index, None
    val_index = merge([scan(folder, limits=limits) for folder in vals], vals)
    require_classes(train_index.classes, folders[0], val_index.classes, vals[0])
    return train_index, val_index


def data_folders(data: "DataConfig") -> tuple[list[Path], list[Path], list[Path]]:
    """The folders of the training images, of the validation images, and those next to them that are not used."""
    for name in (*data.train, *filter(None, [data.val])):
        if not os.path.isdir(name):
            raise UserError(f"no such folder: {printable(name)}")
    splits = [find_splits(Path(name), with_val=not data.val) for name in data.train]
    folders = [split.train for split in splits]
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"--data {printable(folders[i])} is given twice; each image would count twice")
    if data.val and Path(data.val).resolve() in resolved:
        raise UserError(f"--val {printable(data.val)} is also a training folder; name other images, or none")
    found = [split.val for split in splits if split.val is not None and split.val.resolve() not in resolved]
    vals = [Path(data.val)] if data.val else found
    used = {*resolved, *(folder.resolve() for folder in vals)}
    return folders, vals, [folder for split in splits for folder in split.unused if folder.resolve() not in used]


def data_line(data: "DataConfig", train_index: Index, val_index: Index | None) -> str:
    """The line that says which images a run trains on, which it validates on, and which folders it does not use."""

    def named(folders: Sequence[Path]) -> str:
        return ", ".join(printable(folder) for folder in folders)

    folders, vals, unused = data_folders(data)
    line = f"{len(train_index)} training images of {len(train_index.classes)} classes in {named(folders)}; "
    line += f"{len(val_index)} validation images in {named(vals)}" if val_index else "no validation images"
    return f"{line}; not used: {named(unused)}" if unused else line


def open_labeled(folder: str, classes: Sequence[str], origin: str | Path, limits: Limits = DEFAULT_LIMITS) -> Index:
    """The index of a folder to evaluate a network of these classes on: DIR/val where DIR has train/ and val/, else DIR.

    Its labels are the positions in `classes`. Classes without images are named on stderr. Raises UserError where it has
    images of another class. origin: where the classes are from.
    """
    splits = find_splits(Path(folder))
    root = splits.val or Path(folder)
    index = scan(root, limits=limits, partial=True)
    used = [index.classes[label] for label in np.unique(index.labels)]
    foreign = sorted(set(used) - set(classes))
    if foreign:
        require_classes(classes, origin, sorted({*classes, *used}), root)
    missing = [name for name in classes if name not in set(used)]
    if missing:
        names = ", ".join(map(printable, missing[:5])) + ", …" * (len(missing) > 5)
        print(f"{printable(root)} has no images of {len(missing)} of {len(classes)} classes: {names}", file=sys.stderr)
    position = {name: number for number, name in enumerate(classes)}
    of_label = np.array([position.get(name, -1) for name in index.classes], np.int64)
    return replace(index, labels=of_label[index.labels], classes=tuple(classes))
