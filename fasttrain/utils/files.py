"""Writing files atomically, and reading untrusted ones."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.text import printable

_JSON_BYTES = 16 << 20  # at most; parsed JSON takes about twenty times as much memory


def opened(path: str | Path) -> BinaryIO:
    """Open a file for reading, following links. Raises OSError at once where it is a folder, a pipe or a device."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device", str(path))
    return file


def read_text(path: str | Path, most: int) -> str:
    """A file's text, without a byte order mark. Raises OSError like `opened`, or where it has more than `most` bytes;
    ValueError where it is not UTF-8."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 10} KiB", str(path))
    return content.decode("utf-8-sig")


def read_json(path: str | Path, most: int = _JSON_BYTES) -> Any:
    """A JSON file's content. Raises OSError like `read_text`; ValueError where it is not JSON, or nested too deeply."""
    try:
        return json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where the file is missing, cannot be read or holds something else."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def atomic(path: Path, *, temporary: Path | None = None, sync: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or link to, which replaces `path` at the end of the block. Where the block
    fails, `path` stays as it is and the temporary file is removed. Raises OSError.

    temporary: its path, on the same disk; by default in the same folder. sync: wait until the content is on the disk.
    """
    temporary = temporary or path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)  # left by a process that was killed, or a link that must not be followed
        yield temporary
        if sync:
            fsync(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a read-only disk refuses this too
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`atomic`, which raises RunError instead of OSError."""
    try:
        with atomic(path) as temporary:
            yield temporary
    except OSError as error:
        raise RunError(f"cannot write {printable(path)}: {error.strerror or error}") from None


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is, or would be, a folder or in it, by whatever names the two are called."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def require_writable_folder(path: Path) -> None:
    """Raises UserError where the folder of a file to write does not exist or takes no new files."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {printable(path)}: there is no folder {printable(path.parent)}")
    probe = path.with_name(f".{path.stem}.{os.getpid()}")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror}") from None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `folder` at the end of the block; that must not exist, or be empty.
    Where the block fails, the temporary folder is removed. Raises OSError."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same number
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk. Some file systems cannot do so for folders; then
    this does nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)
