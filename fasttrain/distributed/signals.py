"""SIGTERM and SIGUSR1, with which schedulers stop a process, and SIGHUP of a terminal that closes: recorded, for a run
to ask about."""

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_received = [""]
_handlers_before: dict[int, Any] = {}


def install() -> bool:
    """From now on these signals are recorded and do not end the process; ignored ones stay ignored. The handler raises
    nothing, because an exception out of a handler can be lost, for example in an import. Returns whether this is new:
    False where the signals were recorded already."""
    installed = bool(_handlers_before)
    if threading.current_thread() is threading.main_thread():  # only this thread can set handlers
        for number in STOPPING:
            if signal.getsignal(number) == signal.SIG_IGN:  # as nohup does for SIGHUP
                continue
            before = signal.signal(number, _record)
            _handlers_before.setdefault(number, before)
    return not installed


def _record(number: int, _: FrameType | None) -> None:
    _received[0] = signal.Signals(number).name


def request(name: str) -> None:
    """Record a request to stop that is no signal, by its name. Any thread may call this."""
    _received[0] = name


def received() -> str:
    """The name of the last signal, or request, that was received, or an empty string."""
    return _received[0]


def restore() -> None:
    """Restore the handlers from before `install`, and forget what was received."""
    _received[0] = ""
    if threading.current_thread() is threading.main_thread():
        for number in list(_handlers_before):
            signal.signal(number, _handlers_before.pop(number))
