"""The schedule for the demo set: small images and a few epochs.

    fasttrain run --arch resnet18

It is a quick demo, not a benchmark. Reached here: ResNet-18 94 % top-1 of ten classes in five minutes on two CPU cores;
TResNet-XL, which has four epochs there, about 36 %.
"""

from dataclasses import replace
from pathlib import Path

from fasttrain.config.schema import DataConfig, Recipe


def demo(recipe: Recipe, folder: Path, parameters: int, ranks: int = 1) -> Recipe:
    """`recipe` for the demo set in `folder`, to train in minutes on a CPU: small images, few epochs, and batches of
    about 25 that divide among the ranks. A network of more than 30 million parameters gets fewer epochs and a lower
    learning rate. Crops keep at least half of an image, because less of 64 pixels shows little."""
    large = parameters > 30_000_000
    per_class = min(recipe.images_per_class, 4)
    least = ranks * max(1, per_class)
    return replace(
        recipe,
        name=f"demo-{recipe.name.rsplit('/', 1)[-1].removesuffix('-ce')}",
        image_size=64,
        batch_size=max(25 // least, 1) * least,
        images_per_class=per_class,
        epochs=4 if large else 32,
        optim=replace(recipe.optim, lr=0.01 if large else 0.05, lr_batch=0),
        augment=replace(recipe.augment, crop_area=(0.5, 1.0)),
        data=DataConfig(train=(str(folder / "train"),), val=str(folder / "val")),
    )
