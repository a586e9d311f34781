"""Reads a run's files once before it starts, so that a cold disk does not slow its first epoch."""

import os
import sys
from collections.abc import Sequence

from fasttrain.data.index import Index
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened
from fasttrain.utils.text import printable

_BLOCK = 8 << 20  # bytes


def preload(indices: Sequence[Index], progress: bool = True) -> int:
    """Read all files of these indices into the operating system's cache. Returns the number of bytes.

    Says on stderr where they are larger than the memory that is available. Raises UserError where a file cannot be
    read.
    """
    from tqdm import tqdm

    paths = list(dict.fromkeys(path for index in indices for path in index.files))
    try:
        total = sum(os.path.getsize(path) for path in paths)
        if total > (memory := available_memory()):
            print(
                f"preloading {total / 1e9:.1f} GB with {memory / 1e9:.1f} GB of memory available: what was read first "
                "may be read again",
                file=sys.stderr,
            )
        # `disable=None` hides the bar where stderr is not a terminal.
        bar = tqdm(total=total, desc="preloading", unit="B", unit_scale=True, disable=None if progress else True)
        done = 0
        with bar:
            for path in paths:
                with opened(path) as file:
                    while block := file.read(_BLOCK):
                        done += len(block)
                        bar.update(len(block))
        return done
    except OSError as error:
        raise UserError(f"cannot read {printable(error.filename or 'an image')}: {error.strerror}") from None


def available_memory() -> int:
    """The bytes of memory that are free or can be freed."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
