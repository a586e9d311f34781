"""The losses, one file each. `LOSSES` maps the name used in recipes and logs to the class."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fasttrain.losses.base import Loss

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in Loss.__subclasses__()}
