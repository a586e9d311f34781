"""Views of an image at test time: which crops at which sizes, each with its mirror image or without."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.schema import IMAGE_SIZES
from fasttrain.pipelines.philox import VIEW, uniforms
from fasttrain.pipelines.plan import CROP_DRAWS, random_resized_crop
from fasttrain.utils.errors import UserError

NAMES = ("center", "report", "tencrop")
CENTRE, RANDOM = "centre", "random"
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
# The report's sizes for a network trained at 224 pixels.
_REPORT_SIZES, _REPORT_BASE = (224, 320, 380, 448), 224
_MULTIPLE = 4  # TResNet takes no other sizes than multiples of it
# Its random crop: a share of the image's area, and an aspect ratio (log-uniform).
_AREA, _RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
_SEED = 0


class Crop(NamedTuple):
    """A square of size x size pixels, from the place `where`: the centre or a corner of the image once its shorter
    edge is `shorter_edge(size)`, or a random box of the image."""

    size: int
    where: str


@dataclass(frozen=True)
class Views:
    """Crops of each image, and whether each is also seen mirrored. Every size has the same number of views."""

    crops: tuple[Crop, ...]
    flip: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(crop.size for crop in self.crops))

    def __len__(self) -> int:
        return len(self.crops) * (2 if self.flip else 1)


def views_by_name(name: str, image_size: int, sizes: tuple[int, ...] = ()) -> Views:
    """The views of a name, for a network trained at image_size, or at other sizes (`sizes`, in pixels).

    center: one central crop. report: at four sizes (224, 320, 380 and 448 for 224, and otherwise as many times
    image_size, to the nearest multiple of 4) a central and a random crop, each with its mirror image: 16 views
    (DeepBlueAI report, section II-D).
    tencrop: centre and corners, each with its mirror image.
    """
    if not all(IMAGE_SIZES[0] <= each <= IMAGE_SIZES[1] for each in sizes) or len(set(sizes)) < len(sizes):
        raise UserError(f"--sizes {','.join(map(str, sizes))}: different numbers of pixels, {IMAGE_SIZES[0]} to 4096")
    match name:
        case "center":
            return Views(tuple(Crop(size, CENTRE) for size in sizes or (image_size,)))
        case "report":
            scaled = (_MULTIPLE * round(each * image_size / _REPORT_BASE / _MULTIPLE) for each in _REPORT_SIZES)
            sizes = sizes or tuple(dict.fromkeys(scaled))  # of a few pixels two are the same
            return Views(tuple(Crop(size, where) for size in sizes for where in (CENTRE, RANDOM)), flip=True)
        case "tencrop":
            places = (CENTRE, *CORNERS)
            return Views(tuple(Crop(size, where) for size in sizes or (image_size,) for where in places), flip=True)
    raise UserError(f"--views {name}: there are {', '.join(NAMES)}")


def shorter_edge(image_size: int) -> int:
    """The length to which the shorter edge is resized before a crop of image_size: 256 for 224."""
    return round(256 * image_size / 224)


def region(crop: Crop, images: NDArray[np.int64], sizes: NDArray[np.int32]) -> NDArray[np.float32]:
    """Regions float32 [n, 4] (top, left, bottom, right), in stored pixels, which one resize to a square makes the
    crop of; images int64 [n], their numbers, and sizes int32 [n, 2], height and width.

    A random crop depends on the image's number alone, so it is the same at every size and every time. For the others
    the longer edge is edge·long // short, and a central crop starts at round((length − size) / 2), half to even:
    PIL's and torchvision's arithmetic.
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
    if crop.where != CENTRE:
        far = [crop.where.startswith("bottom"), crop.where.endswith("right")]
        start = np.where(far, resized - crop.size, 0)
    corners = np.concatenate([start, start + crop.size], 1)
    return (corners * np.tile(stored / resized, 2)).astype(np.float32)
