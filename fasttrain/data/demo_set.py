"""The demo set: ten procedurally drawn classes, so that everything can be tried without any images at hand.

A class is a shape, a texture and a colour, such as `disc-stripes-red`. No two of the three tell all classes apart.
"""

import colorsys
import itertools
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic_folder, read_json_object
from fasttrain.utils.text import printable

SHAPES, TEXTURES, COLOURS = ("cross", "disc", "triangle"), ("checks", "stripes"), ("blue", "red")
# Ten of the twelve combinations: more than any two of the three properties have values together (six at most).
CLASSES = tuple(
    "-".join(each)
    for each in itertools.product(SHAPES, TEXTURES, COLOURS)
    if each not in (("disc", "checks", "blue"), ("triangle", "stripes", "red"))
)
TRAIN_PER_CLASS, VAL_PER_CLASS = 50, 25
Grid = NDArray[np.float64]
_HUES = {"red": 0.01, "blue": 0.61}
_MARK = "demo.json"


def make(folder: Path, seed: int = 0) -> bool:
    """Write `folder`/train and `folder`/val: ten classes, 50 and 25 JPEGs each, sides of 80 to 320 pixels.

    The same seed gives the same bytes (with the same JPEG encoder). Returns False, and writes nothing, where the
    folder already holds this very set. Raises UserError where it holds anything else.
    """
    stamp = {"fasttrain_demo": 1, "seed": seed}
    if folder.is_dir() and any(folder.iterdir()):
        if read_json_object(folder / _MARK) == stamp:
            return False
        raise UserError(f"{printable(folder)} is not empty and holds no demo set of seed {seed}; name another folder")
    try:
        with atomic_folder(folder) as temporary:
            for label, name in enumerate(CLASSES):
                for split, first, count in (("train", 0, TRAIN_PER_CLASS), ("val", TRAIN_PER_CLASS, VAL_PER_CLASS)):
                    class_folder = temporary / split / name
                    class_folder.mkdir(parents=True)
                    for number in range(first, first + count):
                        rng = np.random.Generator(np.random.Philox(key=[seed, label], counter=[0, 0, 0, number]))
                        picture = Image.fromarray(draw(name, rng))
                        picture.save(class_folder / f"{number:03}.jpg", quality=int(rng.integers(75, 96)))
            (temporary / _MARK).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    except OSError as error:
        # Another process may have made the same set in the meantime.
        if read_json_object(folder / _MARK) == stamp:
            return False
        raise UserError(f"cannot make the demo set in {printable(folder)}: {error.strerror}") from None
    return True


def draw(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture of a class, uint8 [H, W, 3]: a turned, rimmed, textured shape somewhere on a muted, uneven ground."""
    shape, texture, colour = name.split("-")
    height, width = _size(rng)
    radius = min(height, width) * rng.uniform(0.4, 0.48)
    slack_y, slack_x = height / 2 - radius, width / 2 - radius
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y -= height / 2 + rng.uniform(-slack_y, slack_y)
    x -= width / 2 + rng.uniform(-slack_x, slack_x)
    turned_y, turned_x = _turn(y, x, rng.uniform(-0.4, 0.4))

    distance = _distance(shape, turned_y, turned_x, radius)
    inside = np.clip(0.5 - distance, 0, 1)  # a soft edge one pixel wide
    rim = np.clip(0.5 + distance + 0.07 * radius, 0, 1)
    slanted_y, slanted_x = _turn(y, x, rng.uniform(0, 2 * np.pi))
    marks = _texture(texture, slanted_y, slanted_x, radius / rng.uniform(2.2, 3.0))
    marks = np.maximum(marks, rim)
    dark = _colour(_HUES[colour] + rng.uniform(-0.04, 0.04), rng.uniform(0.75, 1), rng.uniform(0.6, 0.95))
    light = _colour(_HUES[colour], rng.uniform(0.0, 0.15), rng.uniform(0.9, 1))
    surface = marks[..., None] * dark + (1 - marks[..., None]) * light

    picture = inside[..., None] * surface + (1 - inside[..., None]) * _ground(rng, height, width)
    picture += rng.normal(0, 0.02, picture.shape)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: landscape, portrait or square, the shorter side 80 … 200 pixels."""
    short, ratio = int(rng.integers(80, 201)), rng.choice([1.0, rng.uniform(1.1, 1.6)])
    long = int(short * ratio)
    return (short, long) if rng.random() < 0.6 else (long, short)


def _turn(y: Grid, x: Grid, angle: float) -> tuple[Grid, Grid]:
    return np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y


def _distance(shape: str, y: Grid, x: Grid, radius: float) -> Grid:
    """Signed distance to the outline, in pixels, negative inside; the outline touches a circle of that radius."""
    if shape == "disc":
        return np.hypot(y, x) - 0.85 * radius
    if shape == "cross":
        long, short = np.maximum(abs(y), abs(x)), np.minimum(abs(y), abs(x))
        return np.maximum(long - 0.95 * radius, short - 0.31 * radius)
    return np.maximum(np.maximum(-x, 0.5 * x - np.sqrt(0.75) * y), 0.5 * x + np.sqrt(0.75) * y) - 0.5 * radius


def _texture(texture: str, y: Grid, x: Grid, period: float) -> Grid:
    """How much of each pixel is marked, 0 … 1: bands or checks, about half of the area."""
    wave_y, wave_x = np.cos(2 * np.pi * y / period), np.cos(2 * np.pi * x / period)
    wave = wave_y if texture == "stripes" else wave_y + wave_x
    return np.clip(0.5 + wave * period / 6, 0, 1)


def _colour(hue: float, saturation: float, value: float) -> Grid:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _ground(rng: np.random.Generator, height: int, width: int) -> Grid:
    """A muted colour that drifts into another one across the picture."""
    one, other = (_colour(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.2, 0.6)) for _ in range(2))
    drift_y, drift_x = (np.linspace(0, 1, n) for n in (height, width))
    share = (drift_y[:, None] + rng.uniform(-1, 1) * drift_x + 1) / 3
    return one + np.clip(share, 0, 1)[..., None] * (other - one)
