"""Which classes a network mistakes for which."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import replacing
from fasttrain.utils.text import printable


def matrix(labels: NDArray[np.int64], named: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """[classes, classes]: how many images of the row's class are given the column's."""
    return np.bincount(labels * classes + named, minlength=classes**2).reshape(classes, classes)


def summary(counts: NDArray[np.int64], classes: Sequence[str], most: int = 5) -> str:
    """The classes with the lowest share of right answers and the pairs most often confused, as text."""
    images = counts.sum(1)
    right = np.where(images > 0, counts.diagonal() / np.maximum(images, 1), 2.0)
    lines = ["worst classes:"]
    for label in np.argsort(right, kind="stable")[:most]:
        if images[label]:
            lines.append(f"  {right[label]:7.2%} of {images[label]} right: {printable(classes[label])}")
    wrong = counts - np.diag(counts.diagonal())
    lines.append("most confused:")
    for at in np.argsort(-wrong, axis=None, kind="stable")[:most]:
        label, named = divmod(int(at), len(classes))
        if wrong[label, named]:
            times = f"{wrong[label, named]} of {images[label]}"
            lines.append(f"  {printable(classes[label])} taken for {printable(classes[named])}: {times}")
    return "\n".join(lines if len(lines) > 2 and lines[-1] != "most confused:" else lines[:-1])


def require_matplotlib() -> None:
    """UserError where `draw` would miss it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--confusion needs matplotlib: pip install matplotlib") from None


def draw(counts: NDArray[np.int64], classes: Sequence[str], path: Path, software: str) -> None:
    """A picture of the matrix, each row as shares of its class, on a scale that shows small shares too; software: who
    made it, as the PNG says. Raises RunError where it cannot be written."""
    import warnings

    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(16.0, 3 + 0.25 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap="viridis", interpolation="nearest")
    axes.set(xlabel="named", ylabel="class")
    if len(classes) <= 60:
        names = [printable(each if len(each) <= 24 else f"{each[:11]}…{each[-12:]}") for each in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(classes)), names, fontsize=8, parse_math=False)
    if len(classes) <= 20:
        for row, column in np.argwhere(counts):
            colour = "black" if shares[row, column] > 0.6 else "white"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(drawn, ax=axes, label="share of the row's class")
    with replacing(path) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font does not have
        figure.savefig(aside, dpi=100, metadata={"Software": software})
