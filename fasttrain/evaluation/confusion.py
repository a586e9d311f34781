"""The confusion matrix: a summary and a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import replacing
from fasttrain.utils.text import printable


def matrix(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """[classes, classes]: the number of images of the row's class that are predicted as the column's."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def summary(counts: NDArray[np.int64], classes: Sequence[str], most: int = 5) -> str:
    """The classes with the lowest accuracy and the most confused pairs, as text, `most` lines of each."""
    images = counts.sum(1)
    accuracy = np.where(images > 0, counts.diagonal() / np.maximum(images, 1), 2.0)  # classes without images come last
    lines = ["worst classes:"]
    for label in np.argsort(accuracy, kind="stable")[:most]:
        if images[label]:
            lines.append(f"  {accuracy[label]:7.2%} of {images[label]} right: {printable(classes[label])}")
    wrong = counts - np.diag(counts.diagonal())
    lines.append("most confused:")
    for cell in np.argsort(-wrong, axis=None, kind="stable")[:most]:
        label, predicted = divmod(int(cell), len(classes))
        if wrong[label, predicted]:
            times = f"{wrong[label, predicted]} of {images[label]}"
            lines.append(f"  {printable(classes[label])} taken for {printable(classes[predicted])}: {times}")
    return "\n".join(lines if len(lines) > 2 and lines[-1] != "most confused:" else lines[:-1])


def require_matplotlib() -> None:
    """Raises UserError where matplotlib, which `draw` needs, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--confusion needs matplotlib: pip install matplotlib") from None


def draw(counts: NDArray[np.int64], classes: Sequence[str], path: Path, software: str) -> None:
    """Draw the matrix as a PNG, each row as shares of its class, on a scale that also shows small shares. software: the
    PNG's Software entry. Raises RunError where the file cannot be written."""
    import warnings

    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(16.0, 3 + 0.25 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap="viridis", interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="class")
    if len(classes) <= 60:
        names = [printable(name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}") for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(classes)), names, fontsize=8, parse_math=False)
    if len(classes) <= 20:
        for row, column in np.argwhere(counts):
            color = "black" if shares[row, column] > 0.6 else "white"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(picture, ax=axes, label="share of the row's class")
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font does not have
        figure.savefig(temporary, dpi=100, metadata={"Software": software})
