"""Containers of images: what a folder's files are to the pipelines, for files that hold many images."""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray


class Store(Protocol):
    """The content of N images, by their numbers in the index."""

    @property
    def decoded(self) -> bool:
        """Whether the content is pixels; if not, it is that of an image file."""

    @property
    def files(self) -> Sequence[str]:
        """The paths of the files that are read."""

    def length(self, number: int) -> int:
        """The bytes of an image's content, which is not read."""

    def content(self, number: int) -> NDArray[np.uint8]:
        """An image: uint8 [H, W, 3] where `decoded`, else the bytes of a file, uint8 [n]. It may be a view of a memory
        map: only what is used of it is read."""


class Selected:
    """Some images of a store. numbers: int64 [n], theirs in it."""

    def __init__(self, store: Store, numbers: NDArray[np.int64]) -> None:
        self.store, self.numbers, self.decoded = store, numbers, store.decoded

    @property
    def files(self) -> Sequence[str]:
        return self.store.files

    def length(self, number: int) -> int:
        return self.store.length(int(self.numbers[number]))

    def content(self, number: int) -> NDArray[np.uint8]:
        return self.store.content(int(self.numbers[number]))


class Merged:
    """Several stores one after another. None: files, at `paths`."""

    def __init__(self, stores: Sequence[Store | None], paths: Sequence[Sequence[str]], decoded: bool) -> None:
        self.stores, self.paths, self.decoded = stores, paths, decoded
        self.starts = np.cumsum([0, *map(len, paths)])

    @property
    def files(self) -> list[str]:
        parts = zip(self.stores, self.paths, strict=True)
        return [path for store, paths in parts for path in (paths if store is None else store.files)]

    def length(self, number: int) -> int:
        store, path, own = self._part(number)
        return os.path.getsize(path) if store is None else store.length(own)

    def content(self, number: int) -> NDArray[np.uint8]:
        store, path, own = self._part(number)
        return np.fromfile(path, np.uint8) if store is None else store.content(own)

    def _part(self, number: int) -> tuple[Store | None, str, int]:
        """The store of an image, its path, and its number in the store."""
        part = int(np.searchsorted(self.starts, number, "right")) - 1
        own = number - int(self.starts[part])
        return self.stores[part], self.paths[part][own], own


def stored_file(length: int, read: Callable[[int, int], bytes]) -> BinaryIO:
    """An image file in a store, of which only the parts that are needed are read. length: in bytes. read: gives the
    content, from a start on and with a length."""
    return io.BufferedReader(_StoredFile(length, read))


class _StoredFile(io.RawIOBase):
    def __init__(self, length: int, read: Callable[[int, int], bytes]) -> None:
        self.length, self.read_part, self.position = length, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.length - self.position))
        buffer[:length] = self.read_part(self.position, length)
        self.position += length
        return length
