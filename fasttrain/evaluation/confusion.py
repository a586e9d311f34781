"""The confusion matrix: a summary and a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import replacing
from fasttrain.utils.text import printable

_MOST_ROWS = 2000  # more than the picture has pixels


def matrix(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """[classes, classes]: the number of images of the row's class that are predicted as the column's."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def summary(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str], most: int = 5) -> str:
    """The classes with the lowest accuracy and the most confused pairs, as text, `most` lines of each. Needs memory for
    the images and classes, not for the matrix. labels, predicted: int64 [N]."""
    images, right = (np.bincount(chosen, minlength=len(classes)) for chosen in (labels, labels[labels == predicted]))
    present = np.flatnonzero(images)
    accuracy = right[present] / images[present]
    lines = ["worst classes:"]
    for position in np.argsort(accuracy, kind="stable")[:most].tolist():
        label = present[position]
        lines.append(f"  {accuracy[position]:7.2%} of {images[label]} right: {printable(classes[label])}")
    wrong = labels != predicted
    pairs, counts = np.unique(labels[wrong] * len(classes) + predicted[wrong], return_counts=True)
    if len(pairs):
        lines.append("most confused:")
    for position in np.argsort(-counts, kind="stable")[:most].tolist():
        label, other = divmod(int(pairs[position]), len(classes))
        times = f"{counts[position]} of {images[label]}"
        lines.append(f"  {printable(classes[label])} taken for {printable(classes[other])}: {times}")
    return "\n".join(lines)


def require_matplotlib() -> None:
    """Raises UserError where matplotlib, which `draw` needs, is not installed or not set up."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--confusion needs matplotlib: pip install matplotlib") from None
    except ValueError as error:  # of MPLBACKEND, or a matplotlibrc
        raise UserError(f"matplotlib is not set up: {printable(str(error))[:200]}") from None


def draw(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str], path: Path, software: str
) -> None:
    """Draw the matrix as a PNG, each row as shares of its class, on a scale that also shows small shares. More than
    2,000 classes are drawn in blocks of neighbors. labels, predicted: int64 [N]. software: the PNG's Software entry.
    Raises RunError where the file cannot be written."""
    import warnings

    from matplotlib import rc_context
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    block = -(-len(classes) // _MOST_ROWS)
    counts = matrix(labels // block, predicted // block, -(-len(classes) // block))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(16.0, 3 + 0.25 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap="viridis", interpolation="nearest")
    of = f" (blocks of {block})" if block > 1 else ""
    axes.set(xlabel=f"predicted{of}", ylabel=f"class{of}")
    if len(classes) <= 60:
        names = [printable(name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}") for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(classes)), names, fontsize=8, parse_math=False)
    if len(classes) <= 20:
        for row, column in np.argwhere(counts):
            color = "black" if shares[row, column] > 0.6 else "white"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(picture, ax=axes, label="share of the row's class")
    plain = rc_context({"text.usetex": False})  # names are not LaTeX
    with replacing(path) as temporary, warnings.catch_warnings(), plain:
        warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font does not have
        figure.savefig(temporary, dpi=100, metadata={"Software": software})
