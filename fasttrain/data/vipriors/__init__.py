"""ImageNet-50 of the VIPriors image classification challenge, built from a local ImageNet by the challenge's own lists.

The lists are the challenge toolkit's (MIT): see data/vipriors/CREDITS.txt.
"""

import gzip
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from fasttrain.data.place_files import Placed, finished, place, refuse_inside
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

SPLITS = ("train", "val", "test")
_MARK = "vipriors.json"


def lists() -> dict[str, tuple[str, ...]]:
    """The official lists by split, 50,000 entries `wnid/file.JPEG` each.

    `train` and `val` name images of ImageNet's train, 50 a class; `test` all those of its val, in the test's order.
    """
    return {split: _official(split) for split in SPLITS}


def _official(split: str) -> tuple[str, ...]:
    packed = resources.files("fasttrain").joinpath("data", "vipriors", f"{split}.txt.gz").read_bytes()
    return tuple(gzip.decompress(packed).decode("ascii").splitlines())


def test_labels(lists: Mapping[str, Sequence[str]] | None = None) -> tuple[int, ...]:
    """The class index of each test image: its wnid's position among the train list's wnids, sorted.

    For offline scoring only; the challenge forbids to train on them.
    """
    train, test = (lists[split] if lists else _official(split) for split in ("train", "test"))
    classes = {name: at for at, name in enumerate(sorted({_wnid(entry) for entry in train}))}
    return tuple(classes[_wnid(entry)] for entry in test)


def prepare(
    imagenet: Path,
    out: Path,
    link: bool,
    progress: bool = True,
    lists: Mapping[str, Sequence[str]] | None = None,
) -> Placed:
    """Make `out`/train/<wnid>/…, `out`/val/<wnid>/…, `out`/test/imgs/img_<i>.JPEG and `out`/test/labels.csv.

    imagenet: holds train/<wnid>/<file>, and val/<file> or val/<folder>/<file>. link: hard links instead of copies.
    lists: by split, instead of the official ones. A set that is whole already is left as it is, an interrupted one
    (`out`.partial) gone on with.

    Raises UserError where sources are missing, the disk has too little room, hard links are impossible, or `out`
    holds anything else; RunError where placing fails. `out` then is as it was.
    """
    chosen = lists or {split: _official(split) for split in SPLITS}
    counts = {split: len(chosen[split]) for split in SPLITS}
    stamp = {"fasttrain_vipriors": 1, "sha256": {split: _sha256(chosen[split]) for split in SPLITS}}
    if finished(out, _MARK, stamp):
        return Placed(counts, new=0, made=False)
    for folder in (imagenet / "train", imagenet / "val"):
        if not folder.is_dir():
            raise UserError(f"no such folder: {printable(folder)}; --imagenet needs train/<wnid>/ and val/ in it")
        refuse_inside(out, folder)
    sources = {f"{split}/{entry}": str(imagenet / "train" / entry) for split in SPLITS[:2] for entry in chosen[split]}
    names = [f"img_{at}.JPEG" for at in range(counts["test"])]
    for name, source in zip(names, _find_val(imagenet / "val", chosen["test"]), strict=True):
        sources[f"test/imgs/{name}"] = source
    rows = sorted(zip(names, test_labels(chosen), strict=True))
    table = "Image IDs,Labels\n" + "".join(f"{name},{label}\n" for name, label in rows)
    new = place(out, sources, {"test/labels.csv": table}, _MARK, stamp, link=link, progress=progress)
    return Placed(counts, new, made=True)


def _wnid(entry: str) -> str:
    return entry.split("/")[0]


def _sha256(entries: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{entry}\n" for entry in entries).encode()).hexdigest()


def _find_val(val: Path, entries: Sequence[str]) -> list[str]:
    """The path of each entry's file, wherever in `val` it lies (the folders may be others than the list's); the path
    that the list says where it is nowhere."""
    found: dict[str, str] = {}
    try:
        for folder in (val, *sorted(each for each in val.iterdir() if each.is_dir())):
            for name in os.listdir(folder):
                found.setdefault(name, os.path.join(folder, name))
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(error.filename)}: {error.strerror}") from None
    return [found.get(entry.split("/")[1], str(val / entry)) for entry in entries]
