"""Folders of class folders: list the images, check them, and cache their sizes.

A folder has one subfolder per class, with the images directly inside: `DIR/<class>/<image>`. Classes are sorted as
text. Image sizes are read from the files' headers, since the pipelines plan crops from them. They are cached in the
user's cache folder, never next to the images.
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

if TYPE_CHECKING:  # config imports torch, and commands that only read files need not wait for it
    from fasttrain.config.schema import DataConfig

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
_CACHE_FORMAT = "fasttrain-index-3"


@dataclass(frozen=True, eq=False)
class Index:
    """N images of K classes.

    paths: N absolute paths. ids: N strings, each path relative to its folder, with `/`. labels: int64 [N].
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
        """SHA-256 over classes, ids and labels: equal for the same images in another folder."""
        digest = hashlib.sha256("\0".join(self.classes + self.ids).encode(errors="surrogateescape"))
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def fingerprint_of_sizes(self) -> str:
        """SHA-256 over the images' sizes, from which crops are planned."""
        return hashlib.sha256(self.sizes.astype("<i4").tobytes()).hexdigest()


def facts(index: Index | None, kind: str) -> dict[str, str]:
    """What must be the same on all ranks of an index of `kind` images, for `Ranks.require_same`."""
    if index is None:
        return {f"set of {kind} images": "none"}
    return {
        f"set of classes of the {kind} images": "\0".join(index.classes),
        f"set of {kind} images": index.fingerprint(),
        f"{kind} image size": index.fingerprint_of_sizes(),
    }


def cache_dir() -> Path:
    """fasttrain's folder in the user's cache: $XDG_CACHE_HOME/fasttrain or ~/.cache/fasttrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain"


def open_data(data: "DataConfig") -> tuple[Index, Index | None]:
    """The training index (several folders merged) and the validation index, or None where there is none.

    `DIR` with `train/<class>/…` inside stands for DIR/train; DIR/val is then the validation folder, unless another
    is given. Raises UserError where the two do not have the same classes.
    """
    folders, val = [], data.val
    for name in (*data.train, *filter(None, [val])):
        if not os.path.isdir(name):
            raise UserError(f"no such folder: {printable(name)}")
    for folder in map(Path, data.train):
        if is_split(folder / "train"):
            if not val and len(data.train) == 1 and is_split(folder / "val"):
                val = str(folder / "val")
            folder = folder / "train"
        folders.append(folder)
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"--data {printable(folders[i])} is given twice; each image would count twice")
    skip = data.on_bad == "skip"
    train_index = merge([scan(folder, keep_unreadable=skip) for folder in folders], folders)
    if not val:
        return train_index, None
    if Path(val).resolve() in resolved:
        raise UserError(f"--val {printable(val)} is also a training folder; give a folder of other images, or no --val")
    val_index = scan(val)
    require_classes(train_index.classes, folders[0], val_index.classes, val)
    return train_index, val_index


def open_labeled(folder: str) -> Index:
    """The index of a folder to evaluate on: DIR/val where DIR has train/ and val/ with class folders, else DIR."""
    val = Path(folder, "val")
    return scan(val if is_split(val) and is_split(Path(folder, "train")) else folder)


def require_classes(
    classes: Sequence[str], origin: str | Path, other_classes: Sequence[str], other_origin: str | Path
) -> None:
    """Raises UserError that names a class which one origin (a folder, a checkpoint) has and the other has not."""
    ours, theirs = (classes, origin), (other_classes, other_origin)
    for (names, place), (other_names, other_place) in ((ours, theirs), (theirs, ours)):
        missing = sorted(set(names) - set(other_names))
        if missing:
            count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f"class {printable(missing[0])!r}{count} is in {printable(place)} but not in {printable(other_place)}; "
                "both need the same classes"
            )


def is_split(folder: Path) -> bool:
    """Whether a folder exists and has folders in it."""
    return folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder))


def merge(indices: Sequence[Index], folders: Sequence[Path]) -> Index:
    """One index of all images, in the order given. Raises UserError where the folders do not have the same classes."""
    first = indices[0]
    for index, folder in zip(indices[1:], folders[1:], strict=True):
        require_classes(first.classes, folders[0], index.classes, folder)
    return Index(
        paths=tuple(path for index in indices for path in index.paths),
        ids=tuple(image_id for index in indices for image_id in index.ids),
        labels=np.concatenate([index.labels for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
        classes=first.classes,
    )


def scan(folder: str | Path, *, progress: bool = True, keep_unreadable: bool = False) -> Index:
    """Index a folder of class folders.

    Hidden files, files without an image's extension, folders inside class folders and links that leave the folder are
    ignored; one line on stderr counts them. Sizes come from the cache as long as no file's name, size in bytes, times
    or inode changes.

    keep_unreadable: give a file whose header cannot be read the size 0. Raises UserError where the folder is missing
    or has no class folders, a class has no images, there is only one class, or a header cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    classes, ids, labels, cache_key, ignored = _walk(root)
    _report_ignored(root, ignored)
    if not classes:
        raise UserError(f"{printable(root)} has no class folders; images belong in {printable(root)}/<class>/<image>")
    if len(classes) == 1:
        raise UserError(
            f"{printable(root)} has only one class ({printable(classes[0])}); a classifier needs two or more"
        )
    empty = [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]
    if empty:
        more = f" (nor do {len(empty) - 1} other classes)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {printable(root / empty[0])} has no images directly in it{more}; add images or remove it"
        )
    paths, sizes = _paths_and_sizes(root, ids, cache_key, progress)
    if not keep_unreadable:
        _require_readable(paths, sizes)
    return Index(paths, tuple(ids), np.array(labels, np.int64), sizes, tuple(classes))


def scan_unlabeled(folder: str | Path, *, progress: bool = True) -> Index:
    """Index all images in a folder and its subfolders, sorted by id as text. All labels are −1; there are no classes.
    Ignores what `scan` ignores. Raises UserError where there are no images, or a header cannot be read."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    real_root = os.path.realpath(root)
    ignored: Counter[str] = Counter()
    stamps: dict[str, str] = {}
    pending = [root]
    while pending:
        for entry in _entries(pending.pop(), real_root, ignored):
            name = os.path.relpath(entry.path, root)
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif entry.is_dir():
                ignored["links to folders"] += 1
            elif not name.lower().endswith(EXTENSIONS) or not entry.is_file():
                ignored["files that are not images"] += 1
            else:
                stamps[name] = _stamp(name, entry)
    _report_ignored(root, ignored)
    if not stamps:
        raise UserError(f"there is no image in {printable(root)}")
    ids = sorted(stamps)
    digest = hashlib.sha256(f"{_CACHE_FORMAT}\0{real_root}\0unlabelled\0".encode(errors="surrogateescape"))
    for name in ids:
        digest.update(stamps[name].encode(errors="surrogateescape"))
    paths, sizes = _paths_and_sizes(root, ids, digest.hexdigest(), progress)
    _require_readable(paths, sizes)
    return Index(paths, tuple(ids), np.full(len(paths), -1, np.int64), sizes, ())


def _report_ignored(root: Path, ignored: Counter[str]) -> None:
    if ignored:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        print(f"{printable(root)}: ignored {counts}", file=sys.stderr)


def _stamp(name: str, entry: os.DirEntry[str]) -> str:
    """What changes when a file does, as text for the cache's key: its name, size, times and inode."""
    info = entry.stat()
    return f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\0{info.st_ino}\0"


def _paths_and_sizes(
    root: Path, ids: Sequence[str], cache_key: str, progress: bool
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The images' absolute paths, and their sizes from the cache or else from the headers."""
    base = str(root.resolve())
    paths = tuple(os.path.join(base, image_id) for image_id in ids)
    cache = cache_dir() / "index" / f"{cache_key}.npy"
    sizes = _load_sizes(cache, len(paths))
    if sizes is None:
        sizes = _read_sizes(paths, progress)
        if sizes.all():  # a file that cannot be read is tried again next time
            _store_sizes(cache, sizes)
    return paths, sizes


def _walk(root: Path) -> tuple[list[str], list[str], list[int], str, Counter[str]]:
    """Class names, ids, labels, a hash over all files' stamps, and how many entries of each kind were ignored."""
    real_root = os.path.realpath(root)
    ignored: Counter[str] = Counter()
    digest = hashlib.sha256(f"{_CACHE_FORMAT}\0{real_root}\0".encode(errors="surrogateescape"))
    classes: list[str] = []
    ids: list[str] = []
    labels: list[int] = []
    for folder in _entries(root, real_root, ignored):
        if not folder.is_dir():
            ignored["stray files"] += 1
            continue
        classes.append(folder.name)
        for file in _entries(Path(folder.path), real_root, ignored):
            if file.is_dir():
                ignored["folders inside class folders"] += 1
            elif not file.name.lower().endswith(EXTENSIONS) or not file.is_file():
                ignored["files that are not images"] += 1
            else:
                ids.append(f"{folder.name}/{file.name}")
                labels.append(len(classes) - 1)
                digest.update(_stamp(ids[-1], file).encode(errors="surrogateescape"))
    return classes, ids, labels, digest.hexdigest(), ignored


def _entries(folder: Path, real_root: str, ignored: Counter[str]) -> Iterable[os.DirEntry[str]]:
    """A folder's visible entries, sorted as text, without links that leave `real_root` or are broken."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(folder)}: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            ignored["hidden files"] += 1
        elif entry.is_symlink() and not os.path.realpath(entry.path).startswith(real_root + os.sep):
            ignored["links out of the folder"] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            ignored["broken links"] += 1
        else:
            yield entry


def _read_sizes(paths: Sequence[str], progress: bool) -> NDArray[np.int32]:
    from tqdm import tqdm

    workers = min(16, 4 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        # `disable=None` hides the bar where stderr is not a terminal.
        sizes = pool.map(_header_size, paths)
        bar = tqdm(sizes, total=len(paths), desc="reading headers", unit="file", disable=None if progress else True)
        return np.array(list(bar), np.int32).reshape(-1, 2)


def _require_readable(paths: Sequence[str], sizes: NDArray[np.int32]) -> None:
    bad = np.flatnonzero(sizes[:, 0] == 0)
    if len(bad):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"not a readable image: {printable(paths[int(bad[0])])}{more}; fix or remove it")


def _header_size(path: str) -> tuple[int, int]:
    """An image's (height, width) as stored; (0, 0) if the file has no header of an image. Raises UserError if the file
    cannot be read: that says nothing about the image."""
    from PIL import Image

    try:
        with Image.open(path) as image:  # reads only the header
            tags = getattr(image, "tag_v2", {})  # PIL gives a TIFF's size after it applies the orientation, tag 274
            transposed = tags.get(274) in range(5, 9)
            return (image.width, image.height) if transposed else (image.height, image.width)
    except Exception as error:  # PIL raises whatever the broken header leads its parsers to
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
        return 0, 0


def _load_sizes(cache: Path, count: int) -> NDArray[np.int32] | None:
    try:
        if not cache.is_file():  # opening a pipe would block
            return None
        with cache.open("rb") as file:
            sizes = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # numpy raises whatever a broken header leads Python's parser to
        return None
    if sizes.shape != (count, 2) or sizes.dtype != np.int32:
        return None
    return sizes if (sizes > 0).all() else None


def _store_sizes(cache: Path, sizes: NDArray[np.int32]) -> None:
    """Write the cache; where this fails, the next run reads the headers again."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic(cache) as temporary:
            np.save(temporary, sizes)
    except OSError:
        pass
