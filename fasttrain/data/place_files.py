"""Places a set of files in a folder, as hard links or copies: checks everything first, and can resume.

The files are written to `OUT.partial`, which is renamed to `OUT` once it is complete. A marker file in it identifies
the set, so nothing is ever written into a folder that holds anything else.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.files import atomic, is_inside, opened, read_json_object
from fasttrain.utils.text import printable

_BLOCK = 4096  # bytes; file systems commonly round a file's size up to a multiple of this
_MISSING_HEAD = "# source files that are missing\n"


@dataclass(frozen=True)
class Placed:
    """counts: number of files of the set, by split. new: how many this call placed; earlier calls placed the others.
    made: False where the set already existed."""

    counts: dict[str, int]
    new: int
    made: bool


def is_finished(out: Path, marker: str, stamp: Mapping[str, object]) -> bool:
    """Whether `out` already holds the complete set.

    marker: the marker file's name. stamp: the marker's content as JSON values, which identifies the set. Raises
    UserError where `out` or `out`.partial holds anything else.
    """
    out = Path(os.path.realpath(out))
    partial = _sibling(out, "partial")
    if read_json_object(out / marker) == stamp:
        return True
    problem = "already exists and is not the requested set"
    try:
        if _has_others(out):
            raise UserError(f"{printable(out)} {problem}; name another --out")
        # The first call may have been stopped while it wrote the marker.
        if _has_others(partial, (marker, f"{marker}.part", ".part-*")) and read_json_object(partial / marker) != stamp:
            raise UserError(f"{printable(partial)} {problem}; remove it or name another --out")
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(error.filename)}: {error.strerror}") from None
    return False


def require_outside(out: Path, folder: Path) -> None:
    """Raises UserError where `out` is inside `folder`, which is read from."""
    if is_inside(out, folder):
        raise UserError(
            f"--out {printable(out)} is inside {printable(folder)}, which is read from; name a folder outside it"
        )


def place(
    out: Path,
    sources: Mapping[str, str],
    texts: Mapping[str, str],
    marker: str,
    stamp: Mapping[str, object],
    *,
    link: bool,
    progress: bool = True,
) -> int:
    """Make `out`; call `is_finished` first, which must return False. Returns how many files were placed.

    sources: each file's source, by its path in `out`. texts: contents of further files, by their path in `out`. Files
    that an interrupted call left in `out`.partial are kept if they have the source's size (copies) or inode (links).

    Raises UserError, before anything is placed, where sources are missing (`out`.missing.txt lists them), the disk has
    too little space for the copies, or hard links are impossible; RunError where placing fails.
    """
    from tqdm import tqdm

    out = Path(os.path.realpath(out))
    partial, missing = _sibling(out, "partial"), _sibling(out, "missing.txt")
    infos = _stat_all(list(sources.values()), progress)
    _refuse_missing(missing, infos)
    todo = [path for path, source in sources.items() if not _is_placed(partial / path, infos[source], link)]
    base = next(parent for parent in out.parents if parent.is_dir())
    if link:
        _require_links(base, {info.st_dev: source for source, info in infos.items() if info})
    else:
        sizes = [info.st_size for path in todo if (info := infos[sources[path]])]
        _require_space(base, sum(-(-size // _BLOCK) * _BLOCK for size in sizes))

    folders = sorted({(partial / path).parent for path in (*sources, *texts)})
    if any(os.path.realpath(folder) != str(folder) for folder in (partial, *folders)):
        raise UserError(f"{printable(partial)} is or contains a link to a folder; remove it or name another --out")
    temporary = partial / f".part-{os.getpid()}"
    current = ""  # path in `out`, for the error
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write(partial / marker, json.dumps(stamp, indent=1) + "\n", temporary)
    except OSError as error:
        raise UserError(f"cannot write to {printable(partial)}: {error.strerror}") from None
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for current, text in texts.items():
            _write(partial / current, text, temporary)
        bar = tqdm(todo, desc="linking" if link else "copying", unit="file", disable=None if progress else True)
        for current in bar:
            with atomic(partial / current, temporary=temporary) as target:
                if link:
                    _hard_link(sources[current], target)
                else:
                    shutil.copyfile(sources[current], target)
        for stale in (*partial.glob(".part-*"), partial / f"{marker}.part"):  # left by killed processes
            stale.unlink(missing_ok=True)
        os.rename(partial, out)  # fails, and changes nothing, if another process has filled `out` meanwhile
        if _is_our_list(missing):
            missing.unlink()
    except OSError as error:
        if read_json_object(out / marker) == stamp:  # another process has made the same set meanwhile
            return 0
        raise RunError(
            f"cannot write {printable(partial / current)}: {error.strerror}; the same command resumes"
        ) from None
    return len(todo)


def _sibling(out: Path, suffix: str) -> Path:
    return out.parent / f"{out.name}.{suffix}"


def _has_others(folder: Path, allowed: tuple[str, ...] = ()) -> bool:
    """Whether `folder` is not a folder but exists, or has entries whose names match no pattern of `allowed`."""
    if not folder.is_dir():
        return os.path.lexists(folder)
    return any(not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed) for name in os.listdir(folder))


def _write(path: Path, text: str, temporary: Path) -> None:
    with atomic(path, temporary=temporary):
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _stat_all(paths: list[str], progress: bool) -> dict[str, os.stat_result | None]:
    """Each path's stat, following links; None where it is not a file."""
    from tqdm import tqdm

    pool = ThreadPoolExecutor(16)  # a network file system with a cold cache answers many requests as fast as one
    try:
        bar = tqdm(
            pool.map(_stat, paths),
            total=len(paths),
            desc="checking sources",
            unit="file",
            disable=None if progress else True,
        )
        return dict(zip(paths, bar, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path) if os.path.isfile(path) else None
    except OSError:
        return None


def _is_placed(target: Path, source: os.stat_result | None, link: bool) -> bool:
    info = _stat(str(target))
    if not info or not source:
        return False
    same_file = os.path.samestat(info, source)
    # A copy must not be a hard link to the source, which an earlier call may have made.
    return same_file if link else not same_file and info.st_size == source.st_size


def _refuse_missing(report: Path, infos: Mapping[str, os.stat_result | None]) -> None:
    absent = [path for path, info in infos.items() if info is None]
    if not absent:
        return
    names = ", ".join(map(printable, absent[:3])) + (", …" if absent[3:] else "")
    line = f"{len(absent)} of {len(infos)} source files are missing: {names}"
    if os.path.lexists(report) and not _is_our_list(report):
        raise UserError(
            f"{line}; the full list is not written, because {printable(report)} is another file: move or remove it"
        )
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        text = _MISSING_HEAD + "".join(f"{path}\n" for path in absent)
        report.write_bytes(os.fsencode(text))
    except OSError as error:
        raise UserError(f"{line}; cannot write the full list to {printable(report)}: {error.strerror}") from None
    raise UserError(f"{line}; all are listed in {printable(report)}")


def _is_our_list(path: Path) -> bool:
    try:
        if path.is_symlink():  # we never make one, and writing would follow it
            return False
        with opened(path) as file:
            return file.read(len(_MISSING_HEAD)) == _MISSING_HEAD.encode()
    except OSError:
        return False


def _require_space(base: Path, needed: int) -> None:
    free = shutil.disk_usage(base).free
    if needed > free:
        raise UserError(
            f"the copies need {needed / 1e9:.1f} GB and {printable(base)} has {free / 1e9:.1f} GB free; "
            "free some space, or use hard links (--link)"
        )


def _require_links(base: Path, samples: Mapping[int, str]) -> None:
    """Raises UserError where a link to one file of each device fails. Comparing device numbers is not enough: on an
    overlay, a folder and its files have different ones, and some systems forbid links to other users' files."""
    probe = base / f".fasttrain-link-{os.getpid()}"
    for source in samples.values():
        try:
            _hard_link(source, probe)
        except OSError as error:
            raise UserError(
                f"cannot make hard links to {printable(source)} in {printable(base)}: {error.strerror}; use --copy"
            ) from None
        finally:
            probe.unlink(missing_ok=True)


def _hard_link(source: str, target: Path) -> None:
    # link(2) would link to the symbolic link itself.
    os.link(os.path.realpath(source) if os.path.islink(source) else source, target)
