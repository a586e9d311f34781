"""A small train and val set out of any folder of class folders, as ImageNet-50 is one out of ImageNet."""

import hashlib
from pathlib import Path

from fasttrain.data.index import is_split, scan
from fasttrain.data.place_files import Placed, finished, place, refuse_inside
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

_MARK = "cut.json"


def make(
    folder: Path,
    per_class: int,
    val_per_class: int,
    out: Path,
    seed: int = 0,
    link: bool = False,
    progress: bool = True,
) -> Placed:
    """Make `out`/train and `out`/val of `per_class` (1 or more) and `val_per_class` (0 or more) images a class.

    No image is in both. Which are drawn depends on the seed and the images' names alone; of two cuts of one seed, the
    smaller is part of the larger. link: hard links instead of copies. A cut that is whole already is left as it is,
    an interrupted one (`out`.partial) gone on with.

    Raises UserError where a class has too few images, an image's header cannot be read, the disk has too little room,
    hard links are impossible, or `out` holds anything else; RunError where placing fails. `out` then is as it was.
    """
    refuse_inside(out, folder)
    if is_split(folder / "train"):
        raise UserError(
            f"{printable(folder)} holds train/ with class folders; name {printable(folder / 'train')} to cut that"
        )
    index = scan(folder, progress=progress)
    members: dict[str, list[tuple[bytes, str, str]]] = {name: [] for name in index.classes}
    for path, each, label in zip(index.paths, index.ids, index.labels.tolist(), strict=True):
        # Sorting by a hash is a draw that no random generator's version can change.
        draw = hashlib.sha256(f"{seed}\0{each}".encode(errors="surrogateescape")).digest()
        members[index.classes[label]].append((draw, each, path))
    _refuse_small(members, per_class, val_per_class)

    sources: dict[str, str] = {}
    for found in members.values():
        found.sort()
        # From both ends, so that the size of one split does not change the other.
        for split, drawn in (("train", found[:per_class]), ("val", found[len(found) - val_per_class :])):
            sources |= {f"{split}/{each}": path for _, each, path in sorted(drawn, key=lambda member: member[1])}
    counts = {"train": per_class * len(members), "val": val_per_class * len(members)}
    names = hashlib.sha256("\0".join(sorted(sources)).encode(errors="surrogateescape")).hexdigest()
    stamp = {
        "fasttrain_cut": 1,
        "per_class": per_class,
        "val_per_class": val_per_class,
        "seed": seed,
        "names_sha256": names,
    }
    if finished(out, _MARK, stamp):
        return Placed(counts, new=0, made=False)
    new = place(out, sources, {}, _MARK, stamp, link=link, progress=progress)
    return Placed(counts, new, made=True)


def _refuse_small(members: dict[str, list[tuple[bytes, str, str]]], per_class: int, val_per_class: int) -> None:
    small = [name for name, found in members.items() if len(found) < per_class + val_per_class]
    if small:
        more = f", and {len(small) - 1} more classes have too few" if len(small) > 1 else ""
        raise UserError(
            f"class {printable(small[0])} has {len(members[small[0]])} images and the cut needs "
            f"{per_class + val_per_class} ({per_class} train, {val_per_class} val){more}"
        )
