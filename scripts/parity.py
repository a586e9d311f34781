"""How far the evaluation pipeline's pixels are from PIL's and torchvision's: python scripts/parity.py --data DIR

On a GPU that is nvJPEG's decoder against libjpeg's. For each size the mean and largest difference of 255, over the
same central crops of the same photographs.
"""

import json
import sys
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain import dataset
from fasttrain.benchmarks import common
from fasttrain.config import Data
from fasttrain.distributed import ranks
from fasttrain.pipelines.eval import Evaluation
from fasttrain.pipelines.views import named

SIZES = (224, 448)


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True), help="Photographs in class folders.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--images", type=click.IntRange(1), default=320, show_default=True, help="At most so many of them.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(data: str, device: str, images: int, json_path: Path | None) -> None:
    """Measure, and print a line a size."""
    index, _ = dataset.open_data(Data(train=(data,)))
    rows = []
    with ranks(device) as here:
        for size in SIZES:
            as_pil = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)])
            differences = []
            for crops, numbers in Evaluation(index, named("center", size), 16, here.device, here.threads(0)):
                for pixels, number in zip(crops[0].cpu().numpy(), numbers.tolist(), strict=True):
                    with Image.open(index.paths[number]) as image:
                        expected = np.asarray(as_pil(image.convert("RGB")), np.int16)
                    differences.append(np.abs(pixels.astype(np.int16) - expected))
                if len(differences) >= images:
                    break
            found = np.stack(differences)
            row = {"size": size, "images": len(found), "mean": float(found.mean()), "most": int(found.max())}
            row["worst_image_mean"] = float(found.mean((1, 2, 3)).max())
            rows.append(row)
            click.echo(f"{size} px, {len(found)} images: mean {row['mean']:.3f}, most {row['most']} of 255")
        if json_path:
            told = common.about(here.device) | {"rows": rows}
            json_path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
