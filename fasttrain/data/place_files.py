"""Place a set of files by hard link or copy: all checked first, resumable, under its final name only once whole.

The work is done in `OUT.partial`, which becomes `OUT` in one rename. A marker file in it says which set it is, so that
nothing is ever written into a folder that holds anything else.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.files import atomic, opened, read_json_object
from fasttrain.utils.text import printable

_BLOCK = 4096  # bytes; what file systems commonly round a file's size up to
_MISSING_HEAD = "# source files that are missing\n"


@dataclass(frozen=True)
class Placed:
    """counts: files of the set by split. new: how many were placed by this call; an interrupted one left the others.
    made: False where the whole set was there already."""

    counts: dict[str, int]
    new: int
    made: bool


def finished(out: Path, mark: str, stamp: Mapping[str, object]) -> bool:
    """Whether `out` is this very set, whole.

    mark: the marker file's name. stamp: its content as JSON values, which tells this set from all others. Raises
    UserError where `out` or `out`.partial holds anything else.
    """
    out = Path(os.path.realpath(out))
    partial = _beside(out, "partial")
    if read_json_object(out / mark) == stamp:
        return True
    what = "is there already and is not the set that was asked for"
    try:
        if _holds_more(out, set()):
            raise UserError(f"{printable(out)} {what}; name another --out")
        # A first run may have been stopped while it wrote the marker.
        if _holds_more(partial, {mark}) and read_json_object(partial / mark) != stamp:
            raise UserError(f"{printable(partial)} {what}; remove it or name another --out")
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(error.filename)}: {error.strerror}") from None
    return False


def refuse_inside(out: Path, folder: Path) -> None:
    """UserError where `out` would lie in a folder that is read from."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"--out {printable(out)} lies inside {printable(folder)}, which is read from; name a folder outside"
        )


def place(
    out: Path,
    sources: Mapping[str, str],
    texts: Mapping[str, str],
    mark: str,
    stamp: Mapping[str, object],
    *,
    link: bool,
    progress: bool = True,
) -> int:
    """Make `out`, which `finished` has found to be neither there nor in the way; gives how many files were placed.

    sources: where each file comes from, by its path in `out`. texts: contents of further files, likewise. Files that
    an interrupted call left in `out`.partial are kept: those with the source's size (copies) or inode (hard links).

    Raises UserError, before anything is placed, where sources are missing (all listed in `out`.missing.txt), where
    the disk has too little room for the copies, or where hard links are impossible; RunError where it fails later.
    """
    from tqdm import tqdm

    out = Path(os.path.realpath(out))
    partial, missing = _beside(out, "partial"), _beside(out, "missing.txt")
    infos = _stat_all(list(sources.values()), progress)
    _refuse_missing(missing, infos)
    todo = [each for each in sources if not _is_placed(partial / each, infos[sources[each]], link)]
    base = next(each for each in out.parents if each.is_dir())
    if link:
        _require_links(base, {info.st_dev: source for source, info in infos.items() if info})
    else:
        sizes = [info.st_size for each in todo if (info := infos[sources[each]])]
        _require_room(base, sum(-(-size // _BLOCK) * _BLOCK for size in sizes))

    folders = sorted({(partial / each).parent for each in (*sources, *texts)})
    if any(os.path.realpath(folder) != str(folder) for folder in (partial, *folders)):
        raise UserError(f"{printable(partial)} is or holds a link to a folder; remove it or name another --out")
    temporary = partial / f".part-{os.getpid()}"
    at = ""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write(partial / mark, json.dumps(stamp, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {printable(partial)}: {error.strerror}") from None
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for at, text in texts.items():
            _write(partial / at, text)
        bar = tqdm(todo, desc="linking" if link else "copying", unit="file", disable=None if progress else True)
        for at in bar:
            with atomic(partial / at, temporary=temporary) as copy:
                if link:
                    _hard_link(sources[at], copy)
                else:
                    shutil.copyfile(sources[at], copy)
        stale = [path for path in partial.iterdir() if _is_temporary(path.name) or path.name.startswith(".part-")]
        for path in stale:
            path.unlink()
        os.rename(partial, out)  # fails, and changes nothing, where `out` has been filled in the meantime
        if _is_our_list(missing):
            missing.unlink()
    except OSError as error:
        if read_json_object(out / mark) == stamp:  # another process has made the same set in the meantime
            return 0
        raise RunError(
            f"cannot write {printable(partial / at)}: {error.strerror}; the same command goes on from there"
        ) from None
    return len(todo)


def _beside(out: Path, suffix: str) -> Path:
    return out.parent / f"{out.name}.{suffix}"


def _is_temporary(name: str) -> bool:
    """Whether it is the name of a file of `atomic`, left by a process that was killed."""
    return re.fullmatch(r"\.\w+\.\d+\.json", name) is not None


def _holds_more(folder: Path, than: set[str]) -> bool:
    """Whether there is something at `folder` that is not a folder with these names at most."""
    if not folder.is_dir():
        return os.path.lexists(folder)
    return any(name not in than and not _is_temporary(name) for name in os.listdir(folder))


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _stat_all(paths: list[str], progress: bool) -> dict[str, os.stat_result | None]:
    """Each path's data, links followed; None where it is not a file."""
    from tqdm import tqdm

    pool = ThreadPoolExecutor(16)  # a cold network file system answers many questions as fast as one
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
    found = _stat(str(target))
    if not found or not source:
        return False
    same = os.path.samestat(found, source)
    # A copy must not share the source's bytes, as a link of an earlier call would.
    return same if link else not same and found.st_size == source.st_size


def _refuse_missing(report: Path, infos: Mapping[str, os.stat_result | None]) -> None:
    absent = [path for path, info in infos.items() if info is None]
    if not absent:
        return
    some = ", ".join(map(printable, absent[:3])) + (", …" if absent[3:] else "")
    line = f"{len(absent)} of {len(infos)} source files are missing: {some}"
    if os.path.lexists(report) and not _is_our_list(report):
        raise UserError(f"{line}; {printable(report)} is in the way of the whole list")
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        text = _MISSING_HEAD + "".join(f"{path}\n" for path in absent)
        report.write_bytes(os.fsencode(text))
    except OSError as error:
        raise UserError(f"{line}; cannot write the whole list to {printable(report)}: {error.strerror}") from None
    raise UserError(f"{line}; all are listed in {printable(report)}")


def _is_our_list(path: Path) -> bool:
    try:
        if path.is_symlink():  # ours is none, and would be written through
            return False
        with opened(path) as file:
            return file.read(len(_MISSING_HEAD)) == _MISSING_HEAD.encode()
    except OSError:
        return False


def _require_room(base: Path, needed: int) -> None:
    free = shutil.disk_usage(base).free
    if needed > free:
        raise UserError(
            f"the copies need {needed / 1e9:.1f} GB and {printable(base)} has {free / 1e9:.1f} GB free; "
            "make room, or use hard links (--link)"
        )


def _require_links(base: Path, samples: Mapping[int, str]) -> None:
    """Try one link from each file system. Their numbers do not tell: overlays give folders another than their files,
    and some systems forbid links to files of other users."""
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
    # link(2) would link to a symbolic link itself.
    os.link(os.path.realpath(source) if os.path.islink(source) else source, target)
