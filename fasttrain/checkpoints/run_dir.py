"""A run's folder: making or reopening it, locking it, and finding the checkpoint to resume from."""

import errno
import fcntl
import filecmp
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fasttrain.checkpoints import checkpoint, meta
from fasttrain.checkpoints.meta import META
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import is_inside, replacing
from fasttrain.utils.text import printable

RECIPE = "recipe.toml"
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that cannot lock


def open_run(out: Path, resume: str, recipe_toml: str) -> Path | None:
    """Make or reopen a run's folder, which is locked, and write its recipe.toml. Returns the checkpoint to resume from,
    or None.

    resume: `auto` (OUT/last if it exists), `never` (what an existing run wrote is moved to OUT.1, OUT.2, …) or a path:
    a checkpoint, or a run's folder, whose last one is taken. Raises UserError where the folder holds something other
    than a run.
    """
    if check_overwritable(out) and resume == "never":
        _move_away(out)
    else:
        _restore_links(out)
    start = None
    if resume == "auto":
        start = newest(out)
    elif resume != "never":
        start = checkpoint.find(Path(resume), first="last")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {printable(out)}: {error.strerror}") from None
    if start:
        abandon_later(out, start)
    if not (start and (out / RECIPE).exists()):
        write_recipe(out, recipe_toml)
    return start


def check_overwritable(out: Path) -> bool:
    """Whether a folder holds a run. Raises UserError where it holds something else, or a link where a run writes."""
    try:
        used = out.is_dir() and any(each.name != _LOCK for each in out.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {printable(out)}: {error.strerror}") from None
    if used and not (out / RECIPE).is_file() and not any((out / "checkpoints").glob("step-*")):
        raise UserError(f"{printable(out)} is not empty and holds no run; name another --out")
    for name in (RECIPE, "log.jsonl"):
        if (out / name).is_symlink():
            raise UserError(
                f"{printable(out / name)} is a link, and a run writes there; remove it or name another --out"
            )
    return used


def require_outside(out: Path, folder: Path) -> None:
    """Raises UserError where a run's folder is, or would be, in a folder of class folders: it would become a class."""
    if is_inside(out, folder):
        raise UserError(
            f"the run's folder {printable(out)} is inside the images' folder {printable(folder)}, where it would count "
            "as a class; name an --out outside it"
        )


def _move_away(out: Path) -> None:
    """Move all that a run wrote into a new folder next to `out`, which stays, since it holds the lock."""
    new = next(path for n in itertools.count(1) if not (path := out.with_name(f"{out.name}.{n}")).exists())
    try:
        new.mkdir()
        # The recipe is moved last: until then `out` still counts as a run.
        for each in sorted(out.iterdir(), key=lambda path: path.name == RECIPE):
            if each.name != _LOCK:
                each.rename(new / each.name)
    except OSError as error:
        raise UserError(
            f"cannot move the run in {printable(out)} to {printable(new)}: {error.strerror}; name another --out"
        ) from None
    print(f"the run that was in {printable(out)} is now in {printable(new)}", file=sys.stderr)


def _restore_links(out: Path) -> None:
    """Make `last` and `best` links again where they are folders, as in a copy that followed links."""
    with suppress(OSError):  # a full or read-only disk is reported at the first save
        for name in ("last", "best"):
            copy = out / name
            if copy.is_symlink() or not (copy / META).is_file():
                continue
            home = out / "checkpoints"
            original = next((each for each in home.glob("step-*") if _same_file(each / META, copy / META)), None)
            if original:
                aside = home / f".step-{name}"  # such names are removed at the next save
                copy.rename(aside)
                checkpoint.set_link(copy, original)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                with suppress(UserError):  # a damaged one stays as it is
                    moved = checkpoint.free_name(out, meta.read(copy)["step"])
                    home.mkdir(exist_ok=True)
                    copy.rename(moved)
                    checkpoint.set_link(copy, moved)


def _same_file(path: Path, other: Path) -> bool:
    return path.is_file() and filecmp.cmp(path, other, shallow=False)


def abandon_later(out: Path, start: Path) -> None:
    """Make `start` the last of a run's checkpoints. Later ones, or all if it belongs to another run, are abandoned:
    they are renamed, so that they are neither resumed from nor counted."""
    home = out / "checkpoints"
    inside = start.resolve().parent == home.resolve()
    best = checkpoint.read_link(out / "best")
    with suppress(OSError):  # a full or read-only disk is reported at the first save
        for each in sorted(home.glob("step-*")):
            if not inside or each.name > start.name:
                left = next(path for n in itertools.count() if not (path := home / f"left{n}-{each.name}").exists())
                was_best = each.resolve() == best
                each.rename(left)
                if was_best:
                    checkpoint.set_link(out / "best", left)
        if inside:
            checkpoint.set_link(out / "last", home / start.name)


def write_recipe(out: Path, recipe_toml: str) -> None:
    """Write a run's recipe into its folder. Raises RunError if it cannot be written."""
    with replacing(out / RECIPE) as temporary:
        temporary.write_text(recipe_toml, encoding="utf-8")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Make a run's folder, and lock it for this process by a file in it. Raises UserError where another process holds
    the lock; a dead one does not. On a file system that cannot lock, this is said and nothing is locked."""
    path, existed = out / _LOCK, out.exists()
    try:
        while True:
            out.mkdir(parents=True, exist_ok=True)
            try:
                # A folder from elsewhere may hold a link of this name, which must not be followed.
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # its holder removed the folder in the meantime
                continue
            file = os.fdopen(handle, "r+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            except BlockingIOError:
                file.seek(0)
                holder = file.read(64).decode(errors="replace").strip()
                file.close()
                raise UserError(
                    f"another run is writing to {printable(out)} ({printable(holder) or 'just started'}); "
                    "wait for it, stop it, or name another --out"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                print(f"{printable(out)} cannot be locked: start no other run with this folder", file=sys.stderr)
                break
            file.close()  # its holder removed it in the meantime
    except OSError as error:
        raise UserError(f"cannot write to {printable(out)}: {error.strerror}") from None
    with file:
        with suppress(OSError):  # a full disk; the holder's name is only a hint
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # a disk that has become read-only; a folder that holds a run
                path.unlink()
                if not existed:
                    out.rmdir()


def newest(out: Path) -> Path | None:
    """The newest intact checkpoint of a run: `last`, or an earlier one, which is reported on stderr; None if there is
    none yet. Damaged ones are renamed, so that they do not count as kept. Raises UserError if all are damaged."""
    candidates, damaged = _attempt(out), []
    for candidate in candidates:
        try:
            checkpoint.verify(candidate)
        except UserError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
            damaged.append(candidate)
            continue
        for each in damaged:
            with suppress(OSError):  # a read-only disk is reported elsewhere
                each.rename(each.with_name(f"damaged-{each.name}"))
        return candidate
    if candidates:
        raise UserError(f"no checkpoint in {printable(out / 'checkpoints')} is intact; start over with --resume never")
    return None


def newest_before_failures(out: Path) -> Path | None:
    """The newest intact checkpoint that was not taken while steps were failing, or None."""
    for candidate in _attempt(out):
        try:
            if checkpoint.verify(candidate)["streak"] == 0:
                return candidate
        except UserError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    return None


def _attempt(out: Path) -> list[Path]:
    """The checkpoints of the current attempt, newest first: up to `last`. Later ones belong to an abandoned attempt."""
    steps = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    last = checkpoint.read_link(out / "last").name
    return [each for each in steps if not last.startswith("step-") or each.name <= last]
