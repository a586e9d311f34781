"""A quarantine: a folder that bad files are moved to, and from which they can be moved back."""

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


def quarantine(folder: str | Path, paths: Iterable[str], quarantine_folder: str | Path) -> int:
    """Move files of a folder, by their paths in it, to `quarantine_folder`/<path>. Returns how many were moved.

    `restore` moves them back. `quarantine_folder`/restore.json lists all moves before the first one: a file is at `to`
    if that exists, else still at `from`. Class folders stay. Raises UserError where `quarantine_folder` is inside the
    folder or holds anything else, or where a file cannot be moved (it then stays where it was).
    """
    check_quarantine_folder(folder, quarantine_folder)
    root, target = os.path.realpath(folder), Path(os.path.realpath(quarantine_folder))
    moves = {to: source for to, source in (_read_moves(target) or {}).items() if os.path.lexists(target / to)}
    planned: dict[str, str] = {}
    for path in sorted(set(paths)):
        source, to = os.path.join(root, path), path
        while to in moves:  # a file of the same name was moved earlier
            to += ".again"
        if os.path.lexists(source) and (os.path.islink(source) or not os.path.isdir(source)):
            planned[to] = source
    if not planned:
        return 0
    try:
        target.mkdir(parents=True, exist_ok=True)
        _write_moves(target, moves | planned)
        for to, source in planned.items():
            if os.path.lexists(source):  # False if two paths lead to one file, through a link
                _move(source, str(target / to))
    except OSError as error:
        reason = f"{printable(error.filename or '')} {error.strerror or error}".strip()
        raise UserError(f"cannot move bad files to {printable(quarantine_folder)}: {reason}") from None
    return sum(os.path.lexists(target / to) for to in planned)


def check_quarantine_folder(folder: str | Path, quarantine_folder: str | Path) -> None:
    """Raises UserError where files of `folder` cannot be moved to `quarantine_folder`: it is inside `folder`, or is
    neither new, nor empty, nor a quarantine."""
    root, target = os.path.realpath(folder), Path(os.path.realpath(quarantine_folder))
    if f"{target}/".startswith(f"{root}/"):
        raise UserError(f"{printable(quarantine_folder)} is inside {printable(root)}; name a folder outside it")
    usable = target.is_dir() and (_read_moves(target) is not None or not any(target.iterdir()))
    if os.path.lexists(target) and not usable:
        raise UserError(f"{printable(quarantine_folder)} is neither empty nor a quarantine; name another folder")


def restore(quarantine_folder: str | Path, folder: str | Path) -> int:
    """Move the files of a quarantine back, and remove folders that are then empty. Returns how many were moved.

    folder: the one that was checked. A quarantine is untrusted, so nothing outside this folder is written. Nothing is
    overwritten. Raises UserError where there is no quarantine, a file belongs outside the folder, or some files cannot
    be moved back; those stay in the quarantine.
    """
    root = Path(os.path.realpath(quarantine_folder))
    moves = _read_moves(root)
    if moves is None:
        raise UserError(f"{printable(quarantine_folder)} is not a quarantine: {_MANIFEST} is missing or damaged")
    allowed = os.path.join(os.path.realpath(folder), "")
    for source in moves.values():
        if not os.path.join(os.path.realpath(os.path.dirname(source)), "").startswith(allowed):
            raise UserError(
                f"{printable(quarantine_folder)} has a file that belongs at {printable(source)}, which is not in "
                f"{printable(folder)}; name the folder that was checked"
            )
    count, failed = 0, {}
    for to, source in moves.items():
        quarantined = str(root / to)
        try:
            _remove(_partial_path(quarantined))  # left by a move that was killed
            if not os.path.lexists(quarantined):
                continue  # it was never moved, or was moved back already
            if not os.path.lexists(source):
                _move(quarantined, source)
            elif (
                not os.path.islink(quarantined)
                and os.path.isfile(source)
                and filecmp.cmp(quarantined, source, shallow=False)
            ):
                os.unlink(quarantined)  # the move was interrupted between the copy and the removal
            else:
                raise FileExistsError(errno.EEXIST, "another file exists there", source)
            count += 1
        except OSError as error:
            failed[to] = (source, error.strerror or str(error))
    try:
        if failed:
            _write_moves(root, {to: source for to, (source, _) in failed.items()})
        else:
            (root / _MANIFEST).unlink()
    except OSError as error:
        raise UserError(f"cannot write {printable(root / _MANIFEST)}: {error.strerror}") from None
    for subfolder, _, _ in os.walk(root, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(subfolder)
    if failed:
        source, reason = next(iter(failed.values()))
        raise UserError(
            f"{len(failed)} files stay in {printable(quarantine_folder)}; the first belongs at {printable(source)}: "
            f"{reason}"
        )
    return count


def _read_moves(folder: Path) -> dict[str, str] | None:
    """A quarantine's moves, {path in it: absolute path before}; None where restore.json is missing or damaged."""
    try:
        rows = [(os.fsdecode(bytes.fromhex(row["to_bytes"])), row["from_bytes"])
                for row in read_json_object(folder / _MANIFEST)["moves"]]  # fmt: skip
        moves = {to: os.fsdecode(bytes.fromhex(source)) for to, source in rows}
    except (KeyError, TypeError, ValueError):
        return None
    return moves if all(_is_possible(folder, to, source) for to, source in moves.items()) else None


def _is_possible(folder: Path, to: str, source: str) -> bool:
    """Whether `quarantine` can have made this move: of a visible file, to the same path in the quarantine."""
    quarantined, original = str(folder / to), to
    while original.endswith(".again") and not source.endswith(f"/{original}"):
        original = original.removesuffix(".again")
    return (
        "\0" not in to + source
        and to != _MANIFEST
        and all(part and not part.startswith(".") for part in to.split("/"))
        and os.path.isabs(source)
        and os.path.normpath(source) == source
        and source.endswith(f"/{original}")
        and os.path.realpath(os.path.dirname(quarantined)) == os.path.dirname(quarantined)  # not through a link
        and (os.path.islink(quarantined) or not os.path.isdir(quarantined))
    )


def _write_moves(folder: Path, moves: dict[str, str]) -> None:
    """Write restore.json. It has each path twice: escaped, for people, and as its bytes in hexadecimal."""
    rows = [
        {"from": printable(source), "to": printable(to), "from_bytes": os.fsencode(source).hex(),
         "to_bytes": os.fsencode(to).hex()}
        for to, source in moves.items()
    ]  # fmt: skip
    with atomic(folder / _MANIFEST, sync=True) as temporary:
        temporary.write_text(json.dumps({"moves": rows}, indent=1) + "\n", encoding="utf-8")


def _move(source: str, to: str) -> None:
    """Move one file, link or pipe. It is complete in one of the two places at any time; nothing is overwritten."""
    os.makedirs(os.path.dirname(to), exist_ok=True)
    if os.path.lexists(to):
        raise FileExistsError(errno.EEXIST, "another file exists there", to)
    try:
        os.rename(source, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = _partial_path(to)
        try:
            shutil.copy2(source, partial, follow_symlinks=False)
            os.rename(partial, to)
        finally:
            _remove(partial)
        os.unlink(source)


def _partial_path(to: str) -> str:
    """Where a copy is written. The name is hidden, and hidden files are never quarantined."""
    return os.path.join(os.path.dirname(to), f".{os.path.basename(to)}.partial")


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
