"""What a run carries from step to step, besides tensors and meters, and its form in meta.json."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fasttrain.evaluation.metrics import Scores, better
from fasttrain.losses.base import Loss


@dataclass
class Progress:
    """Where a run is.

    steps_done: steps trained so far. scores: those of the last evaluation, if it scored the weights of this step.
    criterion: the score by which `best` is chosen, one of `metrics.CRITERIA`. best: the best such score that was saved.
    best_on_disk: the one before the last save; it counts again if that save fails. peak: the best of all evaluations.
    stale: how many evaluations have not improved on it since.
    rewinds: how often the run went back to an earlier checkpoint. logged: for each loss, its means at the log points
    of this epoch.
    """

    steps_done: int = 0
    scores: Scores | None = None
    best: float | None = None
    best_on_disk: float | None = None
    criterion: str = "top1"
    peak: float | None = None
    stale: int = 0
    rewinds: int = 0
    logged: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, losses: Iterable[Loss], criterion: str = "top1") -> "Progress":
        """A run that has done no step."""
        return cls(logged={loss.name: [] for loss in losses}, criterion=criterion)

    @classmethod
    def from_meta(
        cls, meta: dict[str, Any], losses: Iterable[Loss], steps_per_epoch: int, criterion: str = "top1"
    ) -> "Progress":
        """A run that resumes from a checkpoint, given its meta.json.

        steps_per_epoch: of the run that resumes. Where it differs from the checkpoint's, the run resumes at the same
        share of the epoch.
        """
        return cls(
            steps_done=step_of(meta, steps_per_epoch),
            best=meta["best"],
            best_on_disk=meta["best"],
            criterion=criterion,
            peak=meta.get("peak", meta["best"]),
            stale=meta.get("stale", 0),
            rewinds=meta["rewinds"],
            logged={loss.name: [] for loss in losses} | meta["logged"],
        )

    def forget_best(self) -> None:
        """Choose the best anew: earlier scores cannot be compared with later ones."""
        self.best = self.best_on_disk = self.peak = None
        self.stale = 0

    def evaluated(self, scores: Scores) -> None:
        """Take the scores of the weights of this step."""
        self.scores = scores
        new = getattr(scores, self.criterion)
        improved = better(new, self.peak, self.criterion)
        self.peak, self.stale = (new, 0) if improved else (self.peak, self.stale + 1)

    def update_best(self, validates: bool) -> bool:
        """Whether the weights of this step are the best so far; if so, their score becomes `best`. Called right before
        they are saved. validates: the run has validation images. Without them the newest weights are the best, unless
        there are some with a score."""
        new = getattr(self.scores, self.criterion) if self.scores else None
        improved = better(new, self.best, self.criterion)
        self.best_on_disk = self.best
        if improved:
            self.best = new
        return improved or (not validates and self.best is None)

    def to_meta(self) -> dict[str, Any]:
        """The part of meta.json that `from_meta` reads, and the scores. The step itself is written by
        `checkpoint.save`."""
        return {
            "best": self.best,
            "peak": self.peak,
            "stale": self.stale,
            "scores": self.scores.to_dict() if self.scores else None,
            "rewinds": self.rewinds,
            "logged": {name: list(means) for name, means in self.logged.items()},  # a thread writes it later
        }


def step_of(meta: dict[str, Any], steps_per_epoch: int) -> int:
    """The step from which a run resumes, given a checkpoint's meta.json: the same share of the same epoch."""
    epoch, position = divmod(meta["step"], meta["epoch_steps"])
    return epoch * steps_per_epoch + position * steps_per_epoch // meta["epoch_steps"]
