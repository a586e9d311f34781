"""What image decoders write to stderr: they repeat a warning for every decode of a file, without naming it.

`shown_once` starts this file as a program that stands between file descriptor 2 and stderr. A process of its own passes
on what other libraries say even when they end the run's process.
"""

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

_COLOR = re.compile(rb"\x1b\[[0-9;]*m")
# Threads write parts of lines, so that a message may begin within a line.
_MESSAGE = re.compile(
    rb"(?=\[(?:ERROR|WARNING)\].*\[\w+_(?:decoder|parser)\]"  # nvImageCodec
    rb"|\[ ?(?:ERROR|WARN):\d+@[\d.]+\] global \w+\.cpp"  # OpenCV, DALI's last resort
    rb"|TIFF[A-Z]\w+: |: \w+ compression support is not configured"
    rb"|libpng (?:warning|error): "
    rb"|Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Unsupported marker type"
    rb"|Bogus [A-Z]?\w+ |Input file read error|ZIPDecode: |JPEGLib: |: Using code not yet in table)"
)
_CONTINUED = re.compile(rb"> |\s*$")  # of OpenCV, and ends of lines
_ONCE = b" (shown once; `fasttrain data check` names such files)"


class Messages:
    """The decoders' messages that were shown."""

    def __init__(self, pipe: BinaryIO | None = None) -> None:
        self._pipe, self._rest = pipe, b""

    def new(self) -> list[str]:
        """The messages that were shown since the last call, one of each kind. Does not wait."""
        with suppress(OSError):  # nothing to read
            while self._pipe and (block := self._pipe.read(65536)):
                self._rest += block
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode(errors="replace") for line in lines]


@contextmanager
def shown_once() -> Iterator[Messages]:
    """Within this context, each kind of message that decoders write to file descriptor 2 is shown once. Python's own
    stderr goes where it went before. Does nothing where stderr is not file descriptor 2."""
    try:
        own = sys.stderr.fileno() == 2
    except (AttributeError, OSError, ValueError):
        own = False
    if not own:
        yield Messages()
        return
    sys.stderr.flush()
    real = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)  # not 1, where stdout is closed
    # -I and -S: it needs nothing but the standard library, and starts in about 10 ms.
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    command = [sys.executable, "-I", "-S", __file__, str(writing)]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=real, start_new_session=True, pass_fds=[writing]
        )
    except (OSError, TypeError):  # no more processes, or no path of Python: nothing is filtered
        for descriptor in (real, reading, writing):
            os.close(descriptor)
        yield Messages()
        return
    os.close(writing)
    assert process.stdin is not None
    before = sys.stderr
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()
    own_stderr = os.fdopen(real, "w", buffering=1, encoding=before.encoding, errors="backslashreplace")
    sys.stderr = own_stderr
    pipe = os.fdopen(reading, "rb", buffering=0)
    try:
        yield Messages(pipe)
    finally:
        pipe.close()
        with suppress(OSError, ValueError):
            own_stderr.flush()
        os.dup2(real, 2)
        with suppress(OSError, ValueError):
            own_stderr.close()
        sys.stderr = before
        with suppress(subprocess.TimeoutExpired):  # a child process may still hold the pipe
            process.wait(1)


def kinds(text: bytes) -> dict[bytes, bytes]:
    """The decoders' messages in a text, by their kind: a message without its numbers."""
    _, *messages = _MESSAGE.split(_COLOR.sub(b"", text))
    return {re.sub(rb"[\d.]+|0x[0-9a-f]+", b"", each).strip(): each.strip() for each in messages}


def main() -> None:
    """Copy stdin to stdout, without what decoders repeat. The file descriptor that is this program's argument gets the
    first message of each kind."""
    report = int(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends when its input does
    seen: set[bytes] = set()
    dropping = False
    for line in sys.stdin.buffer:
        if _MESSAGE.search(line):
            before = _MESSAGE.split(_COLOR.sub(b"", line))[0]
            new = {kind: text for kind, text in kinds(line).items() if kind not in seen}
            lines = [text + _ONCE + b"\n" for text in new.values()]
            seen |= new.keys()
            for text in new.values():
                with suppress(OSError):  # nobody reads it any more
                    os.write(report, text + b"\n")
            output = (before.rstrip() + b"\n" if before.strip() else b"") + b"".join(lines)
            dropping = True
        elif dropping and _CONTINUED.match(line):
            continue
        else:
            output, dropping = line, False
        with suppress(OSError):  # whoever writes to the pipe must not wait for a terminal that is gone
            os.write(1, output)


if __name__ == "__main__":
    main()
