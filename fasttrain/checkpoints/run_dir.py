"""A run's folder: made or reopened, kept to one process, and the checkpoint in it to go on from."""

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
    """Make or reopen a run's folder and write its recipe.toml; gives the checkpoint to go on from, or None.

    resume: `auto` (OUT/last where there is one), `never` (a run that is there is moved aside) or a path. UserError
    where the folder holds something else than a run.
    """
    if check_overwritable(out) and resume == "never":
        aside = next(each for n in itertools.count(1) if not (each := out.with_name(f"{out.name}.{n}")).exists())
        try:
            out.rename(aside)
        except OSError as error:
            raise UserError(f"cannot move {printable(out)} aside: {error.strerror}; name another --out") from None
        print(f"the run that was in {printable(out)} is now {printable(aside)}", file=sys.stderr)
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
    """Whether a folder holds a run. UserError where it holds something else, or a link in place of what a run
    writes."""
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
    """Make `start` the last of a run's checkpoints. Those after it, or all where it is another run's, belong to an
    attempt that is left: they are renamed, so that they are neither resumed from nor counted."""
    home = out / "checkpoints"
    inside = start.resolve().parent == home.resolve()
    best = checkpoint.read_link(out / "best")
    with suppress(OSError):  # a disk that does not take it is reported at the first save
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
    """Keep a run's recipe in its folder. RunError where the disk does not take it."""
    with replacing(out / RECIPE) as aside:
        aside.write_text(recipe_toml, encoding="utf-8")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a run's folder to one process. UserError where another has it; one that has died does not."""
    out = Path(os.path.realpath(out))  # the same by whatever name
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
            file.close()  # its holder has removed it in the meantime
    except OSError as error:
        raise UserError(f"cannot write to {printable(out.parent)}: {error.strerror}") from None
    with file:
        with suppress(OSError):  # a full disk; who has it is only a hint
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run: `last`, or, with a word on stderr, one before it. None where there is
    none yet; UserError where there are only damaged ones. Where there is a whole one, damaged ones are renamed, so
    that they do not count as kept ones."""
    candidates, damaged = _course(out), []
    for candidate in candidates:
        try:
            checkpoint.verify(candidate)
        except UserError as error:
            print(f"{error}; looking at the one before", file=sys.stderr)
            damaged.append(candidate)
            continue
        for each in damaged:
            with suppress(OSError):  # a disk that is read-only is reported elsewhere
                each.rename(each.with_name(f"damaged-{each.name}"))
        return candidate
    if candidates:
        raise UserError(f"no checkpoint in {printable(out / 'checkpoints')} is whole; start over with --resume never")
    return None


def newest_before_failures(out: Path) -> Path | None:
    """The newest whole checkpoint that was not taken while steps were failing, or None where there is none."""
    for candidate in _course(out):
        try:
            if checkpoint.verify(candidate)["streak"] == 0:
                return candidate
        except UserError as error:
            print(f"{error}; looking at the one before", file=sys.stderr)
    return None


def _course(out: Path) -> list[Path]:
    """The checkpoints up to `last`, newest first; what comes after it belongs to an attempt that the run has left."""
    steps = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    last = checkpoint.read_link(out / "last").name
    return [each for each in steps if not last.startswith("step-") or each.name <= last]
