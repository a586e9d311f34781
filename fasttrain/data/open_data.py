"""Opens the images of a run or of an evaluation: which folders they are in, and their indices."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fasttrain.data.folds import without_fold
from fasttrain.data.index import Index, merge, require_classes
from fasttrain.data.layout import find_splits
from fasttrain.data.scan import DEFAULT_LIMITS, Limits, require_usable, scan, scan_unlabeled
from fasttrain.data.stage import local_name
from fasttrain.data.stores.arrow import is_arrow, open_arrow
from fasttrain.data.stores.pack import is_pack, open_pack
from fasttrain.data.stores.shards import is_shards, open_shards
from fasttrain.data.stores.table import is_table, open_table
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

if TYPE_CHECKING:  # config imports torch, and commands that only read files need not wait for it
    from fasttrain.config.schema import DataConfig


def is_container(path: str | Path) -> bool:
    """Whether a file holds or lists many images."""
    return is_pack(path) or is_table(path) or is_shards(path) or is_arrow(path)


def open_container(path: str | Path, limits: Limits, *, labeled: bool = True) -> dict[str, Index]:
    """The indices of a container's splits, by name. Images that cannot be used have the size 0 and a problem. labeled:
    the labels are needed; without, a container may have none."""
    if is_table(path):
        return open_table(path, limits)
    if is_shards(path):
        return open_shards(path, limits, labeled=labeled)
    if is_arrow(path):
        return open_arrow(path, limits, labeled=labeled)
    indices = {}
    for split, index in open_pack(path).items():
        sizes, problems = limits.apply(index.sizes)
        indices[split] = replace(index, sizes=sizes, problems=problems)
    return indices


class Part(NamedTuple):
    """A folder of class folders, or a split of a pack or a table, whose index is read with its file."""

    path: Path
    split: str = ""
    index_of_split: Index | None = None

    def __str__(self) -> str:
        return printable(self.path) + (f" ({printable(self.split)})" if self.split else "")

    @property
    def in_file(self) -> bool:
        """Whether its images are in a container, or listed by one."""
        return self.index_of_split is not None

    def same_as(self, other: "Part") -> bool:
        """Whether it has images of another part: the same folder, or a file that both read."""
        if self.split != other.split:
            return False
        if self.path.resolve() == other.path.resolve():
            return True
        ours, theirs = (part.index_of_split and part.index_of_split.store for part in (self, other))
        return bool(ours and theirs and set(ours.files) & set(theirs.files))

    def open(self, limits: Limits, *, keep_unreadable: bool = False, partial: bool = False) -> Index:
        """Its index; see `scan`."""
        index = self.index_of_split
        if index is None:
            return scan(self.path, keep_unreadable=keep_unreadable, partial=partial, limits=limits)
        if not keep_unreadable:
            require_usable(index.paths, index.problems)
        if len(index.classes) == 1 and not partial:
            raise UserError(
                f"{self} has only one label ({printable(index.classes[0])}); a classifier needs two or more"
            )
        missing = sorted(set(range(len(index.classes))) - set(index.labels.tolist()))
        if missing and not partial and self.split != "val":
            raise UserError(f"{self} has no image of class {printable(index.classes[missing[0]])!r}")
        return index


class Parts(NamedTuple):
    """What --data and --val name: the parts to train on, those to validate on, and folders that are not used."""

    train: list[Part]
    val: list[Part]
    unused: list[Part]


def open_data(data: "DataConfig") -> tuple[Index, Index | None]:
    """The training index (several parts merged) and the validation index, or None where there is none.

    `DIR` with `train/<class>/…` inside stands for DIR/train; the images of DIR/val (or valid, or validation) are then
    the validation images, unless others are named. Packs and tables have such splits, too. With data.folds, one fold of
    the training images is validated on instead. Raises UserError where the two do not have the same classes, or a
    folder can be read in two ways.
    """
    return open_parts(find_parts(data), data)


def open_parts(parts: Parts, data: "DataConfig") -> tuple[Index, Index | None]:
    """`open_data`, where the parts are found already."""
    limits = Limits.of(data)
    train_index = merge([part.open(limits, keep_unreadable=data.on_bad == "skip") for part in parts.train], parts.train)
    if data.folds:
        return without_fold(train_index, data.folds, data.fold)
    val_index = _merged_val(parts, limits)
    if val_index is not None:
        require_classes(train_index.classes, parts.train[0], val_index.classes, parts.val[0])
    return train_index, val_index


def open_val(data: "DataConfig") -> Index | None:
    """The validation index of `open_data`. Training images are opened only for folds."""
    parts = find_parts(data)
    return open_parts(parts, data)[1] if data.folds else _merged_val(parts, Limits.of(data))


def _merged_val(parts: Parts, limits: Limits) -> Index | None:
    return merge([part.open(limits) for part in parts.val], parts.val) if parts.val else None


def find_parts(data: "DataConfig") -> Parts:
    """The parts that a run uses."""
    if data.folds and data.val:
        raise UserError("--val with --folds: each fold is validated on its own images; leave one of the two out")
    named = [_parts_of(name, Limits.of(data), with_val=not data.val) for name in data.train]
    train = [part for parts in named for part in parts.train]
    for number, part in enumerate(train):
        if any(part.same_as(other) for other in train[:number]):
            raise UserError(f"--data {part} is given twice; each image would count twice")
    val: list[Part] = []
    for part in (part for parts in named for part in parts.val):
        if not any(part.same_as(other) for other in (*train, *val)):
            val.append(part)
    if data.val:
        found = _parts_of(data.val, Limits.of(data), with_val=True)
        val = found.val or (found.train if found.train[0].in_file else [Part(Path(data.val))])
        if any(part.same_as(other) for part in val for other in train):
            raise UserError(f"--val {val[0]} is also a training folder; name other images, or none")
    if data.folds:
        val, named = [], [*named, Parts([], [], val)]
    used = [*train, *val]
    unused = [part for parts in named for part in parts.unused if not any(part.same_as(other) for other in used)]
    return Parts(train, val, unused)


def _parts_of(name: str, limits: Limits, *, with_val: bool) -> Parts:
    """What one --data names."""
    path = Path(local_name(name))
    if is_container(path):
        splits = open_container(path, limits)
        if len(splits) > 1 and "train" not in splits:
            raise UserError(f"{printable(path)} has the splits {', '.join(map(printable, splits))}, but no train")
        parts = {split: Part(path, split, index) for split, index in splits.items()}
        train = "train" if "train" in parts else next(iter(parts))
        val = [part for split, part in parts.items() if split == "val" != train and with_val]
        unused = [part for split, part in parts.items() if split not in (train, "val")]
        return Parts([parts[train]], val, unused)
    if os.path.isfile(path):
        raise UserError(
            f"{printable(path)} is not a folder, a pack (.safetensors), a table (.csv, .tsv), tar shards (.tar), or a "
            "parquet or Arrow file"
        )
    if not os.path.isdir(path):
        raise UserError(f"no such folder: {printable(path)}")
    found = find_splits(path, with_val=with_val)
    return Parts([Part(found.train)], [Part(found.val)] if found.val else [], [Part(other) for other in found.unused])


def data_line(parts: Parts, train_index: Index, val_index: Index | None, data: "DataConfig") -> str:
    """The line that says which images a run trains on, which it validates on, and which folders it does not use."""
    train, val, unused = (", ".join(map(str, some)) for some in parts)
    line = f"{len(train_index)} training images of {len(train_index.classes)} classes in {train}; "
    if data.folds:
        val = f"fold {data.fold} of {data.folds}"
    line += f"{len(val_index)} validation images in {val}" if val_index else "no validation images"
    return f"{line}; not used: {unused}" if unused else line


def open_labeled(name: str, classes: Sequence[str], origin: str | Path, limits: Limits = DEFAULT_LIMITS) -> Index:
    """The index of images to evaluate a network of these classes on: DIR/val where DIR has train/ and val/, else DIR;
    of a pack or a table in the same way.

    Its labels are the positions in `classes`. Classes without images are named on stderr. Raises UserError where it has
    images of another class. origin: where the classes are from.
    """
    parts = _parts_of(name, limits, with_val=True)
    root = (parts.val or parts.train)[0] if parts.val or parts.train[0].in_file else Part(Path(name))
    others = [part.split for part in parts.unused if part.split]
    if others and not parts.val:
        raise UserError(
            f"{printable(name)} has the splits {', '.join(map(printable, ['train', *others]))}, and no val; name a "
            "file or a folder of one of them"
        )
    index = root.open(limits, partial=True)
    if (index.labels < 0).any():
        raise UserError(f"{root} has images without a label; `predict` needs none")
    used = [index.classes[label] for label in np.unique(index.labels)]
    foreign = sorted(set(used) - set(classes))
    if foreign:
        require_classes(classes, origin, sorted({*classes, *used}), root)
    missing = [name for name in classes if name not in set(used)]
    if missing:
        names = ", ".join(map(printable, missing[:5])) + ", …" * (len(missing) > 5)
        print(f"{root} has no images of {len(missing)} of {len(classes)} classes: {names}", file=sys.stderr)
    position = {name: number for number, name in enumerate(classes)}
    of_label = np.array([position.get(name, -1) for name in index.classes], np.int64)
    return replace(index, labels=of_label[index.labels], classes=tuple(classes))


def open_unlabeled(name: str, limits: Limits = DEFAULT_LIMITS) -> Index:
    """The index of all images in a folder and its subfolders (see `scan_unlabeled`), or in a pack or table; it has no
    labels."""
    name = local_name(name)
    if not is_container(name):
        return scan_unlabeled(name, limits=limits)
    indices = list(open_container(name, limits, labeled=False).values())
    if len(indices) > 1:
        raise UserError(
            f"{printable(name)} has several splits, and predictions are for one; name a file or a folder of one split"
        )
    return replace(indices[0], labels=np.full(len(indices[0]), -1, np.int64), classes=())


def open_splits(
    name: str, split: str = "all", limits: Limits = DEFAULT_LIMITS, *, keep_unreadable: bool = False
) -> dict[str, Index]:
    """The indices of a folder's or a pack's training and validation images, by `train` and `val`. split: `all`, or only
    one of them. Raises UserError where the split is not there, or the two do not have the same classes."""
    parts = _parts_of(name, limits, with_val=split != "train")
    found = {"train": parts.train[0]} | ({"val": parts.val[0]} if parts.val else {})
    if split not in ("all", *found):
        raise UserError(f"{printable(name)} has no validation images")
    indices = {
        key: part.open(limits, keep_unreadable=keep_unreadable) for key, part in found.items() if split in ("all", key)
    }
    classes = [index.classes for index in indices.values()]
    if len(classes) > 1:
        require_classes(classes[0], found["train"], classes[1], found["val"])
    return indices
