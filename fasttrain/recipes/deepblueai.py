"""The DeepBlueAI solution of the VIPriors challenge 2020: seven models in two stages, and their ensemble.

Luo, Li and Zhang, "A Technical Report for VIPriors Image Classification Challenge", 2020. The challenge gives 50 images
per class of ImageNet, to train on from random weights.

From ImageNet to a submission, for one of the seven models:

    fasttrain data vipriors --imagenet IMAGENET --out imagenet50 --link
    fasttrain run --arch resnest101e --data imagenet50
    fasttrain run --arch resnest101e --loss ce+arcface --init runs/deepblueai/resnest101e-ce --data imagenet50
    fasttrain predict runs/deepblueai/resnest101e-ce+arcface --images imagenet50/test/imgs --views report --out a.npz
    fasttrain ensemble a.npz --submission submission.csv
    fasttrain score submission.csv --labels imagenet50/test/labels.csv

`bash scripts/report.sh imagenet50 OUT` does this for all seven models (with `--smoke` for a tiny network, in minutes).

Stage 1 trains with cross entropy for 250 epochs. Stage 2 starts from its weights and adds a triplet loss or ArcFace for
200 epochs. All have SGD with momentum 0.9, weight decay 1e-4 on every parameter, one epoch of warm-up, then a cosine,
label smoothing 0.1, random resized crops, flips, AutoAugment (24 sub-policies) and CutMix on half of the batches. The
triplet loss is batch-hard over the global batch; a step that mixes has none.

Reached there: 0.7015 top-1 with all seven on the challenge's test images. Here: not run at this scale yet. On 50
classes at 32 pixels none of its additions helped (scripts/results/README.md).
"""

from dataclasses import replace

from fasttrain.config.choices import LOSS_COMBINATIONS
from fasttrain.config.schema import AugmentConfig, Recipe
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.base import Loss
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.triplet import Triplet

CE = CrossEntropy(smoothing=0.1)
# The losses of `--loss`: the report's three combinations.
COMBINATIONS: dict[str, tuple[Loss, ...]] = dict(
    zip(
        LOSS_COMBINATIONS,
        [(CE,), (CE, Triplet(margin=0.3)), (CE, ArcFace(scale=30.0, margin_rad=0.5))],
        strict=True,
    )
)


def second_stage(recipe: Recipe, combination: str) -> Recipe:
    """Stage 2: fine-tunes `recipe`'s weights with another loss added, for four fifths of its epochs (200 of the
    report's 250). Warm-up, cosine and learning rate start again. Triplet takes 4 images of each class per batch."""
    return replace(
        recipe,
        name=recipe.name.removesuffix("-ce") + f"-{combination}",
        epochs=recipe.epochs * 4 // 5,
        losses=COMBINATIONS[combination],
        images_per_class=4 if any(loss.groups for loss in COMBINATIONS[combination]) else 0,
    )


RESNEST = Recipe(
    name="deepblueai/resnest101e-ce",
    arch="resnest101e",
    batch_size=128,
    epochs=250,
    losses=COMBINATIONS["ce"],
    augment=AugmentConfig(autoaugment="imagenet-24"),
)
SERESNEXT = replace(RESNEST, name="deepblueai/seresnext101_32x4d-ce", arch="seresnext101_32x4d")
TRESNET = replace(RESNEST, name="deepblueai/tresnet_xl-ce", arch="tresnet_xl", batch_size=256)
SEVEN = (
    RESNEST,
    second_stage(RESNEST, "ce+triplet"),
    second_stage(RESNEST, "ce+arcface"),
    TRESNET,
    second_stage(TRESNET, "ce+triplet"),
    SERESNEXT,
    second_stage(SERESNEXT, "ce+arcface"),
)
ENSEMBLE = tuple(recipe.name for recipe in SEVEN)
# The report's text says that this model was trained at 448 pixels; its table mostly says 224.
RESNEST_448 = replace(RESNEST, name="deepblueai/resnest101e-ce-448", image_size=448)
