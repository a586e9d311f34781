"""fasttrain: a high-throughput trainer for image classifiers.

    import fasttrain

    run = fasttrain.fit("tresnet_xl", data="DIR", epochs=5)
    run.scores, run.log, run.predict("DIR")

`fit` and `load` are in `fasttrain.api`, `Recipe` in `fasttrain.config.schema`. They are imported when they are used:
they need torch and DALI, which the command line does without until it has read its arguments.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasttrain.api import Run, fit, load
    from fasttrain.config.schema import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "fit", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # of notebooks without widgets
        module = import_module("fasttrain.config.schema" if name == "Recipe" else "fasttrain.api")
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
