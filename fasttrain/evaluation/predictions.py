"""Files of probabilities, which `eval` and `predict` write and `ensemble` reads: .npz without pickles."""

import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened, replacing, require_writable_folder
from fasttrain.utils.text import printable

_REQUIRED = ("ids", "classes", "probs")
# What numpy and zipfile raise for damaged files.
_READ_ERRORS = (
    *(ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, SyntaxError, MemoryError, OverflowError),
    *(tokenize.TokenError, AttributeError, KeyError, TypeError, IndexError, RecursionError, zlib.error),
)
_SIZE = re.compile(r"probs_(\d{1,4})")


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """Probabilities of N images over K classes.

    ids: N strings, paths relative to the images' folder, with `/`. classes: K strings. probs: float32 [N, K], rows sum
    to 1. labels: int64 [N] or None. per_size: {image size: float32 [N, K]} where `probs` is the mean of several sizes.
    """

    ids: NDArray[np.str_]
    classes: NDArray[np.str_]
    probs: NDArray[np.float32]
    labels: NDArray[np.int64] | None = None
    per_size: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        labels = "with labels" if self.labels is not None else "without labels"
        return f"Predictions({len(self)} images, {len(self.classes)} classes, {labels})"

    @property
    def answers(self) -> NDArray[np.str_]:
        """The most likely class of each image, N strings."""
        return self.classes[self.probs.argmax(1)]


def save(predictions: Predictions, path: Path) -> None:
    """Write a file atomically. Raises UserError like `check_overwritable`, RunError where it cannot be written."""
    check_overwritable(path)
    arrays: dict[str, NDArray] = {
        "ids": predictions.ids,
        "classes": predictions.classes,
        "probs": predictions.probs,
        **{f"probs_{size}": probs for size, probs in predictions.per_size.items()},
    }
    if predictions.labels is not None:
        arrays["labels"] = predictions.labels
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def check_overwritable(path: Path) -> None:
    """Raises UserError where `path` does not end in .npz, has no folder that can be written to, or exists and holds no
    probabilities."""
    if path.suffix != ".npz":
        raise UserError(f"{printable(path)}: probabilities are kept in a .npz file; end the name in .npz")
    require_writable_folder(path)
    if path.exists() and not _has_probabilities(path):
        raise UserError(f"{printable(path)} exists and holds no probabilities; name another file")


def _has_probabilities(path: Path) -> bool:
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            return {f"{name}.npy" for name in _REQUIRED} <= set(archive.namelist())
    except (OSError, *_READ_ERRORS):
        return False


def load(path: Path, per_size: bool = True) -> Predictions:
    """Read an untrusted file; without per_size, only the means. Raises UserError, which says what is wrong with the
    file."""
    try:
        with opened(path) as file:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            # Entries must be uncompressed, as numpy writes them, and must not overlap: then a file cannot unpack to
            # more than its own size.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed; write it with numpy.savez")
            if len({entry.filename for entry in entries}) < len(entries):
                raise ValueError("two of its entries have the same name")
            if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
                raise ValueError("its arrays overlap")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            known = {*_REQUIRED, "labels"}
            wanted = [name for name in archive.files if name in known or (per_size and _SIZE.fullmatch(name))]
            return _parse({name: archive[name] for name in wanted})
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror or error}") from None
    except _READ_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else "damaged"
        raise UserError(f"{printable(path)} holds no probabilities: {printable(reason)}") from None


def _parse(arrays: dict[str, NDArray]) -> Predictions:
    """The predictions in a file's arrays. Raises ValueError where an array is missing or wrong."""
    for name in _REQUIRED:
        if not isinstance(arrays.get(name), np.ndarray):
            raise ValueError(f"it has no array {name!r}")
    ids, classes, probs = arrays["ids"], arrays["classes"], arrays["probs"]
    for name, strings in (("ids", ids), ("classes", classes)):
        if strings.dtype.kind != "U" or strings.ndim != 1:
            raise ValueError(f"{name!r} is not a list of strings")
        codes = np.frombuffer(strings.astype(strings.dtype.newbyteorder("<")).tobytes(), "<u4")
        # Surrogates are invalid, except those that stand for undecodable bytes in file names (surrogateescape).
        surrogates = (codes >= 0xD800) & (codes < 0xE000) & ~((codes >= 0xDC80) & (codes < 0xDD00))
        if (codes > 0x10FFFF).any() or surrogates.any():
            raise ValueError(f"{name!r} has characters that are not Unicode")
        if len(np.unique(strings)) < len(strings):
            raise ValueError(f"{name!r} has an entry twice")
    if not len(ids) or not len(classes):
        raise ValueError("it is empty")
    sizes = {int(match[1]): array for name, array in arrays.items() if (match := _SIZE.fullmatch(name))}
    for name, array in (("probs", probs), *((f"probs_{size}", array) for size, array in sizes.items())):
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name!r} is not an array")
        if array.dtype != np.float32 or array.shape != (len(ids), len(classes)):
            raise ValueError(f"{name!r} is {array.dtype} {list(array.shape)}, not float32 {[len(ids), len(classes)]}")
        if not (np.isfinite(array).all() and (array >= 0).all() and np.allclose(array.sum(1), 1, atol=1e-3)):
            raise ValueError(f"rows of {name!r} are not probabilities: they must be 0 or more and sum to 1")
    labels = arrays.get("labels")
    if labels is not None:
        if not isinstance(labels, np.ndarray):
            raise ValueError("'labels' is not an array")
        if labels.dtype != np.int64 or labels.shape != ids.shape:
            raise ValueError(f"'labels' is {labels.dtype} {list(labels.shape)}, not int64 {[len(ids)]}")
        if (labels < 0).any() or (labels >= len(classes)).any():
            raise ValueError("'labels' names classes that do not exist")
    return Predictions(ids, classes, probs, labels, sizes)
