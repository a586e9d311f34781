"""How far the evaluation pipeline's pixels are from PIL's and torchvision's: python scripts/parity.py --data DIR

For each decoder (on a GPU; on a CPU there is one) and size the mean and largest difference of 255, over the same
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
from fasttrain.data.index import Index, open_data
from fasttrain.distributed.ranks import Ranks, ranks
from fasttrain.pipelines import decoders
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.views import views_by_name

SIZES = (224, 448)


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True), help="Photographs in class folders.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--images", type=click.IntRange(1), default=320, show_default=True, help="At most so many of them.")
@click.option(
    "--decoder", "kinds", type=click.Choice(DECODERS[1:]), multiple=True, help="Default: all that are not refused."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(data: str, device: str, images: int, kinds: tuple[str, ...], json_path: Path | None) -> None:
    """Measure, and print a line per decoder and size."""
    index, _ = open_data(DataConfig(train=(data,)))
    rows = []
    with ranks(device) as here:
        usual = [kind for kind in DECODERS[1:] if kind not in decoders.rule().refused]
        for kind, size in itertools.product(kinds or (usual if device == "cuda" else ["cpu"]), SIZES):
            decoder = Decoder(decoders.resolve(kind, here.device), MachineConfig().hardware_load)
            found = differences(index, size, images, decoder, here)
            row = {"decoder": decoder.kind, "size": size, "images": len(found), "mean": float(found.mean())}
            row |= {"most": int(found.max()), "worst_image_mean": float(found.mean((1, 2, 3)).max())}
            rows.append(row)
            click.echo(f"{kind}, {size} px, {len(found)} images: mean {row['mean']:.3f}, most {row['most']} of 255")
            if json_path:
                common.write_figures(json_path, here.device, rows, {"images": images})


def differences(index: Index, size: int, images: int, decoder: Decoder, here: Ranks) -> NDArray[np.int16]:
    """|pipeline - PIL| of each image's central crop, int16 [N, size, size, 3]."""
    as_pil = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)])
    found: list[NDArray[np.int16]] = []
    batches = EvalLoader(index, views_by_name("center", size), 16, here.device, here.threads(0), decoder=decoder)
    for crops, numbers in batches:
        for pixels, number in zip(crops[0].cpu().numpy(), numbers.tolist(), strict=True):
            with Image.open(index.paths[number]) as image:
                expected = np.asarray(as_pil(image.convert("RGB")), np.int16)
            found.append(np.abs(pixels.astype(np.int16) - expected))
        if len(found) >= images:
            break
    return np.stack(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
