"""What the runs of k-fold cross-validation give together: probabilities of all images, and the mean score."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fasttrain.config import toml
from fasttrain.evaluation import metrics, predictions
from fasttrain.evaluation.predictions import Predictions
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_text
from fasttrain.utils.text import printable

RECIPE = "recipe.toml"
HELD_OUT, OUT_OF_FOLD = "held-out.npz", "out-of-fold.npz"
# Student's t for a two-sided interval of 95 %, by degrees of freedom from 1 on.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def fold_folder(out: Path, fold: int) -> Path:
    """The folder of a fold's run."""
    return out / f"fold-{fold}"


def fold_runs(out: Path) -> list[Path]:
    """The folders of the runs in a folder of cross-validation, in the order of the folds; empty in any other folder.
    Raises UserError where folds are missing, or their recipes are."""
    first = next((path for path in sorted(out.glob("fold-[0-9]*")) if path.is_dir()), None)
    if first is None or (out / RECIPE).exists():
        return []
    try:
        folds = toml.from_toml(read_text(first / RECIPE, toml.TEXT_LENGTH), where=printable(first / RECIPE)).data.folds
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {printable(first / RECIPE)}: {error}") from None
    runs = [fold_folder(out, fold) for fold in range(folds)]
    missing = [run for run in runs if not (run / HELD_OUT).exists()]
    if missing or not runs:
        raise UserError(
            f"{printable(out)} has {len(runs) - len(missing)} of {folds} folds; train the others with `run --folds "
            f"{folds}`, or name one of its runs"
        )
    return runs


def combine(out: Path, folds: int) -> str | None:
    """Write out-of-fold.npz, the probabilities of all images, each by the run that has not trained on it. Returns lines
    that say the scores; None where folds are missing."""
    paths = [fold_folder(out, fold) / HELD_OUT for fold in range(folds)]
    if not all(path.exists() for path in paths):
        return None
    parts = [predictions.load(path, per_size=False) for path in paths]
    labels = [part.labels for part in parts if part.labels is not None]
    scores = [metrics.scores(part.probs, of_part) for part, of_part in zip(parts, labels, strict=True)]
    ids = np.concatenate([part.ids for part in parts])
    order = np.argsort(ids, kind="stable")
    whole = Predictions(
        ids[order],
        parts[0].classes,
        np.concatenate([part.probs for part in parts])[order],
        np.concatenate(labels)[order],
    )
    predictions.save(whole, out / OUT_OF_FOLD)
    assert whole.labels is not None
    together = metrics.scores(whole.probs, whole.labels)
    return (
        f"{folds} folds: {spread('top-1', [each.top1 for each in scores])}\n"
        f"all {len(whole)} images, each by the run without it: top-1 {together.top1:.2%}, {metrics.summary(together)}"
    )


def spread(name: str, values: Sequence[float]) -> str:
    """The mean and its interval of 95 % by Student's t. The folds' runs share images, so the true interval is wider."""
    mean = float(np.mean(values))
    degrees = len(values) - 1
    if degrees < 1:
        return f"{name} {mean:.2%}"
    t = _T95[degrees - 1] if degrees <= len(_T95) else 1.96
    return f"{name} {mean:.2%} ± {t * float(np.std(values, ddof=1)) / math.sqrt(len(values)):.2%}"
