"""Writing files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasttrain.dataset import shown
from fasttrain.errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written takes its place at the end of the block, or is removed where
    that fails. Raises RunError in place of OSError."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise RunError(f"cannot write {shown(path)}: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)
