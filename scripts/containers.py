"""What packs cost and change: python scripts/containers.py --data DIR [--images N] [--json FILE]

Makes packs of each kind from photographs and prints, for each: its size, how long it took, beside Pillow alone with as
many processes doing the same work; and for reduced images, how their pixels at 224 differ from those of the files, and
how much more of the crops is enlarged.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
# Each process that packs imports this file, so what it does not need is imported where it is used.
from fasttrain.data import pack
from fasttrain.data.index import Index, merge
from fasttrain.data.pack import Encoding

SIZE = 224
VIPRIORS = 100_000  # images: 50 per class for training and 50 for validation
KINDS = {
    "same": Encoding("same"),
    "jpeg 288": Encoding("jpeg", 288),
    "raw 288": Encoding("raw", 288),
    "raw": Encoding("raw"),
}


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True), help="Photographs in class folders.")
@click.option("--images", type=click.IntRange(1), default=5000, show_default=True, help="To pack; photographs repeat.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(data: str, images: int, workers: int, json_path: Path | None) -> None:
    """Measure, and print one line per kind."""
    import torch

    from fasttrain.benchmarks.common import write_figures

    index = opened(data)
    many = unique(merge([index] * -(-images // len(index)), [""] * -(-images // len(index))), images)
    files = sum(Path(path).stat().st_size for path in index.paths)
    rows: list[dict[str, Any]] = [{"kind": "files", "mb": files / 1e6, "gb_of_vipriors": gb(files, index)}]
    rows[-1] |= {f"enlarged_{name}": value for name, value in enlarged(index).items()}
    report(rows[-1])
    with tempfile.TemporaryDirectory() as folder:
        for kind, encoding in KINDS.items():
            small, large = Path(folder, "small.safetensors"), Path(folder, "large.safetensors")
            made = pack.make({"train": index}, small, encoding, workers=workers, progress=False, say=lambda line: None)
            row = {"kind": kind, "mb": made.bytes / 1e6, "gb_of_vipriors": gb(made.bytes, index)}
            row["images_per_s"] = rate(many, large, encoding, workers)
            row["pillow_images_per_s"] = pillow_rate(many.paths, encoding, workers)
            packed = opened(str(small))
            row |= difference(index, packed)
            row |= {f"enlarged_{name}": value for name, value in enlarged(packed).items()}
            rows.append(row)
            report(row)
    if json_path:
        write_figures(json_path, torch.device("cpu"), rows, {"images": images, "workers": workers})


def opened(data: str) -> Index:
    from fasttrain.config.schema import DataConfig
    from fasttrain.data.open_data import open_data

    return open_data(DataConfig(train=(data,)))[0]


def report(row: dict[str, Any]) -> None:
    values = (f"{value:.3f}" if isinstance(value, float) else value for value in row.values())
    click.echo(", ".join(f"{key} {value}" for key, value in zip(row, values, strict=True)))


def gb(size: int, index: Index) -> float:
    """The size of the challenge's set in gigabytes, if its images are like these."""
    return size / len(index) * VIPRIORS / 1e9


def unique(index: Index, count: int) -> Index:
    """The first `count` images, with ids of their own."""
    index = replace(index, paths=index.paths[:count], labels=index.labels[:count], sizes=index.sizes[:count])
    return replace(index, ids=tuple(f"class/{number}.jpg" for number in range(count)))


def rate(index: Index, out: Path, encoding: Encoding, workers: int) -> float:
    start = time.perf_counter()
    pack.make({"train": index}, out, encoding, workers=workers, progress=False, say=lambda line: None)
    seconds = time.perf_counter() - start
    out.unlink()
    return len(index) / seconds


def pillow_rate(paths: Sequence[str], encoding: Encoding, workers: int) -> float:
    """Pillow alone: read, decode, reduce and encode the same images in as many processes, and drop the result."""
    start = time.perf_counter()
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(partial(with_pillow, encoding=encoding), paths, chunksize=32))
    return len(paths) / (time.perf_counter() - start)


def with_pillow(path: str, encoding: Encoding) -> int:
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    height, width = encoding.size(image.height, image.width)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if encoding.kind == "jpeg":
        from io import BytesIO

        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=encoding.quality)
        return len(buffer.getvalue())
    return len(image.tobytes()) if encoding.kind == "raw" else Path(path).stat().st_size


def difference(index: Index, packed: Index) -> dict[str, float]:
    """Of the center crops of a validation at SIZE pixels: the mean and the maximum absolute difference, of 255."""
    total, most, count = 0.0, 0.0, 0
    for ours, theirs in zip(crops(packed), crops(index), strict=True):
        errors = np.abs(ours.astype(np.int16) - theirs)
        total, most, count = total + float(errors.sum()), max(most, float(errors.max())), count + errors.size
    return {"mean_difference": total / count, "max_difference": most}


def crops(index: Index) -> Iterator[NDArray[np.uint8]]:
    import torch

    from fasttrain.pipelines.eval_loader import EvalLoader
    from fasttrain.pipelines.views import views_by_name

    for batch in EvalLoader(index, views_by_name("center", SIZE), 32, torch.device("cpu"), 2):
        yield batch.pixels[0].numpy().copy()


def enlarged(index: Index) -> dict[str, float]:
    """Of the training crops of three epochs: the share that is enlarged in height or width, and the mean factor by
    which those are."""
    from fasttrain import recipes
    from fasttrain.config.schema import AugmentConfig
    from fasttrain.pipelines.plan import Plan

    recipe = replace(recipes.for_arch("tresnet_xl"), image_size=SIZE, batch_size=64, epochs=3, augment=AugmentConfig())
    plan = Plan.of(recipe, index)
    factors = []
    for step in range(plan.steps):
        numbers = plan.images(step, 0)
        (draws,) = plan.all_draws(step, numbers, index.sizes[numbers])
        factors.append(SIZE / draws.crop[:, 2:].min(1))
    factor = np.concatenate(factors)
    return {"share": float((factor > 1).mean()), "factor": float(factor[factor > 1].mean())}


if __name__ == "__main__":
    main()
