"""The Bag of Tricks (He et al. 2018, arXiv 1812.01187): ResNet-50 with batch 1024; each recipe adds one change.

    fasttrain run --recipe bag_of_tricks/cosine --data DIR
    fasttrain run --recipe bag_of_tricks/distillation --data DIR --set losses.distillation.teacher=RUN

The ladder is baseline, efficient, resnet-d, cosine, smoothing, distillation, mixup and mixup-distillation. The paper's
color jitter and PCA noise are missing.

Reached there, top-1 on all of ImageNet: efficient 76.21 %, resnet-d 77.16 %, cosine 77.91 %, smoothing 78.31 %,
distillation 78.67 %, mixup 79.15 %, mixup-distillation 79.29 %. Here: not run at this scale yet.
"""

from dataclasses import replace

from fasttrain.config.schema import AugmentConfig, MixConfig, OptimConfig, Recipe
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.distillation import Distillation

EFFICIENT = Recipe(
    name="bag_of_tricks/efficient",
    arch="resnet50",
    batch_size=1024,
    epochs=120,
    losses=(CrossEntropy(smoothing=0.0),),
    optim=OptimConfig(nesterov=True, decay_norm_bias=False, warmup_epochs=5.0, schedule="step"),
    augment=AugmentConfig(autoaugment="none"),
    mix=MixConfig(cutmix=0.0),
)
BASELINE = replace(
    EFFICIENT,
    name="bag_of_tricks/baseline",
    batch_size=256,
    precision="fp32",
    zero_gamma=False,
    optim=replace(EFFICIENT.optim, decay_norm_bias=True, warmup_epochs=0.0),
)
RESNET_D = replace(EFFICIENT, name="bag_of_tricks/resnet-d", arch="resnet50d")
COSINE = replace(RESNET_D, name="bag_of_tricks/cosine", optim=replace(RESNET_D.optim, schedule="cosine"))
SMOOTHING = replace(COSINE, name="bag_of_tricks/smoothing", losses=(CrossEntropy(smoothing=0.1),))
DISTILLED = replace(
    SMOOTHING, name="bag_of_tricks/distillation", losses=(*SMOOTHING.losses, Distillation(temperature=20.0))
)
MIXUP = replace(
    SMOOTHING, name="bag_of_tricks/mixup", mix=MixConfig(cutmix=0.0, mixup=1.0, mixup_alpha=0.2), epochs=200
)
BOTH = replace(MIXUP, name="bag_of_tricks/mixup-distillation", losses=DISTILLED.losses)
