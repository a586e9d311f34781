"""What flows between the parts: a Batch into the losses, an Output out of the network, and the Loss protocol."""

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """One rank's micro-batch of B images, after the mix.

    labels: int64 [B], each image's own class; labels_mixed: int64 [B], the class of the image that was mixed in.
    lam: float32 [B], the share of `labels` in the image (1 where nothing was mixed in).
    mixed: whether this step mixes at all. It is known on the host before the step, so a loss can leave itself out
    without asking the device.
    """

    labels: Tensor
    labels_mixed: Tensor
    lam: Tensor
    mixed: bool


class Output(NamedTuple):
    """What a network gives: logits [B, K] and pooled, pre-classifier features [B, D], in the autocast dtype."""

    logits: Tensor
    features: Tensor


class Loss(Protocol):
    """A frozen dataclass: its fields are its settings, calling it gives a scalar float32 loss (already weighted)."""

    name: ClassVar[str]

    def __call__(self, output: Output, batch: Batch) -> Tensor: ...
