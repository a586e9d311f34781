"""A run's folder: making or reopening it, locking it, and finding the checkpoint to resume from."""

import fcntl
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fasttrain.checkpoints import checkpoint
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import replacing
from fasttrain.utils.text import printable

RECIPE = "recipe.toml"


def open_run(out: Path, resume: str, recipe_toml: str) -> Path | None:
    """Make or reopen a run's folder and write its recipe.toml. Returns the checkpoint to resume from, or None.

    resume: `auto` (OUT/last if it exists), `never` (an existing run's folder is renamed) or a path. Raises UserError
    where the folder holds something other than a run.
    """
    if check_overwritable(out) and resume == "never":
        renamed = next(path for n in itertools.count(1) if not (path := out.with_name(f"{out.name}.{n}")).exists())
        try:
            out.rename(renamed)
        except OSError as error:
            raise UserError(f"cannot rename {printable(out)}: {error.strerror}; name another --out") from None
        print(f"the run that was in {printable(out)} is now in {printable(renamed)}", file=sys.stderr)
    start = None
    if resume == "auto":
        start = newest(out)
    elif resume != "never":
        start = checkpoint.find(Path(resume))
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
    used = out.is_dir() and any(out.iterdir())
    if used and not (out / RECIPE).is_file():
        raise UserError(f"{printable(out)} is not empty and holds no run; name another --out")
    for name in (RECIPE, "log.jsonl"):
        if (out / name).is_symlink():
            raise UserError(
                f"{printable(out / name)} is a link, and a run writes there; remove it or name another --out"
            )
    return used


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
    """Lock a run's folder for this process. Raises UserError where another process holds the lock; a dead one does
    not."""
    out = Path(os.path.realpath(out))  # one lock, by whatever name the folder is called
    path = out.parent / f".{out.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("ab+", buffering=0)
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
            file.close()  # its holder removed it in the meantime
    except OSError as error:
        raise UserError(f"cannot write to {printable(out.parent)}: {error.strerror}") from None
    with file:
        with suppress(OSError):  # a full disk; the holder's name is only a hint
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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
