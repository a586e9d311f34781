"""Scans folders of class folders: which files are images, their sizes, and a cache of the sizes."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.headers import EXTENSIONS, read_headers
from fasttrain.data.index import Index, spelling
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic, opened
from fasttrain.utils.text import printable

if TYPE_CHECKING:  # config imports torch, and commands that only read files need not wait for it
    from fasttrain.config.schema import DataConfig

_CACHE_FORMAT = "fasttrain-index-4"


class Limits(NamedTuple):
    """What a scan takes. links: `inside` or `follow`, see `DataConfig.links`. max_megapixels: the most pixels of an
    image, in millions."""

    links: str = "inside"
    max_megapixels: float = 179.0

    @classmethod
    def of(cls, data: "DataConfig") -> "Limits":
        return cls(data.links, data.max_megapixels)

    def apply(self, sizes: NDArray[np.int32]) -> tuple[NDArray[np.int32], dict[int, str]]:
        """`sizes`, int32 [N, 2], with 0 for the images that have too many pixels, and the problems of those."""
        sizes, problems = sizes.copy(), {}
        megapixels = sizes.prod(1, dtype=np.int64) / 1e6
        for number in np.flatnonzero(megapixels > self.max_megapixels).tolist():
            height, width = sizes[number].tolist()
            problems[number] = (
                f"it has {width} x {height} pixels, {megapixels[number]:.1f} million, more than data.max_megapixels "
                f"{self.max_megapixels:g}; scale it down or raise the setting"
            )
            sizes[number] = 0
        return sizes, problems


DEFAULT_LIMITS = Limits()


def cache_dir() -> Path:
    """fasttrain's folder in the user's cache: $XDG_CACHE_HOME/fasttrain or ~/.cache/fasttrain. Raises UserError where
    the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain"
    except RuntimeError:  # an unknown user, and no HOME
        raise UserError("this user has no home folder; set XDG_CACHE_HOME to a folder for caches") from None


def scan(
    folder: str | Path,
    *,
    progress: bool = True,
    keep_unreadable: bool = False,
    partial: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Index:
    """Index a folder of class folders.

    Hidden files, files without an image's extension, folders inside class folders and links that leave the folder are
    ignored; one line on stderr counts them. Sizes come from the cache as long as no file's name, size in bytes, times
    or inode changes.

    keep_unreadable: give an image that cannot be used the size 0. partial: classes may have no images, and there may be
    only one. Raises UserError where the folder is missing or has no class folders, a class has no images, there is only
    one class, or an image cannot be used: its header cannot be read, it has too many pixels, or DALI does not decode
    its kind as PIL does.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    with _read_errors():
        classes, ids, labels, cache_key, ignored = _walk(root, limits)
    ignored.report(root)
    if not classes:
        hint = ignored.hint(root) or f"images belong in {printable(root)}/<class>/<image>"
        raise UserError(f"{printable(root)} has no class folders; {hint}")
    if len(classes) == 1 and not partial:
        raise UserError(
            f"{printable(root)} has only one class ({printable(classes[0])}); a classifier needs two or more"
        )
    empty = [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]
    if empty and (not partial or not ids):
        more = f" (nor do {len(empty) - 1} other classes)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {printable(root / empty[0])} has no images directly in it{more}; "
            f"{ignored.hint(root / empty[0]) or 'add images or remove it'}"
        )
    _report_lookalikes(root, classes)
    paths, sizes, problems = _paths_and_sizes(root, ids, cache_key, progress, limits)
    if not keep_unreadable:
        require_usable(paths, problems)
    return Index(paths, tuple(ids), np.array(labels, np.int64), sizes, tuple(classes), problems)


def scan_unlabeled(folder: str | Path, *, progress: bool = True, limits: Limits = DEFAULT_LIMITS) -> Index:
    """Index all images in a folder and its subfolders, sorted by id as text. All labels are −1; there are no classes.
    Ignores what `scan` ignores. Raises UserError where there are no images, or one cannot be used."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    real_root = os.path.realpath(root)
    ignored = _Ignored()
    stamps: dict[str, str] = {}
    pending, seen = [root], {real_root}
    with _read_errors():
        while pending:
            for entry in _entries(pending.pop(), real_root, ignored, limits):
                name = os.path.relpath(entry.path, root)
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if entry.is_symlink() and (limits.links != "follow" or real in seen):
                        ignored.add("links to folders", entry)
                    else:
                        seen.add(real)
                        pending.append(Path(entry.path))
                elif not name.lower().endswith(EXTENSIONS) or not entry.is_file():
                    ignored.add("files that are not images", entry)
                else:
                    stamps[name] = stamp(name, entry.stat())
    ignored.report(root)
    if not stamps:
        raise UserError(f"there is no image in {printable(root)}; {ignored.hint(root) or 'name a folder of images'}")
    ids = sorted(stamps)
    digest = hashlib.sha256(f"{real_root}\0unlabelled\0".encode(errors="surrogateescape"))
    for name in ids:
        digest.update(stamps[name].encode(errors="surrogateescape"))
    paths, sizes, problems = _paths_and_sizes(root, ids, digest.hexdigest(), progress, limits)
    require_usable(paths, problems)
    return Index(paths, tuple(ids), np.full(len(paths), -1, np.int64), sizes, ())


@contextmanager
def _read_errors() -> Iterator[None]:
    """Raises UserError where a file vanishes while a folder is read, or a folder may not be searched."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or "")
        raise UserError(f"cannot read {printable(name)}: {error.strerror}") from None


class _Ignored:
    """What a scan leaves out: the paths of the entries of each kind."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def add(self, kind: str, entry: os.DirEntry[str]) -> None:
        self.paths.setdefault(kind, []).append(entry.path)

    def report(self, root: Path) -> None:
        if self.paths:
            counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in sorted(self.paths.items()))
            print(f"{printable(root)}: ignored {counts}", file=sys.stderr)

    def hint(self, folder: Path) -> str:
        """What to do about a folder without images, from what was ignored in it; empty where nothing was."""

        def inside(kind: str) -> list[str]:
            prefix = os.path.join(folder, "")
            return [path for path in self.paths.get(kind, []) if path.startswith(prefix) or path == str(folder)]

        if links := inside("links out of the folder"):
            target = printable(os.path.realpath(links[0]))
            example = f"{printable(links[0])} -> {target}"
            return f"{len(links)} links were not followed, such as {example}: use --links follow or data.links=follow"
        if links := inside("broken links"):
            return f"{len(links)} links are broken, such as {printable(links[0])} -> {printable(os.readlink(links[0]))}"
        if folders := inside("folders inside class folders"):
            return f"it has folders, such as {printable(folders[0])}; images belong in DIR/<class>/<image>"
        if files := inside("files that are not images"):
            return (
                f"{len(files)} files are ignored, such as {printable(files[0])}; images end in {', '.join(EXTENSIONS)}"
            )
        return ""


def _report_lookalikes(root: Path, classes: Sequence[str]) -> None:
    """Name class folders that look alike, such as a composed and a decomposed é: they are two classes."""
    spelled: dict[str, list[str]] = {}
    for name in classes:
        spelled.setdefault(spelling(name), []).append(name)
    for names in spelled.values():
        if len(names) > 1:
            print(f"{printable(root)}: the class folders {' and '.join(map(ascii, names))} look alike", file=sys.stderr)


def stamp(name: str, info: os.stat_result) -> str:
    """What changes when a file does, as text for the cache's key: its name, size, times and inode."""
    return f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\0{info.st_ino}\0"


def _paths_and_sizes(
    root: Path, ids: Sequence[str], cache_key: str, progress: bool, limits: Limits
) -> tuple[tuple[str, ...], NDArray[np.int32], dict[int, str]]:
    """The images' absolute paths; their sizes from the cache or else from the headers; and the problems of those that
    cannot be used, whose sizes are 0."""
    base = str(root.resolve())
    paths = tuple(os.path.join(base, image_id) for image_id in ids)
    return paths, *sizes_of(paths, cache_key, progress, limits)


def sizes_of(
    paths: Sequence[str],
    cache_key: str,
    progress: bool,
    limits: Limits,
    open_image: Callable[[int], IO[bytes]] | None = None,
) -> tuple[NDArray[np.int32], dict[int, str]]:
    """The images' sizes from the cache or else from the headers, int32 [N, 2]; and the problems of those that cannot be
    used, whose sizes are 0. open_image: see `read_headers`."""
    problems: dict[int, str] = {}
    cache = cached(f"{_CACHE_FORMAT}-{cache_key}.npy")
    sizes = _load_sizes(cache, len(paths))
    if sizes is None:
        sizes, problems = read_headers(paths, progress, open_image)
        if not problems:  # a file that cannot be read is tried again next time
            store_array(cache, sizes)
    sizes, too_large = limits.apply(sizes)
    return sizes, problems | too_large


def _walk(root: Path, limits: Limits) -> tuple[list[str], list[str], list[int], str, _Ignored]:
    """Class names, ids, labels, a hash over all files' stamps, and what was ignored."""
    real_root = os.path.realpath(root)
    ignored = _Ignored()
    digest = hashlib.sha256(f"{real_root}\0".encode(errors="surrogateescape"))
    classes: list[str] = []
    ids: list[str] = []
    labels: list[int] = []
    for folder in _entries(root, real_root, ignored, limits):
        if not folder.is_dir():
            ignored.add("stray files", folder)
            continue
        classes.append(folder.name)
        for file in _entries(Path(folder.path), real_root, ignored, limits):
            if file.is_dir():
                ignored.add("folders inside class folders", file)
            elif not file.name.lower().endswith(EXTENSIONS) or not file.is_file():
                ignored.add("files that are not images", file)
            else:
                ids.append(f"{folder.name}/{file.name}")
                labels.append(len(classes) - 1)
                digest.update(stamp(ids[-1], file.stat()).encode(errors="surrogateescape"))
    return classes, ids, labels, digest.hexdigest(), ignored


def _entries(folder: Path, real_root: str, ignored: _Ignored, limits: Limits) -> Iterable[os.DirEntry[str]]:
    """A folder's visible entries, sorted as text, without links that are broken or, unless they are followed, leave
    `real_root`."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(folder)}: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            ignored.add("hidden files", entry)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            ignored.add("broken links", entry)
        elif entry.is_symlink() and limits.links != "follow" and not _is_inside(entry.path, real_root):
            ignored.add("links out of the folder", entry)
        else:
            yield entry


def _is_inside(path: str, real_root: str) -> bool:
    return os.path.realpath(path).startswith(real_root + os.sep)


def require_usable(paths: Sequence[str], problems: Mapping[int, str]) -> None:
    if problems:
        first = min(problems)
        more = f" ({len(problems) - 1} more images cannot be used)" if len(problems) > 1 else ""
        raise UserError(f"cannot use the image {printable(paths[first])}: {problems[first]}{more}")


def _load_sizes(cache: Path | None, count: int) -> NDArray[np.int32] | None:
    sizes = load_array(cache)
    if sizes is None or sizes.shape != (count, 2) or sizes.dtype != np.int32 or not (sizes > 0).all():
        return None
    return sizes


def cached(name: str) -> Path | None:
    """A path in the cache of indices; None where the user has no home folder. The cache only saves time."""
    try:
        return cache_dir() / "index" / name
    except UserError:
        return None


def load_array(path: Path | None) -> NDArray[Any] | None:
    """The array that `store_array` has written; None where there is no such file, or it is broken."""
    try:
        if path is None:
            return None
        with opened(path) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # numpy raises whatever a broken header leads Python's parser to
        return None


def store_array(path: Path | None, array: NDArray[Any]) -> None:
    """Write an array into the cache; where this fails, the next run computes it again."""
    with suppress(OSError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary:
                np.save(temporary, array)
