"""Containers of images: what a folder's files are to the pipelines, for files that hold many images."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Store(Protocol):
    """The content of N images, by their numbers in the index."""

    @property
    def decoded(self) -> bool:
        """Whether the content is pixels; if not, it is that of an image file."""

    def content(self, number: int) -> NDArray[np.uint8]:
        """An image: uint8 [H, W, 3] where `decoded`, else the bytes of a file, uint8 [n]. It may be a view of a memory
        map: only what is used of it is read."""


class Merged:
    """Several stores one after another. None: files, at `paths`."""

    def __init__(self, stores: Sequence[Store | None], paths: Sequence[Sequence[str]], decoded: bool) -> None:
        self.stores, self.paths, self.decoded = stores, paths, decoded
        self.starts = np.cumsum([0, *map(len, paths)])

    def content(self, number: int) -> NDArray[np.uint8]:
        part = int(np.searchsorted(self.starts, number, "right")) - 1
        store, own = self.stores[part], number - int(self.starts[part])
        return np.fromfile(self.paths[part][own], np.uint8) if store is None else store.content(own)
