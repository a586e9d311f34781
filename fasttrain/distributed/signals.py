"""SIGTERM and SIGUSR1, by which a scheduler takes a machine away: recorded, for a run to ask about."""

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_noted = [""]
_before: dict[int, Any] = {}


def install() -> None:
    """From now on these signals no longer end the process. Imports take seconds, and an exception out of a signal's
    handler can be lost in one; so nothing is raised."""
    if threading.current_thread() is threading.main_thread():  # signals reach no other
        for number in STOPPING:
            before = signal.signal(number, _note)
            _before.setdefault(number, before)


def _note(number: int, _: FrameType | None) -> None:
    _noted[0] = signal.Signals(number).name


def received() -> str:
    """The name of the last one that came, or nothing."""
    return _noted[0]


def restore() -> None:
    """They do again what they did before, and none has come."""
    _noted[0] = ""
    if threading.current_thread() is threading.main_thread():
        for number in list(_before):
            signal.signal(number, _before.pop(number))
