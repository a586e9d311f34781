"""Compares the evaluation pipeline's pixels with PIL's and torchvision's: python scripts/parity.py --data DIR

For each decoder (on a CPU there is only one) and size: the mean and largest difference, out of 255, over the same
central crops of the same photographs.
"""

import itertools
import sys
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain.benchmarks import common
from fasttrain.config.choices import DECODERS
from fasttrain.config.schema import DataConfig, MachineConfig
from fasttrain.data.index import Index
from fasttrain.data.open_data import open_data
from fasttrain.distributed.ranks import Ranks, ranks
from fasttrain.pipelines import decoders
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.views import views_by_name

SIZES = (224, 448)


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True), help="Photographs in class folders.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--images", type=click.IntRange(1), default=320, show_default=True, help="Maximum number of images.")
@click.option(
    "--decoder",
    "kinds",
    type=click.Choice(DECODERS[1:]),
    multiple=True,
    help="Default: all that fasttrain does not refuse.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(data: str, device: str, images: int, kinds: tuple[str, ...], json_path: Path | None) -> None:
    """Measure, and print one line per decoder and size."""
    index, _ = open_data(DataConfig(train=(data,)))
    rows = []
    with ranks(device) as this_rank:
        allowed = [kind for kind in DECODERS[1:] if kind not in decoders.rule().refused]
        for kind, size in itertools.product(kinds or (allowed if device == "cuda" else ["cpu"]), SIZES):
            decoder = Decoder(decoders.resolve(kind, this_rank.device), MachineConfig().hardware_load)
            errors = differences(index, size, images, decoder, this_rank)
            row = {"decoder": decoder.kind, "size": size, "images": len(errors), "mean": float(errors.mean())}
            row |= {"most": int(errors.max()), "worst_image_mean": float(errors.mean((1, 2, 3)).max())}
            rows.append(row)
            click.echo(f"{kind}, {size} px, {len(errors)} images: mean {row['mean']:.3f}, most {row['most']} of 255")
            if json_path:
                common.write_figures(json_path, this_rank.device, rows, {"images": images})


def differences(index: Index, size: int, images: int, decoder: Decoder, ranks: Ranks) -> NDArray[np.int16]:
    """|pipeline - PIL| of each image's central crop, int16 [N, size, size, 3]."""
    pil_transform = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)])
    errors: list[NDArray[np.int16]] = []
    batches = EvalLoader(index, views_by_name("center", size), 16, ranks.device, ranks.threads(0), decoder=decoder)
    for crops, image_indices in batches:
        for pixels, image_index in zip(crops[0].cpu().numpy(), image_indices.tolist(), strict=True):
            with Image.open(index.paths[image_index]) as image:
                expected = np.asarray(pil_transform(image.convert("RGB")), np.int16)
            errors.append(np.abs(pixels.astype(np.int16) - expected))
        if len(errors) >= images:
            break
    return np.stack(errors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
