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


@contextmanager
def shown_once() -> Iterator[None]:
    """Within this context, each kind of message that decoders write to file descriptor 2 is shown once. Python's own
    stderr goes where it went before. Does nothing where stderr is not file descriptor 2."""
    try:
        own = sys.stderr.fileno() == 2
    except (AttributeError, OSError, ValueError):
        own = False
    if not own:
        yield
        return
    sys.stderr.flush()
    real = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)  # not 1, where stdout is closed
    # -I and -S: it needs nothing but the standard library, and starts in about 10 ms.
    command = [sys.executable, "-I", "-S", __file__]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=real, start_new_session=True)
    except (OSError, TypeError):  # no more processes, or no path of Python: nothing is filtered
        os.close(real)
        yield
        return
    assert process.stdin is not None
    before = sys.stderr
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()
    own_stderr = os.fdopen(real, "w", buffering=1, encoding=before.encoding, errors="backslashreplace")
    sys.stderr = own_stderr
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            own_stderr.flush()
        os.dup2(real, 2)
        with suppress(OSError, ValueError):
            own_stderr.close()
        sys.stderr = before
        with suppress(subprocess.TimeoutExpired):  # a child process may still hold the pipe
            process.wait(1)


def main() -> None:
    """Copy stdin to stdout, without what decoders repeat."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends when its input does
    seen: set[bytes] = set()
    dropping = False
    for line in sys.stdin.buffer:
        if _MESSAGE.search(line):
            before, *messages = _MESSAGE.split(_COLOR.sub(b"", line))
            new = {re.sub(rb"[\d.]+|0x[0-9a-f]+", b"", text).strip(): text for text in messages}
            lines = [text.rstrip() + _ONCE + b"\n" for kind, text in new.items() if kind not in seen]
            seen |= new.keys()
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
