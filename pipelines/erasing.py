"""Random erasing (Zhong et al. 2017): boxes distributed as in torchvision's RandomErasing."""

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.schema import IMAGENET_MEAN

_TRIES = 10
DRAWS = 1 + 2 * _TRIES + 2  # uniforms an image: whether, then the area and the ratio of each try, then the place
FILL = [round(255 * each) for each in IMAGENET_MEAN]  # 0, once an image is normalised


def boxes(
    u: NDArray[np.float64], size: int, p: float, area: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.int32]:
    """Boxes int32 [n, 4] (top, left, height, width) in images of size x size pixels; zeros where nothing is erased.

    With probability p ten tries of an area (a uniform share of the image's) and a ratio of height to width
    (log-uniform), the first smaller than the image on both sides, placed uniformly; where none is, no box.
    u: uniforms [DRAWS, n].
    """
    whether, areas, ratios, place = np.split(u, np.cumsum([1, _TRIES, _TRIES]))
    target = size * size * (area[0] + (area[1] - area[0]) * areas)
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * ratios)
    sides = np.rint(np.sqrt([target * aspect, target / aspect]))  # [2, tries, n]
    fits = (sides < size).all(0)
    shape = sides[:, fits.argmax(0), np.arange(u.shape[1])]  # [2, n]
    corner = np.floor(place * (size - shape + 1))
    erased = (whether[0] < p) & fits.any(0)
    return np.where(erased, np.concatenate([corner, shape]), 0).T.astype(np.int32)
