"""Attract-and-Repulse (arXiv 2206.06168), second in the challenge of 2021: its parts with our constants, since its own
are not public.

    fasttrain run --recipe attract_repulse/stage1-resnest101e --data DIR
    fasttrain run --recipe attract_repulse/stage2-resnest101e --init runs/attract_repulse/stage1-resnest101e --data DIR

At 32 pixels with a network of 0.5 M parameters none of its parts was shown to help (README.md); larger runs have not
been tried.
"""

from dataclasses import replace

from fasttrain.config.schema import AugmentConfig, EmaConfig, Recipe
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.recipes.deepblueai import RESNEST, SERESNEXT, TRESNET


def stage1(recipe: Recipe) -> Recipe:
    """Stage 1 of Attract-and-Repulse (our constants) in place of a network's stage 1: symmetric cross entropy attracts
    the images of a class, a contrastive term that fades repulses each from all others, under RandAugment and random
    erasing. Every image is seen in two views a step."""
    return replace(
        recipe,
        name=f"attract_repulse/stage1-{recipe.arch}",
        losses=(SymmetricCrossEntropy(), Contrastive(decay="cosine")),
        augment=AugmentConfig(autoaugment="none", randaugment=2, randaugment_magnitude=9, erase=0.25),
    )


def stage2(recipe: Recipe) -> Recipe:
    """Stage 2 (our constants), from the weights of a stage 1: a mean teacher, which sees a view of its own, gives soft
    labels too. What counts in the end is the teacher."""
    return replace(
        recipe,
        name=recipe.name.replace("stage1-", "stage2-"),
        epochs=recipe.epochs * 4 // 5,
        losses=(*recipe.losses, MeanTeacher(ramp_epochs=5.0)),
        ema=EmaConfig(decay=0.999),
    )


STAGE1 = tuple(stage1(each) for each in (RESNEST, TRESNET, SERESNEXT))
