"""A picture of a batch as the network sees it."""

import torch
from PIL import Image, ImageDraw

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.index import Index
from fasttrain.kernels.mix import mix
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.text import printable

_LINE = 12  # pixels; two lines of text are under each image


def draw_batch(plan: Plan, index: Index, step: int, most: int) -> Image.Image:
    """The first `most` images, with all their views side by side, of global step `step`: from the pipeline and the mix
    that training uses, on the CPU."""
    device = torch.device("cpu")
    pixels, numbers = next(batches(plan, index, device, threads=2, start_step=step, stop_step=step + 1))
    params, _ = plan.mix_params(step, 0)
    mixed = mix(pixels, torch.from_numpy(params), IMAGENET_MEAN, IMAGENET_STD, torch.float32)
    std, mean = (torch.tensor(each)[:, None, None] for each in (IMAGENET_STD, IMAGENET_MEAN))
    pictures = ((mixed.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    views = plan.views_total
    numbers = numbers.repeat(views)
    order = torch.arange(len(pictures)).view(views, -1).T.flatten().tolist()
    count, size = min(most * views, len(pictures)), plan.image_size
    across, down = max(size, 96) + 6, size + 2 * _LINE + 8
    columns = min(count, max(8 // views, 1) * views)
    sheet = Image.new("RGB", (columns * across, -(-count // columns) * down), "white")
    pen = ImageDraw.Draw(sheet)
    for at, row in enumerate(order[:count]):
        left, top = at % columns * across + 3, at // columns * down + 2
        sheet.paste(Image.fromarray(pictures[row].numpy()), (left, top))
        own, other = (printable(index.classes[index.labels[numbers[each]]]) for each in (row, int(mixed.partner[row])))
        share = float(mixed.lam[row])
        lines = [own] if share == 1 else [f"{share:.2f} {own}", f"{1 - share:.2f} {other}"]
        for under, line in enumerate(lines):
            pen.text((left, top + size + 1 + under * _LINE), _fit(pen, line, across - 6), fill="black")
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """`text`, cut to so many pixels."""
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
