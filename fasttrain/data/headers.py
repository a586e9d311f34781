"""The headers of image files: sizes, and which images the pipelines cannot decode as PIL does."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM")  # PIL's names
# PIL's modes of TIFFs, and their channels.
_TIFF_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 1, "I;16B": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}
# Tags of TIFF; the first is also one of EXIF.
ORIENTATION, BITS, _COMPRESSION, _CHANNELS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 274, 258, 259, 277, 262, 284, 339
_WHITE_IS_0, _YCBCR = 0, 6  # kinds of _PHOTOMETRIC


class Header(NamedTuple):
    """height, width: as stored, before any EXIF rotation; 0 where `problem` says why the image cannot be used."""

    height: int
    width: int
    problem: str = ""


def read_header(path: str, file: IO[bytes] | None = None) -> Header:
    """Read an image's header. file: its content, where `path` only names it. Raises UserError if the file cannot be
    read: that says nothing about the image."""
    from PIL import Image

    try:
        with Image.open(file or path) as image:  # reads only the header
            if problem := unsupported(image):
                return Header(0, 0, problem)
            if max(image.size) >= 2**31:
                return Header(0, 0, f"it claims to have {image.width} x {image.height} pixels")
            # PIL gives a TIFF's size after the rotation.
            transposed = getattr(image, "tag_v2", {}).get(ORIENTATION) in range(5, 9)
            return Header(image.width, image.height) if transposed else Header(image.height, image.width)
    except Exception as error:  # PIL raises whatever the broken header leads its parsers to
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
        size = file.seek(0, os.SEEK_END) if file else os.path.getsize(path)
        return Header(0, 0, "it has no header of an image" if size else "the file is empty")


def unsupported(image: "Image") -> str:
    """Why DALI cannot decode an image that PIL opened, or gives other pixels than PIL; empty if it does neither.
    Determined by comparing both for TIFFs of every kind that PIL opens (`tests/data/test_headers.py`)."""
    if image.format not in _FORMATS:
        return f"it is a {image.format}, which DALI does not decode; convert it to PNG"
    tiles: Any = getattr(image, "tile", None)
    if image.format == "PPM" and tiles and (tiles[0][0] != "raw" or image.mode not in ("L", "RGB")):
        return "it is a PNM file in text or without 8 bits per channel; convert it to PNG"
    tags: Any = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return ""
    channels, tag, sample_format = tags.get(_CHANNELS, 1), tags.get(BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
    bits, photometric, mode = max(tag) if isinstance(tag, tuple) else tag, tags.get(_PHOTOMETRIC), image.mode
    planar = tags.get(_PLANAR, 1) == 2
    agrees = (
        mode in _TIFF_MODES
        and (bits >= 8 or (mode == "1" and tags.get(_COMPRESSION, 1) != 1))
        and set(sample_format) == {1}
        and (channels == _TIFF_MODES[mode] or mode == "RGB")
        and not (planar and (bits > 8 or channels > 4 or mode == "RGBA" or photometric == _WHITE_IS_0))
        and not (photometric == _YCBCR and channels != 3)
        and not (mode == "CMYK" and bits > 8)
    )
    if agrees:
        return ""
    kind = f"{channels} channel{'s' * (channels > 1)} of {bits} bit{'s' * (bits > 1)}{', planar' * planar}"
    return f"it is a TIFF that DALI cannot decode as PIL does (mode {mode}, {kind}); convert it to 8-bit RGB"


def read_headers(
    paths: Sequence[str], progress: bool, open_image: Callable[[int], IO[bytes]] | None = None
) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Sizes, int32 [N, 2] (height, width), and the problem of each image whose size is 0. Prints each kind of PIL's
    warnings once, with the first file that caused it.

    open_image: opens an image by its number, where the paths only name images in a container.
    """
    from tqdm import tqdm

    def read_number(number: int) -> Header:
        if open_image is None:
            return read(paths[number], None)
        with open_image(number) as file:
            return read(paths[number], file)

    workers = min(16, 4 * (os.cpu_count() or 1))
    sizes, problems = np.zeros((len(paths), 2), np.int32), {}
    with _warnings_with_paths() as read, ThreadPoolExecutor(workers) as pool:
        # `disable=None` hides the bar where stderr is not a terminal.
        bar = tqdm(total=len(paths), desc="reading headers", unit="file", disable=None if progress else True)
        with bar:
            for number, header in enumerate(pool.map(read_number, range(len(paths)))):
                sizes[number] = header.height, header.width
                if header.problem:
                    problems[number] = header.problem
                bar.update()
    return sizes, problems


@contextmanager
def _warnings_with_paths() -> Iterator[Callable[[str, IO[bytes] | None], Header]]:
    """Gives a function like `read_header`. Prints the warnings at the end, and lifts PIL's own limit of pixels."""
    import sys

    from PIL import Image

    current = threading.local()
    first_paths: dict[str, str] = {}
    lock = threading.Lock()

    def read(path: str, file: IO[bytes] | None) -> Header:
        current.path = path
        return read_header(path, file)

    def record(message: Warning | str, *_: Any, **__: Any) -> None:
        kind = " ".join(printable(str(message)).split())
        line = f"{printable(getattr(current, 'path', 'an image'))}: {kind}"
        with lock:
            first_paths.setdefault("".join(" " if part.isdigit() else part for part in kind), line)

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = record
            yield read
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        for line in first_paths.values():
            print(f"{line} (PIL; shown once)", file=sys.stderr)
