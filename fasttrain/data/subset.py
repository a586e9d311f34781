"""Draws a small train and val set from a folder of class folders, as ImageNet-50 is drawn from ImageNet."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fasttrain.data.layout import has_folders
from fasttrain.data.place_files import Placed, is_finished, place, require_outside
from fasttrain.data.scan import DEFAULT_LIMITS, Limits, scan
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

_MARKER = "cut.json"


def make(
    folder: Path,
    per_class: int,
    val_per_class: int,
    out: Path,
    seed: int = 0,
    link: bool = False,
    progress: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    long_tail: float = 1.0,
) -> Placed:
    """Make `out`/train and `out`/val with `per_class` (1 or more) and `val_per_class` (0 or more) images per class.

    No image is in both. The draw depends only on the seed and the images' names; with the same seed, a smaller subset
    is part of a larger one. long_tail: how many times as many training images the largest class has as the smallest; in
    between the numbers fall exponentially, in an order of the classes that depends on the seed and their names (Cui et
    al. 2019). link: make hard links instead of copies. If the subset already exists, nothing is done; an
    interrupted call resumes from `out`.partial.

    Raises UserError where a class has too few images, an image's header cannot be read, the disk has too little space,
    hard links are impossible, or `out` holds anything else; RunError where placing fails. `out` is then unchanged.
    """
    require_outside(out, folder)
    if has_folders(folder / "train"):
        raise UserError(
            f"{printable(folder)} has train/ with class folders; to draw from those, name {printable(folder / 'train')}"
        )
    index = scan(folder, progress=progress, limits=limits)
    members: dict[str, list[tuple[bytes, str, str]]] = {name: [] for name in index.classes}
    for path, image_id, label in zip(index.paths, index.ids, index.labels.tolist(), strict=True):
        # Images are drawn in the order of a hash, which does not depend on the version of a random generator.
        sort_key = hashlib.sha256(f"{seed}\0{image_id}".encode(errors="surrogateescape")).digest()
        members[index.classes[label]].append((sort_key, image_id, path))
    _require_enough(members, per_class, val_per_class)
    train_sizes = _long_tail(list(members), per_class, long_tail, seed)

    sources: dict[str, str] = {}
    for name, images in members.items():
        images.sort()
        # Train is drawn from the start and val from the end, so the size of one does not change the other.
        for split, drawn in (("train", images[: train_sizes[name]]), ("val", images[len(images) - val_per_class :])):
            sources |= {f"{split}/{image_id}": path for _, image_id, path in sorted(drawn, key=lambda image: image[1])}
    counts = {"train": sum(train_sizes.values()), "val": val_per_class * len(members)}
    names = hashlib.sha256("\0".join(sorted(sources)).encode(errors="surrogateescape")).hexdigest()
    stamp = {
        "fasttrain_cut": 1,
        "per_class": per_class,
        "val_per_class": val_per_class,
        "seed": seed,
        "names_sha256": names,
        **({"long_tail": long_tail} if long_tail > 1 else {}),
    }
    if is_finished(out, _MARKER, stamp):
        return Placed(counts, new=0, made=False)
    new = place(out, sources, {}, _MARKER, stamp, link=link, progress=progress)
    return Placed(counts, new, made=True)


def _long_tail(names: Sequence[str], most: int, ratio: float, seed: int) -> dict[str, int]:
    """The number of training images of each class: `most` · ratio^(−r / (K − 1)) for the class of rank r, 1 or more."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode(errors="surrogateescape")).digest())
    last = max(1, len(names) - 1)
    return {name: max(1, round(most * ratio ** (-rank / last))) for rank, name in enumerate(ranked)}


def _require_enough(members: dict[str, list[tuple[bytes, str, str]]], per_class: int, val_per_class: int) -> None:
    small = [name for name, images in members.items() if len(images) < per_class + val_per_class]
    if small:
        more = f", and {len(small) - 1} more classes have too few" if len(small) > 1 else ""
        raise UserError(
            f"class {printable(small[0])} has {len(members[small[0]])} images and the subset needs "
            f"{per_class + val_per_class} ({per_class} train, {val_per_class} val){more}"
        )
