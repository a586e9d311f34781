"""Files of probabilities: what `eval` and `predict` write, and `ensemble` reads. An .npz without pickles."""

import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened, replacing
from fasttrain.utils.text import printable

_REQUIRED = ("ids", "classes", "probs")
# What numpy and zipfile raise over bytes that they do not expect.
_DAMAGE = (
    *(ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, SyntaxError, MemoryError, OverflowError),
    *(tokenize.TokenError, AttributeError, KeyError, TypeError, IndexError, RecursionError, zlib.error),
)
_SIZE = re.compile(r"probs_(\d{1,4})")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities of N images over K classes.

    ids: N texts, paths relative to the images' folder, with `/`. classes: K texts. probs: float32 [N, K], rows sum to
    1. labels: int64 [N] or None. per_size: {pixels: float32 [N, K]} where several sizes were fused into `probs`.
    """

    ids: NDArray[np.str_]
    classes: NDArray[np.str_]
    probs: NDArray[np.float32]
    labels: NDArray[np.int64] | None = None
    per_size: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


class Scores(NamedTuple):
    """Shares in 0 … 1 over `images` images. not_finite: how many of them got an answer that is not; those are wrong."""

    top1: float
    top5: float
    images: int
    not_finite: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As the log and checkpoints store them; not_finite only where it is above 0."""
        return {name: each for name, each in self._asdict().items() if each or name != "not_finite"}


def scores(probs: NDArray[np.floating], labels: NDArray[np.int64]) -> Scores:
    """Top-1 and top-5 of probabilities [N, K]; with five classes or fewer top-5 is 1."""
    own = probs[np.arange(len(labels)), labels][:, None]
    # Among equals the first class counts as the higher, as in argmax; what is not a number is never right.
    lower = (probs < own) | ((probs == own) & (np.arange(probs.shape[1]) > labels[:, None]))
    rank = probs.shape[1] - 1 - lower.sum(1)
    bad = int((~np.isfinite(probs)).any(1).sum())
    return Scores(float((rank == 0).mean()), float((rank < 5).mean()), len(labels), bad)


def save(predictions: Predictions, path: Path) -> None:
    """Write a file atomically. Raises UserError where `path` is something else than such a file."""
    check_overwritable(path)
    arrays: dict[str, NDArray] = {
        "ids": predictions.ids,
        "classes": predictions.classes,
        "probs": predictions.probs,
        **{f"probs_{size}": each for size, each in predictions.per_size.items()},
    }
    if predictions.labels is not None:
        arrays["labels"] = predictions.labels
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def check_overwritable(path: Path) -> None:
    """UserError unless `path` can be written without losing what fasttrain did not make."""
    if path.suffix != ".npz":
        raise UserError(f"{printable(path)}: probabilities are kept in a .npz file; end the name in .npz")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {printable(path)}: there is no folder {printable(path.parent)}")
    if path.exists() and not _looks_like_ours(path):
        raise UserError(f"{printable(path)} is there and holds no probabilities; name another file")


def _looks_like_ours(path: Path) -> bool:
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            return {f"{name}.npy" for name in _REQUIRED} <= set(archive.namelist())
    except (OSError, *_DAMAGE):
        return False


def load(path: Path, per_size: bool = True) -> Predictions:
    """Read an untrusted file; without per_size only what is fused. Raises UserError that names the file and what is
    wrong with it."""
    try:
        with opened(path) as file:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            # Stored, not compressed, as numpy writes them, and none inside another: then a file cannot unpack to more
            # than its own size.
            if any(each.compress_type != zipfile.ZIP_STORED for each in entries):
                raise ValueError("it is compressed; write it with numpy.savez")
            if len({each.filename for each in entries}) < len(entries):
                raise ValueError("it holds something twice")
            if sum(each.file_size for each in entries) > os.fstat(file.fileno()).st_size:
                raise ValueError("its arrays overlap")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            known = {*_REQUIRED, "labels"}
            wanted = [name for name in archive.files if name in known or (per_size and _SIZE.fullmatch(name))]
            return _checked({name: archive[name] for name in wanted})
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror or error}") from None
    except _DAMAGE as error:
        gist = str(error).splitlines()[0] if str(error) else "damaged"
        raise UserError(f"{printable(path)} holds no probabilities: {printable(gist)}") from None


def _checked(arrays: dict[str, NDArray]) -> Predictions:
    for name in _REQUIRED:
        if not isinstance(arrays.get(name), np.ndarray):
            raise ValueError(f"it has no array {name!r}")
    ids, classes, probs = arrays["ids"], arrays["classes"], arrays["probs"]
    for name, each in (("ids", ids), ("classes", classes)):
        if each.dtype.kind != "U" or each.ndim != 1:
            raise ValueError(f"{name!r} is not a list of texts")
        letters = np.frombuffer(each.astype(each.dtype.newbyteorder("<")).tobytes(), "<u4")
        # Halves of surrogate pairs are none, but for those that stand for bytes in names of files.
        halves = (letters >= 0xD800) & (letters < 0xE000) & ~((letters >= 0xDC80) & (letters < 0xDD00))
        if (letters > 0x10FFFF).any() or halves.any():
            raise ValueError(f"{name!r} has letters that there are none of")
        if len(np.unique(each)) < len(each):
            raise ValueError(f"{name!r} names something twice")
    if not len(ids) or not len(classes):
        raise ValueError("it is empty")
    sizes = {int(found[1]): each for name, each in arrays.items() if (found := _SIZE.fullmatch(name))}
    for name, each in (("probs", probs), *((f"probs_{size}", each) for size, each in sizes.items())):
        if not isinstance(each, np.ndarray):
            raise ValueError(f"{name!r} is no array")
        if each.dtype != np.float32 or each.shape != (len(ids), len(classes)):
            raise ValueError(f"{name!r} is {each.dtype} {list(each.shape)}, not float32 {[len(ids), len(classes)]}")
        if not (np.isfinite(each).all() and (each >= 0).all() and np.allclose(each.sum(1), 1, atol=1e-3)):
            raise ValueError(f"rows of {name!r} are no probabilities: they must be 0 or more and sum to 1")
    labels = arrays.get("labels")
    if labels is not None:
        if not isinstance(labels, np.ndarray):
            raise ValueError("'labels' is no array")
        if labels.dtype != np.int64 or labels.shape != ids.shape:
            raise ValueError(f"'labels' is {labels.dtype} {list(labels.shape)}, not int64 {[len(ids)]}")
        if (labels < 0).any() or (labels >= len(classes)).any():
            raise ValueError("'labels' names classes that are not there")
    return Predictions(ids, classes, probs, labels, sizes)
