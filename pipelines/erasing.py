"""Random erasing (Zhong et al. 2017), with the box distribution of torchvision's RandomErasing."""

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.schema import IMAGENET_MEAN

with suppress(ImportError):  # see `operations`
    from nvidia.dali import fn

_TRIES = 10
DRAWS = 1 + 2 * _TRIES + 2  # uniforms per image: whether to erase, the tries' areas and ratios, the position
FILL = [round(255 * value) for value in IMAGENET_MEAN]  # about 0 in a normalized image


def boxes(
    u: NDArray[np.float64], size: int, p: float, area: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.int32]:
    """Boxes int32 [n, 4] (top, left, height, width) in images of size x size pixels; zeros where nothing is erased.

    With probability p, ten tries draw an area (a uniform share of the image's) and a ratio of height to width
    (log-uniform). The first box with both sides smaller than the image's is placed uniformly; if there is none, nothing
    is erased. u: uniforms [DRAWS, n].
    """
    chance, areas, ratios, position = np.split(u, np.cumsum([1, _TRIES, _TRIES]))
    target = size * size * (area[0] + (area[1] - area[0]) * areas)
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * ratios)
    sides = np.rint(np.sqrt([target * aspect, target / aspect]))  # [2, tries, n]
    fits = (sides < size).all(0)
    shape = sides[:, fits.argmax(0), np.arange(u.shape[1])]  # [2, n]
    corner = np.floor(position * (size - shape + 1))
    erased = (chance[0] < p) & fits.any(0)
    return np.where(erased, np.concatenate([corner, shape]), 0).T.astype(np.int32)


def erase(images: Any, anchor: Any, shape: Any) -> Any:
    """Fill a box of each image (uint8 HWC). anchor (top, left), shape (height, width): CPU nodes float32 [2]."""
    return fn.erase(images, anchor=anchor, shape=shape, axis_names="HW", fill_value=FILL)
