"""Code that this folder's scripts share: the path of the checkout, which need not be installed."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with the checkout first in PYTHONPATH, and with more variables."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | variables
