"""Attract-and-Repulse, second in the VIPriors challenge 2021 (arXiv 2206.06168). Its constants are not public; these
are our own.

    fasttrain run --recipe attract_repulse/stage1-resnest101e --data DIR
    fasttrain run --recipe attract_repulse/stage2-resnest101e --init runs/attract_repulse/stage1-resnest101e --data DIR
    fasttrain predict runs/attract_repulse/stage2-resnest101e --images TEST --views tencrop --out resnest.npz
    fasttrain ensemble resnest.npz tresnet.npz seresnext.npz --submission submission.csv

Stage 1: cross entropy plus 0.1 times its reverse, which gives wrong labels less influence, and an InfoNCE term between
two views of each image. Its weight falls from 0.5 to 0 along a cosine; its embedding comes from a head that only
training has. RandAugment (two operations at magnitude 9 of 30), random erasing and CutMix; a step that mixes has no
InfoNCE term. Each image is decoded once for all its views. A batch of 128 images has 256 rows.

Stage 2 adds a mean teacher: the averaged weights see a third view, which is never mixed, and the network should agree
with them (KL divergence, ramped up over five epochs). `eval`, `predict` and `--init` use the averaged weights.

Each part is a setting of any recipe, for example `--set losses.contrastive.weight=0.5` or
`--set augment.randaugment=2 --set augment.autoaugment=none`.

Reached there: the abstract gives no accuracy, only the second place. Here: on 50 classes at 32 pixels with a network of
0.5 M parameters no part was shown to help (scripts/results/README.md); larger runs have not been tried.
"""

from dataclasses import replace

from fasttrain.config.schema import AugmentConfig, EmaConfig, Recipe
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.recipes.deepblueai import RESNEST, SERESNEXT, TRESNET


def stage1(recipe: Recipe) -> Recipe:
    """Stage 1 for a network's recipe: symmetric cross entropy attracts the images of a class, and a contrastive term
    that fades repulses each image from all others."""
    return replace(
        recipe,
        name=f"attract_repulse/stage1-{recipe.arch}",
        losses=(SymmetricCrossEntropy(), Contrastive(decay="cosine")),
        augment=AugmentConfig(autoaugment="none", randaugment=2, randaugment_magnitude=9, erase=0.25),
    )


def stage2(recipe: Recipe) -> Recipe:
    """Stage 2, from the weights of a stage 1: a mean teacher, which sees a view of its own, gives soft labels too. The
    result is the teacher."""
    return replace(
        recipe,
        name=recipe.name.replace("stage1-", "stage2-"),
        epochs=recipe.epochs * 4 // 5,
        losses=(*recipe.losses, MeanTeacher(ramp_epochs=5.0)),
        ema=EmaConfig(decay=0.999),
    )


STAGE1 = tuple(stage1(each) for each in (RESNEST, TRESNET, SERESNEXT))
