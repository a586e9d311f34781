"""The losses, one file each. `LOSSES` maps the name used in recipes and logs to the class."""

from fasttrain.losses.cross_entropy import CrossEntropy

LOSSES = {CrossEntropy.name: CrossEntropy}
