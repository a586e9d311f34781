"""Views of an image at test time: crops of several sizes, with or without their mirror images."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.schema import IMAGE_SIZES
from fasttrain.pipelines.philox import VIEW, uniforms
from fasttrain.pipelines.plan import CROP_DRAWS, random_resized_crop
from fasttrain.utils.errors import UserError

NAMES = ("center", "report", "tencrop")
CENTER, RANDOM = "center", "random"
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
# The DeepBlueAI report's sizes for a network trained at 224 pixels.
_REPORT_SIZES, _REPORT_BASE = (224, 320, 380, 448), 224
_MULTIPLE = 4  # TResNet only takes multiples of it
# The random crop's share of the image's area and its aspect ratio (log-uniform).
_AREA, _RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
_SEED = 0


class Crop(NamedTuple):
    """A crop of size x size pixels. where: CENTER or one of CORNERS, of the image after a resize of its shorter edge to
    `shorter_edge(size)`; or RANDOM, a random box of the image."""

    size: int
    where: str


@dataclass(frozen=True)
class Views:
    """Crops of each image; with `flip` also their mirror images. Every size has the same number of views."""

    crops: tuple[Crop, ...]
    flip: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(crop.size for crop in self.crops))

    def __len__(self) -> int:
        return len(self.crops) * (2 if self.flip else 1)


WHOLE = Views(())  # no crops: the images as they are


def views_by_name(name: str, image_size: int, sizes: tuple[int, ...] = ()) -> Views:
    """The named views for a network trained at image_size. sizes: the crops' sizes in pixels; empty for the defaults.

    center: one central crop. report: a central and a random crop at each of four sizes, with their mirror images: 16
    views (DeepBlueAI report, section II-D). The sizes are 224, 320, 380 and 448 for an image_size of 224, and scale
    with it to the nearest multiple of 4. tencrop: the center and corner crops with their mirror images.

    Raises UserError for an unknown name or invalid sizes.
    """
    smallest, largest = IMAGE_SIZES
    if not all(smallest <= size <= largest for size in sizes) or len(set(sizes)) < len(sizes):
        listed = ",".join(map(str, sizes))
        raise UserError(f"--sizes {listed}: sizes must be different numbers of pixels, {smallest} to {largest}")
    match name:
        case "center":
            return Views(tuple(Crop(size, CENTER) for size in sizes or (image_size,)))
        case "report":
            scaled = (_MULTIPLE * round(size * image_size / _REPORT_BASE / _MULTIPLE) for size in _REPORT_SIZES)
            sizes = sizes or tuple(dict.fromkeys(scaled))  # tiny sizes round to the same multiple
            return Views(tuple(Crop(size, where) for size in sizes for where in (CENTER, RANDOM)), flip=True)
        case "tencrop":
            positions = (CENTER, *CORNERS)
            return Views(tuple(Crop(size, where) for size in sizes or (image_size,) for where in positions), flip=True)
    raise UserError(f"--views {name}: choose one of {', '.join(NAMES)}")


def shorter_edge(image_size: int) -> int:
    """The length to which the shorter edge is resized before a crop of image_size, in pixels: 256 for 224."""
    return round(256 * image_size / 224)


def region(crop: Crop, images: NDArray[np.int64], sizes: NDArray[np.int32]) -> NDArray[np.float32]:
    """Regions float32 [n, 4] (top, left, bottom, right), in pixels of the stored images; the crop is one resize of its
    region to a square. images: int64 [n], their indices. sizes: int32 [n, 2], their heights and widths.

    A random crop depends only on the image's number, so it is the same at every size and in every pass. The other crops
    follow PIL's and torchvision's arithmetic: the longer edge becomes edge·long // short, and a central crop starts at
    round((length − size) / 2), rounded half to even.
    """
    stored = sizes.astype(np.int64)
    if crop.where == RANDOM:
        u = uniforms(_SEED, VIEW, 0, images, CROP_DRAWS)
        box = random_resized_crop(u, sizes, _AREA, _RATIO).astype(np.float32)
        return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1)
    edge = shorter_edge(crop.size)
    short = stored.min(1, keepdims=True)
    resized = np.where(stored == short, edge, edge * stored // short)
    start = np.rint((resized - crop.size) / 2)
    if crop.where != CENTER:
        at_end = [crop.where.startswith("bottom"), crop.where.endswith("right")]
        start = np.where(at_end, resized - crop.size, 0)
    corners = np.concatenate([start, start + crop.size], 1)
    return (corners * np.tile(stored / resized, 2)).astype(np.float32)
