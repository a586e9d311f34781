"""Small pictures for a page, as data URIs. An image that is used again refers to the first one."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.decode import decode_batch
from fasttrain.data.index import Index
from fasttrain.report.markup import Html, element
from fasttrain.utils.errors import CommandError

SIDE = 112  # pixels of the longer side, at most
QUALITY = 78
_BATCH = 8  # images that are decoded at once; each may have many pixels


def jpeg_uri(pixels: NDArray[np.uint8], side: int = SIDE) -> tuple[str, int, int]:
    """Pixels, uint8 [H, W, 3], as the data URI of a JPEG whose longer side is at most `side`; its width and height."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size


class Thumbnails:
    """The small pictures of a page. Numbers are those of an index's images."""

    def __init__(self, index: Index | None) -> None:
        self.index = index
        self.pictures: dict[int, tuple[str, int, int] | None] = {}
        self.used: set[int] = set()

    def load(self, numbers: Sequence[int]) -> None:
        """Decode images. Those that cannot be decoded get a placeholder."""
        missing = list(dict.fromkeys(number for number in numbers if number not in self.pictures))
        for start in range(0, len(missing), _BATCH):
            some = missing[start : start + _BATCH]
            for number, pixels in zip(some, self._pixels(some), strict=True):
                self.pictures[number] = None if pixels is None else jpeg_uri(pixels)

    def _pixels(self, numbers: Sequence[int]) -> list[NDArray[np.uint8] | None]:
        contents = [self._content(number) for number in numbers]
        if self.index is None or not self.index.encoded:
            return contents
        files = [content for content in contents if content is not None]
        decoded: list[NDArray[np.uint8] | None] = [*decode_batch(files)] if files else []
        if not decoded:  # one by one; a copy, since DALI's memory is used again
            decoded = [next((found.copy() for found in decode_batch([file])), None) for file in files]
        found = iter(decoded)
        return [None if content is None else next(found) for content in contents]

    def _content(self, number: int) -> NDArray[np.uint8] | None:
        """An image's file, or its pixels; None where it cannot be read."""
        index = self.index
        if index is None:
            return None
        try:
            content = np.fromfile(index.paths[number], np.uint8) if index.store is None else index.store.content(number)
        except (OSError, ValueError, CommandError):
            return None
        return content if content.size else None

    def picture(self, number: int, text: str) -> Html:
        """An image's small picture, or a placeholder. text: what it shows, for readers who do not see it."""
        found = self.pictures.get(number)
        if found is None:
            return element("span", "image cannot be shown", class_="thumb gone", role="img", aria_label=text)
        uri, width, height = found
        if number in self.used:
            content = element("use", href=f"#i{number}")
        else:
            self.used.add(number)
            content = element("image", id=f"i{number}", href=uri, width=width, height=height)
        return element("svg", content, viewBox=f"0 0 {width} {height}", role="img", aria_label=text, class_="thumb")
