"""Writing files atomically, and reading untrusted ones."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fasttrain.utils.errors import RunError
from fasttrain.utils.text import printable

_JSON_BYTES = 16 << 20  # at most; parsed, it takes some twenty times as much memory


def opened(path: str | Path) -> BinaryIO:
    """A file, open for reading, links followed. OSError where it is a folder, a pipe or a device, at once."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device", str(path))
    return file


def read_text(path: str | Path, most: int) -> str:
    """A file's text. OSError like `opened`, or where it has more than `most` bytes; ValueError where it is not
    UTF-8."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 10} KiB", str(path))
    return content.decode("utf-8")


def read_json(path: str | Path, most: int = _JSON_BYTES) -> Any:
    """What a file of JSON says. OSError like `read_text`; ValueError where it is no JSON, or nested too deeply."""
    try:
        return json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written takes its place at the end of the block, or is removed where
    that fails. Raises RunError in place of OSError."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise RunError(f"cannot write {printable(path)}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # a disk that may only be read says so here as well
            aside.unlink(missing_ok=True)
