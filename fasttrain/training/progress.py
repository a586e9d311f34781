"""What a run carries from step to step, besides tensors and meters, and its form in meta.json."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fasttrain.evaluation.predictions import Scores
from fasttrain.losses.base import Loss


@dataclass
class Progress:
    """Where a run is.

    steps_done: steps trained so far. scores: those of the last evaluation, if it scored the weights of this step.
    best: the best top-1 so far. best_on_disk: the best top-1 before the last save; it counts again if that save fails.
    rewinds: how often the run went back to an earlier checkpoint. logged: for each loss, its means at the log points
    of this epoch.
    """

    steps_done: int = 0
    scores: Scores | None = None
    best: float | None = None
    best_on_disk: float | None = None
    rewinds: int = 0
    logged: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, losses: Iterable[Loss]) -> "Progress":
        """A run that has done no step."""
        return cls(logged={loss.name: [] for loss in losses})

    @classmethod
    def from_meta(cls, meta: dict[str, Any], losses: Iterable[Loss], steps_per_epoch: int) -> "Progress":
        """A run that resumes from a checkpoint, given its meta.json.

        steps_per_epoch: of the run that resumes. Where it differs from the checkpoint's, the run resumes at the same
        share of the epoch.
        """
        return cls(
            steps_done=step_of(meta, steps_per_epoch),
            best=meta["best"],
            best_on_disk=meta["best"],
            rewinds=meta["rewinds"],
            logged={loss.name: [] for loss in losses} | meta["logged"],
        )

    def update_best(self, validates: bool) -> bool:
        """Whether the weights of this step are the best so far; if so, their top-1 becomes `best`. Called right before
        they are saved. validates: the run has validation images. Without them the newest weights are the best, unless
        there are some with a score."""
        improved = bool(self.scores and (self.best is None or self.scores.top1 > self.best))
        self.best_on_disk = self.best
        if self.scores and improved:
            self.best = self.scores.top1
        return improved or (not validates and self.best is None)

    def to_meta(self) -> dict[str, Any]:
        """The part of meta.json that `from_meta` reads, and the scores. The step itself is written by
        `checkpoint.save`."""
        return {
            "best": self.best,
            "scores": self.scores.to_dict() if self.scores else None,
            "rewinds": self.rewinds,
            "logged": {name: list(means) for name, means in self.logged.items()},  # a thread writes it later
        }


def step_of(meta: dict[str, Any], steps_per_epoch: int) -> int:
    """The step from which a run resumes, given a checkpoint's meta.json: the same share of the same epoch."""
    epoch, position = divmod(meta["step"], meta["epoch_steps"])
    return epoch * steps_per_epoch + position * steps_per_epoch // meta["epoch_steps"]
