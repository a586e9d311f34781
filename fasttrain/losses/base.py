"""What flows between the parts: a Batch into the losses, an Output out of the network, and what a loss is."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One rank's micro-batch as the network sees it: B rows, after the mix.

    labels: int64 [B], each row's own class; labels_mixed: int64 [B], the class of what was mixed in.
    lam: float32 [B], the share of `labels` in the row (1 where nothing was mixed in).
    mixed: whether this step mixes at all. It is known on the host before the step, so a loss can leave itself out
    without asking the device.
    teacher_logits: [B, K], what the teacher says of the same rows, where a loss asks for a teacher.
    views: the rows are so many augmented views of B / views images: first view 0 of each, then view 1 of each …
    averaged_probs: float32 [B, K], what the averaged network says of another view of each row's image, mixed as the
    rows are, where a loss asks for it.
    epoch: epochs done before this step, with fractions. progress: the share of the run's steps done before it, in
    [0, 1). Both are numbers of the host, or float32 scalars on the device.
    """

    labels: Tensor
    labels_mixed: Tensor
    lam: Tensor
    mixed: bool
    teacher_logits: Tensor | None = None
    views: int = 1
    averaged_probs: Tensor | None = None
    epoch: float | Tensor = 0.0
    progress: float | Tensor = 0.0


class Output(NamedTuple):
    """What a network gives, in the autocast dtype: logits [B, K] and pooled, pre-classifier features [B, D]; and in
    training only, in float32, from a cosine head cosine [B, K], of the angle to each class's weight, and from a
    projection head embedding [B, E], of length 1."""

    logits: Tensor
    features: Tensor
    cosine: Tensor | None = None
    embedding: Tensor | None = None


class Term(NamedTuple):
    """What a loss gives for a batch. loss: scalar float32, already weighted. stats: scalars by name, detached and on
    the device, to be logged beside it."""

    loss: Tensor
    stats: Mapping[str, Tensor] = MappingProxyType({})


class Loss(Protocol):
    """A frozen dataclass: its fields are its settings, and calling it gives its Term, or None for a batch for which
    it has none.

    name: in recipes and logs. classifies: it trains the classifier. fine_tunes: it does not converge from random
    weights. cosine_head: it reads `Output.cosine`; projection_head: `Output.embedding`. views: how many of each image
    it needs; averaged: it reads `Batch.averaged_probs`. unmixed: it has no term where a step mixes. groups: it needs
    several images of each class in a batch. stats: names of the Term's.
    """

    name: ClassVar[str]
    classifies: ClassVar[bool] = True
    fine_tunes: ClassVar[bool] = False
    cosine_head: ClassVar[bool] = False
    projection_head: ClassVar[bool] = False
    views: ClassVar[int] = 1
    averaged: ClassVar[bool] = False
    unmixed: ClassVar[bool] = False
    groups: ClassVar[bool] = False
    stats: ClassVar[tuple[str, ...]] = ()

    @property
    def weight(self) -> float:
        """What it is multiplied by in the sum of a recipe's losses."""
        ...

    def __call__(self, output: Output, batch: Batch) -> Term | None: ...

    def collapsed(self, losses: list[float]) -> bool:
        """Whether an epoch's logged means of this loss say that the network has stopped telling images apart."""
        return False


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is: what losses compute in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def over_both_labels(against: "LabelFn", batch: Batch) -> Tensor:
    """λ·L(own label) + (1−λ)·L(label mixed in) for each row, [B]; without the second where the step does not mix."""
    loss = against(batch.labels)
    if not batch.mixed:
        return loss
    return torch.lerp(against(batch.labels_mixed), loss, batch.lam.to(loss.dtype))


class LabelFn(Protocol):
    """Something of each row and its label, int64 [B], as [B]: a loss, or what it takes of the label."""

    def __call__(self, labels: Tensor, /) -> Tensor: ...
