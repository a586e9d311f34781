"""Progress bars: on stderr where it is a terminal, and below the cell in a notebook."""

import sys
import warnings
from typing import Any

from tqdm import tqdm


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def progress_bar(*, hidden: bool = False, **settings: Any) -> tqdm:
    """tqdm's bar, its widget in a notebook that has widgets. Nothing is drawn where stderr is not a terminal, or it is
    hidden. settings: those of tqdm."""
    if not in_notebook():
        return tqdm(disable=True if hidden else None, dynamic_ncols=True, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is experimental, or that there are no widgets
        from tqdm.autonotebook import tqdm as notebook_tqdm

        return notebook_tqdm(disable=hidden, **settings)
