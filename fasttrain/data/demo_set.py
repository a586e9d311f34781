"""The demo set: ten procedurally drawn classes, for trying everything without a data set.

A class is a shape, a texture and a color, such as `disc-stripes-red`. No two of the three identify every class.
"""

import colorsys
import itertools
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fasttrain.data.scan import cache_dir
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic_folder, read_json_object
from fasttrain.utils.text import printable

SHAPES, TEXTURES, COLORS = ("cross", "disc", "triangle"), ("checks", "stripes"), ("blue", "red")
# Ten of the twelve combinations. Two properties have at most six, so two alone cannot identify every class.
CLASSES = tuple(
    "-".join(properties)
    for properties in itertools.product(SHAPES, TEXTURES, COLORS)
    if properties not in (("disc", "checks", "blue"), ("triangle", "stripes", "red"))
)
TRAIN_PER_CLASS, VAL_PER_CLASS = 50, 25
Grid = NDArray[np.float64]
_HUES = {"red": 0.01, "blue": 0.61}
_MARKER = "demo.json"


def make(folder: Path, seed: int = 0) -> bool:
    """Write `folder`/train and `folder`/val: ten classes with 50 and 25 JPEGs each, sides of 80 to 320 pixels.

    The same seed gives the same bytes (with the same JPEG encoder). Returns False, and writes nothing, where the
    folder already holds the set of this seed. Raises UserError where it holds anything else.
    """
    stamp = {"fasttrain_demo": 1, "seed": seed}
    if folder.is_dir() and any(folder.iterdir()):
        if read_json_object(folder / _MARKER) == stamp:
            return False
        raise UserError(
            f"{printable(folder)} is not empty and does not hold the demo set of seed {seed}; name another folder"
        )
    try:
        with atomic_folder(folder) as temporary:
            for label, name in enumerate(CLASSES):
                for split, first, count in (("train", 0, TRAIN_PER_CLASS), ("val", TRAIN_PER_CLASS, VAL_PER_CLASS)):
                    class_folder = temporary / split / name
                    class_folder.mkdir(parents=True)
                    for number in range(first, first + count):
                        rng = np.random.Generator(np.random.Philox(key=[seed, label], counter=[0, 0, 0, number]))
                        image = Image.fromarray(draw(name, rng))
                        image.save(class_folder / f"{number:03}.jpg", quality=int(rng.integers(75, 96)))
            (temporary / _MARKER).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    except OSError as error:
        # Another process may have made the same set meanwhile.
        if read_json_object(folder / _MARKER) == stamp:
            return False
        raise UserError(f"cannot make the demo set in {printable(folder)}: {error.strerror}") from None
    return True


def cached() -> Path:
    """The folder of the demo set in the user's cache, which is drawn on first use."""
    folder = cache_dir() / "demo-1"
    make(folder)
    return folder


def draw(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw an image of a class, uint8 [H, W, 3]: a rotated, outlined, textured shape on a muted, uneven background."""
    shape, texture, color = name.split("-")
    height, width = _size(rng)
    radius = min(height, width) * rng.uniform(0.4, 0.48)
    slack_y, slack_x = height / 2 - radius, width / 2 - radius
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y -= height / 2 + rng.uniform(-slack_y, slack_y)
    x -= width / 2 + rng.uniform(-slack_x, slack_x)
    rotated_y, rotated_x = _rotate(y, x, rng.uniform(-0.4, 0.4))

    distance = _distance(shape, rotated_y, rotated_x, radius)
    inside = np.clip(0.5 - distance, 0, 1)  # a soft edge one pixel wide
    outline = np.clip(0.5 + distance + 0.07 * radius, 0, 1)
    slanted_y, slanted_x = _rotate(y, x, rng.uniform(0, 2 * np.pi))
    marks = _texture(texture, slanted_y, slanted_x, radius / rng.uniform(2.2, 3.0))
    marks = np.maximum(marks, outline)
    dark = _color(_HUES[color] + rng.uniform(-0.04, 0.04), rng.uniform(0.75, 1), rng.uniform(0.6, 0.95))
    light = _color(_HUES[color], rng.uniform(0.0, 0.15), rng.uniform(0.9, 1))
    surface = marks[..., None] * dark + (1 - marks[..., None]) * light

    image = inside[..., None] * surface + (1 - inside[..., None]) * _background(rng, height, width)
    image += rng.normal(0, 0.02, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: landscape, portrait or square, with a shorter side of 80 to 200 pixels."""
    short, ratio = int(rng.integers(80, 201)), rng.choice([1.0, rng.uniform(1.1, 1.6)])
    long = int(short * ratio)
    return (short, long) if rng.random() < 0.6 else (long, short)


def _rotate(y: Grid, x: Grid, angle: float) -> tuple[Grid, Grid]:
    return np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y


def _distance(shape: str, y: Grid, x: Grid, radius: float) -> Grid:
    """Signed distance to a shape's outline, negative inside. radius: of a circle around the shape. Both in pixels."""
    if shape == "disc":
        return np.hypot(y, x) - 0.85 * radius
    if shape == "cross":
        long, short = np.maximum(abs(y), abs(x)), np.minimum(abs(y), abs(x))
        return np.maximum(long - 0.95 * radius, short - 0.31 * radius)
    return np.maximum(np.maximum(-x, 0.5 * x - np.sqrt(0.75) * y), 0.5 * x + np.sqrt(0.75) * y) - 0.5 * radius


def _texture(texture: str, y: Grid, x: Grid, period: float) -> Grid:
    """How much of each pixel is marked, from 0 to 1: stripes or checks that cover about half of the area."""
    wave_y, wave_x = np.cos(2 * np.pi * y / period), np.cos(2 * np.pi * x / period)
    wave = wave_y if texture == "stripes" else wave_y + wave_x
    return np.clip(0.5 + wave * period / 6, 0, 1)


def _color(hue: float, saturation: float, value: float) -> Grid:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _background(rng: np.random.Generator, height: int, width: int) -> Grid:
    """A muted color that changes into another one across the image."""
    one, other = (_color(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.2, 0.6)) for _ in range(2))
    gradient_y, gradient_x = (np.linspace(0, 1, n) for n in (height, width))
    share = (gradient_y[:, None] + rng.uniform(-1, 1) * gradient_x + 1) / 3
    return one + np.clip(share, 0, 1)[..., None] * (other - one)
