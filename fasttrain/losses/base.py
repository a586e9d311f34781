"""What flows into and out of the losses: Batch, Output and Term; and the Loss protocol itself."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One rank's micro-batch as the network sees it: B rows, after the mix.

    labels: int64 [B], each row's own class.
    labels_mixed: int64 [B], the class of the image that was mixed in.
    lam: float32 [B], the share of `labels` in each row (1 where nothing was mixed in).
    mixed: whether this step mixes at all. The host knows it before the step, so a loss can skip a step without waiting
    for the device.
    partner: int64 or int32 [B], the row that was mixed into each row.
    views: rows are `views` augmented views of B / views images: view 0 of each image, then view 1 of each, and so on.
    teacher_logits: [B, K], a teacher's logits for the same rows, where a loss names a teacher (`Loss.teacher_run`).
    ema_logits: [B / views, K], the averaged network's logits for another view of each image, which is never mixed,
    where a loss reads them (`Loss.reads_ema`).
    class_weights: float32 [K], the factors of a loss that weighs classes (`Loss.class_weights_for`).
    log_shares: float32 [K], the logarithm of each class's share of the images that are drawn.
    epoch: epochs done before this step, as a fraction. progress: the share of the run done before this step, in [0, 1).
    Both are Python numbers, or float32 scalars on the device.
    """

    labels: Tensor
    labels_mixed: Tensor
    lam: Tensor
    mixed: bool
    partner: Tensor | None = None
    views: int = 1
    teacher_logits: Tensor | None = None
    ema_logits: Tensor | None = None
    class_weights: Tensor | None = None
    log_shares: Tensor | None = None
    epoch: float | Tensor = 0.0
    progress: float | Tensor = 0.0


class Output(NamedTuple):
    """What a network returns.

    logits: [B, K]. features: [B, D], the pooled features that enter the classifier. Both are in the autocast dtype.
    cosine: float32 [B, K], the cosines of a cosine head. embedding: float32 [B, E], unit vectors of a projection head.
    Both heads exist in training only.
    """

    logits: Tensor
    features: Tensor
    cosine: Tensor | None = None
    embedding: Tensor | None = None


class Term(NamedTuple):
    """The value of a loss for a batch. loss: float32 scalar, already weighted. stats: scalars to log, by name, detached
    and on the device."""

    loss: Tensor
    stats: Mapping[str, Tensor] = MappingProxyType({})


class Classes(NamedTuple):
    """The K classes of a run. names: K, in the order of the outputs. images: float64 [K], how many images each has.
    shares: float64 [K], the share of each in the images that are drawn. Both are on the CPU."""

    names: Sequence[str]
    images: Tensor
    shares: Tensor


class Loss(Protocol):
    """A loss is a frozen dataclass: its fields are its settings, and calling it returns its Term.

    The class attributes say what a loss needs; the rest of the code reads nothing else, so a new loss is one new file.
    """

    name: ClassVar[str]
    """In recipes and logs."""
    classifies: ClassVar[bool] = True
    """It trains the classifier. A recipe needs one such loss."""
    fine_tunes: ClassVar[bool] = False
    """It does not converge from random weights."""
    cosine_head: ClassVar[bool] = False
    """It reads `Output.cosine`."""
    projection_head: ClassVar[bool] = False
    """It reads `Output.embedding`."""
    views: ClassVar[int] = 1
    """Augmented views of each image that it needs."""
    reads_ema: ClassVar[bool] = False
    """It reads `Batch.ema_logits`, so weights must be averaged (ema.decay)."""
    unmixed: ClassVar[bool] = False
    """It returns no term for a step that mixes images."""
    groups: ClassVar[bool] = False
    """It needs several images of each class in a batch (images_per_class)."""
    stats: ClassVar[tuple[str, ...]] = ()
    """Names of `Term.stats`."""

    @property
    def weight(self) -> float:
        """Factor of the loss. Calling the loss multiplies by it; the training step only adds the terms."""
        ...

    def __call__(self, output: Output, batch: Batch) -> Term | None:
        """The loss of a batch; None if it does not apply to this batch."""
        ...

    def teacher_run(self) -> str | None:
        """The run or checkpoint whose frozen network gives `Batch.teacher_logits`; None for a loss without a teacher.
        Raises UserError if it must be set and is not."""
        return None

    def class_weights_for(self, classes: Classes) -> Tensor | None:
        """`Batch.class_weights`, for a loss that weighs classes. Raises UserError where it names a class that is not
        there."""
        return None

    def against_imbalance(self) -> list[str]:
        """What the loss does about classes of unequal size, for the log."""
        return []

    def collapsed(self, losses: list[float]) -> bool:
        """Whether an epoch's logged means of this loss show that all images have become alike to the network."""
        return False


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; other dtypes as they are. Losses compute in float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def over_both_labels(label_fn: "LabelFn", batch: Batch) -> Tensor:
    """λ·L(own label) + (1−λ)·L(label mixed in) for each row, [B]. A step that does not mix skips the second term."""
    loss = label_fn(batch.labels)
    if not batch.mixed:
        return loss
    return torch.lerp(label_fn(batch.labels_mixed), loss, batch.lam.to(loss.dtype))


class LabelFn(Protocol):
    """Maps each row's label, int64 [B], to a value per row, [B]."""

    def __call__(self, labels: Tensor, /) -> Tensor: ...
