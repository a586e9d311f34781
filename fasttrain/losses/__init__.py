"""The losses, one file each. `LOSSES` maps the name used in recipes and logs to the class."""

from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.distillation import Distillation
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet

LOSSES = {
    each.name: each
    for each in (CrossEntropy, Triplet, ArcFace, Distillation, SymmetricCrossEntropy, Contrastive, MeanTeacher)
}
