"""A picture of a batch as the network sees it."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.index import Index
from fasttrain.kernels.mix import mix
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.text import printable

_LINE = 12  # pixels per line of text; each image has two lines below it


class Seen(NamedTuple):
    """An image as the network sees it: uint8 [size, size, 3], and its labels with their shares, which sum to 1."""

    pixels: NDArray[np.uint8]
    labels: list[tuple[float, str]]


def seen(plan: Plan, index: Index, step: int, most: int) -> list[Seen]:
    """The first `most` images of a step of the run, all views of an image one after another. They come from the
    pipeline and the mix that training uses, on the CPU."""
    device = torch.device("cpu")
    pixels, indices = next(batches(plan, index, device, threads=2, start_step=step, stop_step=step + 1))
    params, _ = plan.mix_params(step, 0)
    mixed = mix(pixels, torch.from_numpy(params), IMAGENET_MEAN, IMAGENET_STD, torch.float32)
    std, mean = (torch.tensor(values)[:, None, None] for values in (IMAGENET_STD, IMAGENET_MEAN))
    pictures = ((mixed.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    views = plan.views_total
    indices = indices.repeat(views)
    order = torch.arange(len(pictures)).view(views, -1).T.flatten().tolist()
    images = []
    for row in order[: most * views]:
        own, other = (index.classes[index.labels[indices[n]]] for n in (row, int(mixed.partner[row])))
        share = float(mixed.lam[row])
        labels = [(1.0, own)] if share == 1 else [(share, own), (1 - share, other)]
        images.append(Seen(pictures[row].numpy(), labels))
    return images


def draw_batch(plan: Plan, index: Index, step: int, most: int) -> Image.Image:
    """Draw the first `most` images of a step of the run, with all their views side by side; see `seen`."""
    images = seen(plan, index, step, most)
    views, size = plan.views_total, plan.image_size
    cell_width, cell_height = max(size, 140) + 6, size + 2 * _LINE + 8
    columns = min(len(images), max(8 // views, 1) * views)
    sheet = Image.new("RGB", (columns * cell_width, -(-len(images) // columns) * cell_height), "white")
    canvas = ImageDraw.Draw(sheet)
    for cell, image in enumerate(images):
        left, top = cell % columns * cell_width + 3, cell // columns * cell_height + 2
        sheet.paste(Image.fromarray(image.pixels), (left, top))
        names = [(share, printable(name)) for share, name in image.labels]
        lines = [name if share == 1 else f"{share:.2f} {name}" for share, name in names]
        for line_number, line in enumerate(lines):
            canvas.text((left, top + size + 1 + line_number * _LINE), _fit(canvas, line, cell_width - 6), fill="black")
    return sheet


def _fit(canvas: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """`text`, shortened to at most `width` pixels."""
    if canvas.textlength(text) <= width:
        return text
    while text and canvas.textlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
