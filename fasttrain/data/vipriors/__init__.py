"""ImageNet-50 of the VIPriors image classification challenge, built from a local ImageNet and the official lists.

The lists come from the challenge's toolkit (MIT license): see data/vipriors/CREDITS.txt.
"""

import gzip
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from fasttrain.data.place_files import Placed, is_finished, place, require_outside
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

SPLITS = ("train", "val", "test")
_MARKER = "vipriors.json"


def lists() -> dict[str, tuple[str, ...]]:
    """The official lists by split, each with 50,000 entries `wnid/file.JPEG`.

    `train` and `val` list images of ImageNet's train, 50 per class; `test` lists all images of its val, in the order
    of the challenge's test set.
    """
    return {split: _official(split) for split in SPLITS}


def _official(split: str) -> tuple[str, ...]:
    compressed = resources.files("fasttrain").joinpath("data", "vipriors", f"{split}.txt.gz").read_bytes()
    return tuple(gzip.decompress(compressed).decode("ascii").splitlines())


def test_labels(lists: Mapping[str, Sequence[str]] | None = None) -> tuple[int, ...]:
    """The class index of each test image: the position of its wnid among the sorted wnids of the train list.

    Only for offline scoring: the challenge forbids training on them.
    """
    train, test = (lists[split] if lists else _official(split) for split in ("train", "test"))
    classes = {name: label for label, name in enumerate(sorted({_wnid(entry) for entry in train}))}
    return tuple(classes[_wnid(entry)] for entry in test)


def prepare(
    imagenet: Path,
    out: Path,
    link: bool,
    progress: bool = True,
    lists: Mapping[str, Sequence[str]] | None = None,
) -> Placed:
    """Make `out`/train/<wnid>/…, `out`/val/<wnid>/…, `out`/test/imgs/img_<i>.JPEG and `out`/test/labels.csv.

    imagenet: has train/<wnid>/<file>, and val/<file> or val/<folder>/<file>. link: make hard links instead of copies.
    lists: by split; default: the official ones. If the set already exists, nothing is done; an interrupted call
    resumes from `out`.partial.

    Raises UserError where sources are missing, the disk has too little space, hard links are impossible, or `out`
    holds anything else; RunError where placing fails. `out` is then unchanged.
    """
    entries = lists or {split: _official(split) for split in SPLITS}
    counts = {split: len(entries[split]) for split in SPLITS}
    stamp = {"fasttrain_vipriors": 1, "sha256": {split: _sha256(entries[split]) for split in SPLITS}}
    if is_finished(out, _MARKER, stamp):
        return Placed(counts, new=0, made=False)
    for folder in (imagenet / "train", imagenet / "val"):
        if not folder.is_dir():
            raise UserError(
                f"no such folder: {printable(folder)}; --imagenet needs a folder with train/<wnid>/ and val/"
            )
        require_outside(out, folder)
    sources = {f"{split}/{entry}": str(imagenet / "train" / entry) for split in SPLITS[:2] for entry in entries[split]}
    names = [f"img_{number}.JPEG" for number in range(counts["test"])]
    for name, source in zip(names, _find_val(imagenet / "val", entries["test"]), strict=True):
        sources[f"test/imgs/{name}"] = source
    rows = sorted(zip(names, test_labels(entries), strict=True))
    table = "Image IDs,Labels\n" + "".join(f"{name},{label}\n" for name, label in rows)
    new = place(out, sources, {"test/labels.csv": table}, _MARKER, stamp, link=link, progress=progress)
    return Placed(counts, new, made=True)


def _wnid(entry: str) -> str:
    return entry.split("/")[0]


def _sha256(entries: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{entry}\n" for entry in entries).encode()).hexdigest()


def _find_val(val: Path, entries: Sequence[str]) -> list[str]:
    """The path of each entry's file, in `val` or any folder in it; where the file is missing, the path that the list
    has."""
    paths: dict[str, str] = {}
    try:
        for folder in (val, *sorted(path for path in val.iterdir() if path.is_dir())):
            for name in os.listdir(folder):
                paths.setdefault(name, os.path.join(folder, name))
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(error.filename)}: {error.strerror}") from None
    return [paths.get(entry.split("/")[1], str(val / entry)) for entry in entries]
