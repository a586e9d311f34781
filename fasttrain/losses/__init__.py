"""The losses, one file each. `LOSSES` maps the name used in recipes and logs to the class.

To add a loss, add a file with a frozen dataclass that derives from `base.Loss`; cross_entropy.py is the simplest.
"""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fasttrain.losses.base import Loss

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in _subclasses(Loss)}
