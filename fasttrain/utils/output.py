"""Output that must not end a run: a terminal that goes away, a full disk, a closed stream."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _TolerantStream:
    """A text stream whose writes never fail: after the first error, everything goes to /dev/null."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._discard()

    def _discard(self) -> None:
        """Point the file descriptor to /dev/null, so that what is buffered, and other libraries' output, goes there."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard_output() -> None:
    """Let what is still to be written to stdout go to /dev/null."""
    _TolerantStream(sys.stdout)._discard()


@contextmanager
def tolerant_output(*, stdout: bool = True) -> Iterator[None]:
    """Within this context, errors of stderr and, if `stdout`, of stdout are ignored; streams that are closed are opened
    to /dev/null."""
    before = sys.stdout, sys.stderr
    for descriptor, name in ((1, "stdout"), (2, "stderr")) if stdout else ((2, "stderr"),):
        if getattr(sys, name) is None:  # Python found it closed, and a file could get its descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            setattr(sys, name, os.fdopen(descriptor, "w"))
        setattr(sys, name, _TolerantStream(getattr(sys, name)))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr) if stdout else (sys.stderr,):
            stream.flush()
        sys.stdout, sys.stderr = (old or new for old, new in zip(before, (sys.stdout, sys.stderr), strict=True))
