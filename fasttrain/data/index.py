"""Folders of class folders: scan them once, check them, and keep what was read.

A folder holds one sub-folder a class, and images directly inside each: `DIR/<class>/<image>`. Classes are sorted as
text. Image sizes are read from the files' headers (the pipelines plan crops from them) and cached in the user's cache
folder, never beside the images.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic
from fasttrain.utils.text import printable

if TYPE_CHECKING:  # config imports torch, and commands that only read files need not wait for that
    from fasttrain.config.schema import DataConfig

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
_CACHE_FORMAT = "fasttrain-index-2"


@dataclass(frozen=True, eq=False)
class Index:
    """N images of K classes.

    paths: N absolute paths. ids: N texts, each path relative to its folder, with `/`. labels: int64 [N].
    sizes: int32 [N, 2], (height, width) as stored, before any EXIF rotation; 0 where a header cannot be read.
    classes: K names, sorted as text.
    """

    paths: tuple[str, ...]
    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """SHA-256 over classes, ids and labels: the same for the same images in another place."""
        digest = hashlib.sha256("\0".join(self.classes + self.ids).encode(errors="surrogateescape"))
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def fingerprint_of_sizes(self) -> str:
        """SHA-256 over the images' sizes, of which crops are planned."""
        return hashlib.sha256(self.sizes.astype("<i4").tobytes()).hexdigest()


def cache_dir() -> Path:
    """fasttrain's folder in the user's cache: $XDG_CACHE_HOME/fasttrain or ~/.cache/fasttrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain"


def open_data(data: "DataConfig") -> tuple[Index, Index | None]:
    """The training index (several folders merged) and the validation index, or None where there is none.

    `DIR` with `train/<class>/…` inside stands for DIR/train, and DIR/val is then the validation folder unless another
    is given. Raises UserError when the two do not have the same classes.
    """
    folders, val = [], data.val
    for each in (*data.train, *filter(None, [val])):
        if not os.path.isdir(each):
            raise UserError(f"no such folder: {printable(each)}")
    for each in data.train:
        folder = Path(each)
        if is_split(folder / "train"):
            if not val and len(data.train) == 1 and is_split(folder / "val"):
                val = str(folder / "val")
            folder = folder / "train"
        folders.append(folder)
    resolved = [folder.resolve() for folder in folders]
    for at, folder in enumerate(resolved):
        if folder in resolved[:at]:
            raise UserError(f"--data {printable(folders[at])} is named twice; each image would count double")
    skip = data.on_bad == "skip"
    train_index = merge([scan(folder, keep_unreadable=skip) for folder in folders], folders)
    if not val:
        return train_index, None
    if Path(val).resolve() in resolved:
        raise UserError(f"--val {printable(val)} is also trained on; give a folder of other images, or none")
    val_index = scan(val)
    require_classes(train_index.classes, folders[0], val_index.classes, val)
    return train_index, val_index


def open_labelled(folder: str) -> Index:
    """The index of a folder to evaluate on: DIR/val where DIR holds train/ and val/ with class folders, else DIR."""
    inside = Path(folder, "val")
    return scan(inside if is_split(inside) and is_split(Path(folder, "train")) else folder)


def require_classes(ours: Sequence[str], ours_in: str | Path, theirs: Sequence[str], theirs_in: str | Path) -> None:
    """UserError that names a class which is in one place (a folder, a checkpoint) and not in the other."""
    for names, place, others, other in ((ours, ours_in, theirs, theirs_in), (theirs, theirs_in, ours, ours_in)):
        missing = sorted(set(names) - set(others))
        if missing:
            count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f"class {printable(missing[0])!r}{count} is in {printable(place)} but not in {printable(other)}; "
                "both need the same classes"
            )


def is_split(folder: Path) -> bool:
    """Whether there is such a folder, and folders in it."""
    return folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder))


def merge(indices: Sequence[Index], folders: Sequence[Path]) -> Index:
    """One index of all images, in the order given. All must have the same classes; UserError names the first other."""
    first = indices[0]
    for index, folder in zip(indices[1:], folders[1:], strict=True):
        require_classes(first.classes, folders[0], index.classes, folder)
    return Index(
        paths=tuple(path for index in indices for path in index.paths),
        ids=tuple(each for index in indices for each in index.ids),
        labels=np.concatenate([index.labels for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
        classes=first.classes,
    )


def scan(folder: str | Path, *, progress: bool = True, keep_unreadable: bool = False) -> Index:
    """Index a folder of class folders.

    Hidden files, files that are not images by extension, folders inside class folders and links that leave the
    folder are left out with one counted warning on stderr. Sizes come from the cache while names, byte sizes and
    times of change of all files are what they were.

    Raises UserError: the folder is missing or has no class folders, a class has no images, there is one class only,
    or a file's header cannot be read (each named), unless keep_unreadable, which gives such a file the size 0.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    classes, relative, labels, stamp, left_out = _walk(root)
    _say_left_out(root, left_out)
    if not classes:
        raise UserError(f"{printable(root)} has no class folders; images belong in {printable(root)}/<class>/<image>")
    if len(classes) == 1:
        raise UserError(
            f"{printable(root)} has one class only ({printable(classes[0])}); a classifier needs two or more"
        )
    empty = [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]
    if empty:
        more = f" (nor have {len(empty) - 1} other classes)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {printable(root / empty[0])} has no images directly in it{more}; fill or remove it"
        )
    paths, sizes = _with_sizes(root, relative, stamp, progress)
    if not keep_unreadable:
        _refuse_unreadable(paths, sizes)
    return Index(paths, tuple(relative), np.array(labels, np.int64), sizes, tuple(classes))


def scan_unlabelled(folder: str | Path, *, progress: bool = True) -> Index:
    """Index all images in a folder and the folders inside it, sorted by id as text: labels are −1, classes there are
    none. What `scan` leaves out is left out here too. UserError where there is no image, or one cannot be read."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    real_root = os.path.realpath(root)
    left_out: Counter[str] = Counter()
    stamps: dict[str, str] = {}
    waiting = [root]
    while waiting:
        for entry in _entries(waiting.pop(), real_root, left_out):
            name = os.path.relpath(entry.path, root)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif entry.is_dir():
                left_out["links to folders"] += 1
            elif not name.lower().endswith(EXTENSIONS) or not entry.is_file():
                left_out["files that are not images"] += 1
            else:
                stamps[name] = _stamp(name, entry)
    _say_left_out(root, left_out)
    if not stamps:
        raise UserError(f"there is no image in {printable(root)}")
    relative = sorted(stamps)
    digest = hashlib.sha256(f"{_CACHE_FORMAT}\0{real_root}\0unlabelled\0".encode(errors="surrogateescape"))
    for name in relative:
        digest.update(stamps[name].encode(errors="surrogateescape"))
    paths, sizes = _with_sizes(root, relative, digest.hexdigest(), progress)
    _refuse_unreadable(paths, sizes)
    return Index(paths, tuple(relative), np.full(len(paths), -1, np.int64), sizes, ())


def _say_left_out(root: Path, left_out: Counter[str]) -> None:
    if left_out:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
        print(f"{printable(root)}: left out {counts}", file=sys.stderr)


def _stamp(name: str, entry: os.DirEntry[str]) -> str:
    """What changes when the file does."""
    info = entry.stat()
    return f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0"


def _with_sizes(
    root: Path, relative: Sequence[str], stamp: str, progress: bool
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Absolute paths and, from the cache where `stamp` is there, sizes."""
    base = str(root.resolve())
    paths = tuple(os.path.join(base, each) for each in relative)
    cache = cache_dir() / "index" / f"{stamp}.npy"
    sizes = _load_sizes(cache, len(paths))
    if sizes is None:
        sizes = _read_sizes(paths, progress)
        _store_sizes(cache, sizes)
    return paths, sizes


def _walk(root: Path) -> tuple[list[str], list[str], list[int], str, Counter[str]]:
    """Class names, relative paths, their labels, a hash of everything that could change, and what was left out."""
    real_root = os.path.realpath(root)
    left_out: Counter[str] = Counter()
    digest = hashlib.sha256(f"{_CACHE_FORMAT}\0{real_root}\0".encode(errors="surrogateescape"))
    classes: list[str] = []
    relative: list[str] = []
    labels: list[int] = []
    for folder in _entries(root, real_root, left_out):
        if not folder.is_dir():
            left_out["stray files"] += 1
            continue
        classes.append(folder.name)
        for file in _entries(Path(folder.path), real_root, left_out):
            if file.is_dir():
                left_out["folders inside class folders"] += 1
            elif not file.name.lower().endswith(EXTENSIONS) or not file.is_file():
                left_out["files that are not images"] += 1
            else:
                relative.append(f"{folder.name}/{file.name}")
                labels.append(len(classes) - 1)
                digest.update(_stamp(relative[-1], file).encode(errors="surrogateescape"))
    return classes, relative, labels, digest.hexdigest(), left_out


def _entries(folder: Path, real_root: str, left_out: Counter[str]) -> Iterable[os.DirEntry[str]]:
    """The folder's visible entries, sorted as text, without links that leave the tree or lead nowhere."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(folder)}: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            left_out["hidden files"] += 1
        elif entry.is_symlink() and not os.path.realpath(entry.path).startswith(real_root + os.sep):
            left_out["links out of the folder"] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out["broken links"] += 1
        else:
            yield entry


def _read_sizes(paths: Sequence[str], progress: bool) -> NDArray[np.int32]:
    from tqdm import tqdm

    workers = min(16, 4 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        # `disable=None` hides the bar where stderr is not a terminal.
        found = pool.map(_header_size, paths)
        bar = tqdm(found, total=len(paths), desc="reading headers", unit="file", disable=None if progress else True)
        return np.array(list(bar), np.int32).reshape(-1, 2)


def _refuse_unreadable(paths: Sequence[str], sizes: NDArray[np.int32]) -> None:
    bad = np.flatnonzero(sizes[:, 0] == 0)
    if len(bad):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"not a readable image: {printable(paths[int(bad[0])])}{more}; mend or remove it")


def _header_size(path: str) -> tuple[int, int]:
    from PIL import Image

    try:
        # PIL warns of, or refuses, images of too many pixels when they are decoded; here only the header is read.
        with Image.open(path) as image:
            tags = getattr(image, "tag_v2", {})  # a TIFF's; PIL tells its size after the turn of its orientation
            turned = tags.get(274) in range(5, 9)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # PIL raises whatever the broken header leads its parsers to
        return 0, 0


def _load_sizes(cache: Path, count: int) -> NDArray[np.int32] | None:
    try:
        if not cache.is_file():  # a pipe would be waited for
            return None
        with cache.open("rb") as file:
            sizes = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # numpy raises whatever a broken header leads Python's parser to
        return None
    if sizes.shape != (count, 2) or sizes.dtype != np.int32:
        return None
    return sizes if ((sizes > 0).all(1) | (sizes == 0).all(1)).all() else None


def _store_sizes(cache: Path, sizes: NDArray[np.int32]) -> None:
    """Best effort: without a cache the next run reads the headers again."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic(cache) as temporary:
            np.save(temporary, sizes)
    except OSError:
        pass
