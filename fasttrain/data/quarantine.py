"""A quarantine: files moved aside in such a way that they can be moved back."""

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic, read_json_object
from fasttrain.utils.text import printable

_MANIFEST = "restore.json"


def quarantine(folder: str | Path, paths: Iterable[str], aside: str | Path) -> int:
    """Move files of a folder, by their paths in it, to `aside`/<path>; `restore` moves them back. Returns how many.

    `aside`/restore.json lists all moves before the first is made: a file is at `to` where that exists, otherwise it is
    still at `from`. Class folders stay. UserError where `aside` lies in the folder itself or holds other things, or
    where a file cannot be moved (it is then where it was).
    """
    require_place(folder, aside)
    root, place = os.path.realpath(folder), Path(os.path.realpath(aside))
    moves = {to: source for to, source in (_moves(place) or {}).items() if os.path.lexists(place / to)}
    planned: dict[str, str] = {}
    for path in sorted(set(paths)):
        source, to = os.path.join(root, path), path
        while to in moves:  # a file of the same name was moved before
            to += ".again"
        if os.path.lexists(source) and (os.path.islink(source) or not os.path.isdir(source)):
            planned[to] = source
    if not planned:
        return 0
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write_moves(place, moves | planned)
        for to, source in planned.items():
            if os.path.lexists(source):  # else it was reached twice, through a link
                _move(source, str(place / to))
    except OSError as error:
        why = f"{printable(error.filename or '')} {error.strerror or error}".strip()
        raise UserError(f"cannot move bad files to {printable(aside)}: {why}") from None
    return sum(os.path.lexists(place / to) for to in planned)


def require_place(folder: str | Path, aside: str | Path) -> None:
    """UserError unless `aside` can be a quarantine for files of `folder`."""
    root, place = os.path.realpath(folder), Path(os.path.realpath(aside))
    if f"{place}/".startswith(f"{root}/"):
        raise UserError(f"{printable(aside)} is inside {printable(root)}; name a folder elsewhere")
    if os.path.lexists(place) and not (place.is_dir() and (_moves(place) is not None or not any(place.iterdir()))):
        raise UserError(f"{printable(aside)} is neither empty nor a quarantine; name another folder")


def restore(aside: str | Path, folder: str | Path) -> int:
    """Move the files of a quarantine back and remove what is then empty. Returns how many went back.

    folder: the one that was checked; a quarantine may be anybody's, and nothing is written outside of it. UserError
    where there is no quarantine, where a file belongs elsewhere, or where files could not go back: nothing is
    overwritten, they stay.
    """
    place = Path(os.path.realpath(aside))
    moves = _moves(place)
    if moves is None:
        raise UserError(f"{printable(aside)} is no quarantine: {_MANIFEST} is missing or damaged")
    home = os.path.join(os.path.realpath(folder), "")
    for source in moves.values():
        if not os.path.join(os.path.realpath(os.path.dirname(source)), "").startswith(home):
            raise UserError(
                f"{printable(source)} is where a file of {printable(aside)} belongs, outside of {printable(folder)}"
            )
    count, stay = 0, {}
    for to, source in moves.items():
        held = str(place / to)
        try:
            _remove(_partial(held))  # of a move that was killed
            if not os.path.lexists(held):
                continue  # it never left, or is back already
            if not os.path.lexists(source):
                _move(held, source)
            elif not os.path.islink(held) and os.path.isfile(source) and filecmp.cmp(held, source, shallow=False):
                os.unlink(held)  # the move was cut short between the copy and the removal
            else:
                raise FileExistsError(errno.EEXIST, "the place is taken", source)
            count += 1
        except OSError as error:
            stay[to] = (source, error.strerror or str(error))
    try:
        if stay:
            _write_moves(place, {to: source for to, (source, _) in stay.items()})
        else:
            (place / _MANIFEST).unlink()
    except OSError as error:
        raise UserError(f"cannot write {printable(place / _MANIFEST)}: {error.strerror}") from None
    for inside, _, _ in os.walk(place, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(inside)
    if stay:
        source, why = next(iter(stay.values()))
        raise UserError(
            f"{len(stay)} files stay in {printable(aside)}; the first belongs at {printable(source)}: {why}"
        )
    return count


def _moves(place: Path) -> dict[str, str] | None:
    """The moves of a quarantine: {path relative to it: absolute path before}, or None where there are none to read."""
    try:
        rows = [(os.fsdecode(bytes.fromhex(row["to_bytes"])), row["from_bytes"])
                for row in read_json_object(place / _MANIFEST)["moves"]]  # fmt: skip
        moves = {to: os.fsdecode(bytes.fromhex(source)) for to, source in rows}
    except (KeyError, TypeError, ValueError):
        return None
    return moves if all(_is_possible(place, to, source) for to, source in moves.items()) else None


def _is_possible(place: Path, to: str, source: str) -> bool:
    """Whether `quarantine` can have made such a move: of a visible file, to the same path in the quarantine."""
    held, was = str(place / to), to
    while was.endswith(".again") and not source.endswith(f"/{was}"):
        was = was.removesuffix(".again")
    return (
        "\0" not in to + source
        and to != _MANIFEST
        and all(part and not part.startswith(".") for part in to.split("/"))
        and os.path.isabs(source)
        and os.path.normpath(source) == source
        and source.endswith(f"/{was}")
        and os.path.realpath(os.path.dirname(held)) == os.path.dirname(held)  # not through a link
        and (os.path.islink(held) or not os.path.isdir(held))
    )


def _write_moves(place: Path, moves: dict[str, str]) -> None:
    """Paths are there twice: escaped, to be read by people, and as their bytes in hexadecimal."""
    rows = [
        {"from": printable(source), "to": printable(to), "from_bytes": os.fsencode(source).hex(),
         "to_bytes": os.fsencode(to).hex()}
        for to, source in moves.items()
    ]  # fmt: skip
    with atomic(place / _MANIFEST, sync=True) as temporary:
        temporary.write_text(json.dumps({"moves": rows}, indent=1) + "\n", encoding="utf-8")


def _move(source: str, to: str) -> None:
    """Move one file, link or pipe: it is whole in one of both places at any time, and nothing is overwritten."""
    os.makedirs(os.path.dirname(to), exist_ok=True)
    if os.path.lexists(to):
        raise FileExistsError(errno.EEXIST, "the place is taken", to)
    try:
        os.rename(source, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = _partial(to)
        try:
            shutil.copy2(source, partial, follow_symlinks=False)
            os.rename(partial, to)
        finally:
            _remove(partial)
        os.unlink(source)


def _partial(to: str) -> str:
    """Where a copy grows. No file of that name is ever quarantined: it is hidden."""
    return os.path.join(os.path.dirname(to), f".{os.path.basename(to)}.partial")


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
