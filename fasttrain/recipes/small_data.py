"""A recipe for little data and short schedules, for any network. It follows from the number of images and how often
each is seen.

    fasttrain run --recipe small_data/resnet18 --data DIR --epochs 30

The report's augmentation and CutMix are made for hundreds of epochs. In short schedules they cost accuracy: the network
sees hardly any image as it is. What `fasttrain tune` found on three small sets is this rule; scripts/results/README.md
has the comparisons with the usual recipe.
"""

import math
from dataclasses import replace

from fasttrain.config.schema import AugmentConfig, MixConfig, OptimConfig, Recipe
from fasttrain.losses.cross_entropy import CrossEntropy

PREFIX = "small_data/"
STEPS_PER_EPOCH = 32  # at least, where the batch allows it
BATCHES = (16, 128)  # the smallest and the largest batch
CUTMIX_FROM, AUTOAUGMENT_FROM = 50, 150  # epochs
PEAK_LR = 0.04  # of a batch of 64; it grows with the root of the batch
DECAY_PER_EPOCH = 4e-5
WEIGHT_DECAYS = (2e-4, 2e-3)


def small_data(recipe: Recipe, images: int, epochs: int, batch_size: int | None = None) -> Recipe:
    """`recipe` with its batch, learning rate, warm-up, weight decay and augmentation by the number of training images
    and epochs. batch_size: instead of the rule's.

    - The batch is the largest power of two with which an epoch has 32 steps, between 16 and 128.
    - The peak learning rate is 0.04 · √(batch / 64). Warm-up takes a twentieth of the steps, and 5 epochs at most.
    - The weight decay is 4e-5 times the epochs, between 2e-4 and 2e-3: the more often the network sees the same images,
      the more decay keeps it from learning them by heart.
    - Crops have a quarter of the image or more. From 50 epochs on, half of the batches get CutMix. From 150 on, images
      also get AutoAugment, and crops may be as small as in the report.
    """
    smallest, largest = BATCHES
    batch = batch_size or max(smallest, min(largest, 1 << max(0, (images // STEPS_PER_EPOCH).bit_length() - 1)))
    peak = round(PEAK_LR * math.sqrt(batch / 64), 4)
    low, high = WEIGHT_DECAYS
    strong = epochs >= AUTOAUGMENT_FROM
    return replace(
        recipe,
        name=f"{PREFIX}{recipe.arch}",
        batch_size=batch,
        epochs=epochs,
        losses=(CrossEntropy(smoothing=0.1),),
        optim=OptimConfig(
            lr=peak,
            lr_batch=0,
            warmup_epochs=round(min(5.0, epochs / 20), 3),
            weight_decay=round(min(high, max(low, DECAY_PER_EPOCH * epochs)), 6),
        ),
        augment=AugmentConfig(
            crop_area=(0.08 if strong else 0.25, 1.0),
            autoaugment=recipe.augment.autoaugment if strong else "none",
        ),
        mix=MixConfig(cutmix=0.5 if epochs >= CUTMIX_FROM else 0.0),
    )
