"""The schedule for the demo set: small images and a few epochs."""

from dataclasses import replace
from pathlib import Path

from fasttrain.config.schema import DataConfig, Recipe


def demo(recipe: Recipe, folder: Path, parameters: int, ranks: int = 1) -> Recipe:
    """`recipe` on the demo set in `folder`, in minutes on a CPU: small images and batches and few epochs, the fewer
    (at a lower learning rate) for a network of more than 30 million parameters. Crops keep at least half of an
    image, since of 64 pixels less shows little. The batch is of some 25 images that divide among the ranks."""
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
