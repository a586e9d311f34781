"""What an evaluation measures, computed from integer sums: the same to the last bit for any number of ranks."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain.config.choices import CRITERIA
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_json_object, replacing, require_writable_folder
from fasttrain.utils.text import printable

TOP = 5
BINS = 15  # of the calibration error, of equal width
LOWER_IS_BETTER = ("log_loss", "calibration_error")
_TITLES = ("top-1", "top-5", "balanced accuracy", "macro F1", "log-loss", "calibration error")
NAMES = dict(zip(CRITERIA, _TITLES, strict=True))

_UNIT = 1 << 32  # losses and probabilities are summed in parts of 1
_SMALLEST = math.log(np.finfo(np.float64).eps)  # of log probabilities, as in scikit-learn's log_loss
_ENTRIES = 1 << 22  # probabilities that are added at once
_TOTALS = ("images", "first", "top", "bad", "loss")


@dataclass(frozen=True, eq=False)
class PerClass:
    """precision, recall: float64 [K], NaN for a class without answers or without images. count: int64 [K], images."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    count: NDArray[np.int64]

    def to_dict(self) -> dict[str, list[Any]]:
        """As JSON can hold it: shares with 6 digits, None instead of NaN."""

        def rounded(shares: NDArray[np.float64]) -> list[float | None]:
            return [None if math.isnan(share) else round(share, 6) for share in shares.tolist()]

        return {"precision": rounded(self.precision), "recall": rounded(self.recall), "count": self.count.tolist()}


class Scores(NamedTuple):
    """Of `images` images. top1, top5: shares of right answers; with five classes or fewer top5 is 1.

    not_finite: how many images have outputs that are not finite. They count as wrong, and in no other score.
    balanced_accuracy: the mean recall of the classes that have images. macro_f1: the mean F1 of the classes that have
    images or answers. log_loss: the mean negative log probability of the right class, in nats. calibration_error: the
    expected calibration error (Guo et al. 2017) over BINS bins. None where no output is finite.
    """

    top1: float
    top5: float
    images: int
    not_finite: int = 0
    balanced_accuracy: float | None = None
    macro_f1: float | None = None
    log_loss: float | None = None
    calibration_error: float | None = None
    per_class: PerClass | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores as the log and checkpoints store them, without those of classes; not_finite only where it is above
        0."""
        values = {name: value for name, value in self._asdict().items() if value is not None and name != "per_class"}
        return {name: value for name, value in values.items() if value or name != "not_finite"}


class Sums:
    """The sums from which the scores of K classes follow. `values`, int64, may be added over ranks."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        # _TOTALS; then of each bin its images, probabilities and right answers; then of each class its images, answers
        # and right answers.
        self.values = torch.zeros(len(_TOTALS) + 3 * BINS + 3 * classes, dtype=torch.int64, device=device)

    def add(self, log_probs: Tensor, labels: Tensor, finite: Tensor) -> None:
        """Add a batch. log_probs: float64 [B, K]. labels: int64 [B]. finite: bool [B]; rows without count as wrong."""
        number = torch.arange(self.classes, device=labels.device)
        own = log_probs.gather(1, labels[:, None])
        # On a tie the first class ranks higher.
        rank = ((log_probs > own) | ((log_probs == own) & (number < labels[:, None]))).sum(1)
        best = log_probs.max(1).values
        answers = torch.where(log_probs == best[:, None], number, self.classes - 1).min(1).values
        right = (rank == 0) & finite
        loss = _parts(-own[:, 0].clamp(min=_SMALLEST), finite)
        confidence = best.clamp(max=0).exp()
        bins = (confidence.nan_to_num() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        totals = torch.stack([finite.new_ones(len(labels)), right, (rank < TOP) & finite, ~finite]).long().sum(1)
        self.values += torch.cat(
            [
                totals,
                loss.sum()[None],
                _counts(bins, finite.long(), BINS),
                _counts(bins, _parts(confidence, finite), BINS),
                _counts(bins, right.long(), BINS),
                _counts(labels, torch.ones_like(labels), self.classes),
                _counts(answers, finite.long(), self.classes),
                _counts(labels, right.long(), self.classes),
            ]
        )

    def scores(self) -> Scores:
        """The scores of all images that were added; at least one."""
        values = self.values.cpu().numpy()
        images, first, top, bad, loss = values[: len(_TOTALS)].tolist()
        bins = values[len(_TOTALS) : len(_TOTALS) + 3 * BINS].reshape(3, BINS)
        count, answers, right = values[len(_TOTALS) + 3 * BINS :].reshape(3, self.classes)
        good = images - bad
        with np.errstate(invalid="ignore"):
            per_class = PerClass(right / answers, right / count, count)
            f1 = 2 * right / (count + answers)
        gaps = np.abs(bins[1] / _UNIT - bins[2])
        return Scores(
            top1=first / images,
            top5=top / images,
            images=images,
            not_finite=bad,
            balanced_accuracy=float(np.nanmean(per_class.recall)),
            macro_f1=float(np.nanmean(f1)),
            log_loss=loss / _UNIT / good if good else None,
            calibration_error=float(gaps.sum()) / good if good else None,
            per_class=per_class,
        )


def _parts(values: Tensor, finite: Tensor) -> Tensor:
    """Values as whole parts of 1, whose sums do not depend on their order; 0 where they are not finite."""
    return torch.where(finite, values, 0.0).mul(_UNIT).round().long()


def _counts(places: Tensor, amounts: Tensor, size: int) -> Tensor:
    """The sum of the amounts at each place, int64 [size]."""
    return amounts.new_zeros(size).index_add_(0, places, amounts)


def scores(probs: NDArray[np.floating], labels: NDArray[np.int64]) -> Scores:
    """The scores of probabilities [N, K] for labels, int64 [N]."""
    sums = Sums(probs.shape[1], torch.device("cpu"))
    rows = max(1, _ENTRIES // probs.shape[1])
    for start in range(0, len(labels), rows):
        some = torch.from_numpy(np.asarray(probs[start : start + rows], np.float64))
        sums.add(some.log(), torch.from_numpy(labels[start : start + rows]), some.isfinite().all(1))
    return sums.scores()


def better(new: float | None, old: float | None, criterion: str) -> bool:
    """Whether a score is better than another, where None is no score."""
    if new is None or old is None:
        return new is not None
    return new < old if criterion in LOWER_IS_BETTER else new > old


def described(name: str, value: float) -> str:
    """A score by its name, with its value as people read it."""
    return f"{NAMES[name]} {value:.4f}" if name == "log_loss" else f"{NAMES[name]} {value:.2%}"


def summary(found: Scores) -> str:
    """The scores that are not accuracies of single answers, in one line."""
    values = {name: getattr(found, name) for name in NAMES if name not in ("top1", "top5")}
    return ", ".join(described(name, value) for name, value in values.items() if value is not None)


def check_overwritable(path: Path) -> None:
    """Raises UserError where `path` has no folder that can be written to, or exists and was not made by `write`."""
    require_writable_folder(path)
    if path.exists() and "fasttrain_metrics" not in read_json_object(path):
        raise UserError(f"{printable(path)} exists and holds no metrics; name another file")


def write(path: Path, found: Scores, classes: Sequence[str]) -> None:
    """Write all scores as JSON. classes: the names of the K classes. Raises UserError like `check_overwritable`,
    RunError where the file cannot be written."""
    check_overwritable(path)
    of_classes = found.per_class.to_dict() if found.per_class else {}
    content = {"fasttrain_metrics": 1, **found.to_dict(), "classes": list(map(printable, classes)), **of_classes}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
