"""Finds a file for each kind of message of a decoder: the message itself does not name one."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.pool import AsyncResult, Pool
from types import TracebackType

from fasttrain.data.decode_check import first_to_say
from fasttrain.utils.decoder_messages import Messages
from fasttrain.utils.text import printable

_SECONDS = 60.0  # at most, to look for a file


class MessageNames:
    """Looks for the files in a process of its own, while others work. say: gets a line for each file that is found."""

    def __init__(self, messages: Messages, say: Callable[[str], object]) -> None:
        self.messages, self.say = messages, say
        self.pool: Pool | None = None
        self.searches: list[tuple[str, AsyncResult[str]]] = []

    def look(self, paths: Callable[[], Sequence[str]]) -> None:
        """Say what was found, and look for the files of new messages. paths: gives the candidates, likely ones
        first."""
        for text in self.messages.new():
            if self.pool is None:
                # Ctrl-C interrupts all processes of a terminal; the main process ends this one.
                ignore = (signal.SIGINT, signal.SIG_IGN)
                self.pool = multiprocessing.get_context("spawn").Pool(1, signal.signal, ignore)
            candidates = list(dict.fromkeys(paths()))
            self.searches.append((text, self.pool.apply_async(first_to_say, (text, candidates, _SECONDS))))
        for search in [each for each in self.searches if each[1].ready()]:
            self.searches.remove(search)
            self._report(*search)

    def _report(self, text: str, search: "AsyncResult[str]") -> None:
        with suppress(Exception):  # the decoder crashed on a file, or took too long
            if path := search.get(_SECONDS):
                self.say(f"{printable(path)}: {printable(text)}")

    def __enter__(self) -> "MessageNames":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for searches that have begun, unless the body failed."""
        for search in self.searches if kind is None else ():
            self._report(*search)
        if self.pool is not None:
            self.pool.terminate()
