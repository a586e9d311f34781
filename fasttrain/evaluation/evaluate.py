"""What a network says of images: scores over one view while training, probabilities over any views afterwards."""

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.index import Index
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.predictions import Scores
from fasttrain.kernels import mix
from fasttrain.pipelines.eval_loader import Crops, EvalLoader
from fasttrain.utils.errors import RunError
from fasttrain.utils.tensors import to_device
from fasttrain.utils.text import printable

TOP = 5


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Crops], index: Index, ranks: Ranks, precision: torch.dtype) -> Scores:
    """Scores of a network (in eval mode meanwhile) over all ranks' batches of one crop. With fewer than five classes
    top-5 is 1. An answer that is not finite is wrong, and counted as such.

    precision: bfloat16 or float16 for autocast, float32 for none.
    """
    device = ranks.device
    training = model.training
    model.eval()
    labels = torch.from_numpy(index.labels)
    top = min(TOP, len(index.classes))
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    for (pixels,), numbers in batches:
        target = to_device(labels[numbers], device)
        logits = _logits(model, normalised(pixels, precision), precision)
        finite = logits.isfinite().all(1)  # topk ranks nan first
        hits = (logits.topk(top, dim=1).indices == target[:, None]) & finite[:, None]
        counts[0] += hits[:, 0].sum()
        counts[1] += hits.sum()
        counts[2] += len(target)
        counts[3] += (~finite).sum()
    model.train(training)
    first, five, images_seen, bad = ranks.sum(counts).tolist()
    return Scores(first / images_seen, five / images_seen, images_seen, bad)


@torch.no_grad()
def probabilities(
    model: nn.Module,
    classes: int,
    batches: EvalLoader,
    ranks: Ranks,
    precision: torch.dtype,
    advance: Callable[[int], object] = lambda images: None,
) -> dict[int, NDArray[np.float32]]:
    """Mean softmax over each size's views, {size: float32 [N, K]}: of all N images of the index on rank 0, and of a
    rank's own share on the others; classes: K. The network must be in eval mode. RunError where an answer is not
    finite.

    Views go through the network one after another, so that activations of one batch at the largest size are the most
    that is held at once. advance: called with the number of images done after each batch.
    """
    views = batches.source.views
    count, done = len(batches.source.numbers), 0
    found = {size: np.empty((count, classes), np.float32) for size in views.sizes}
    for pixels, numbers in batches:
        sums: dict[int, Tensor] = {}
        for crop, each in zip(views.crops, pixels, strict=True):
            images = normalised(each, precision)
            for seen in (images, images.flip(3)) if views.flip else (images,):
                chances = _logits(model, seen, precision).softmax(1)
                sums[crop.size] = sums[crop.size] + chances if crop.size in sums else chances
        for size, total in sums.items():
            found[size][done : done + len(numbers)] = (total * (len(views.sizes) / len(views))).cpu().numpy()
            bad = np.flatnonzero(~np.isfinite(found[size][done : done + len(numbers)]).all(1))
            if len(bad):
                path = batches.source.index.paths[int(numbers[bad[0]])]
                raise RunError(
                    f"the network's answer to {printable(path)} at {size} pixels is not finite: it has diverged"
                )
        done += len(numbers)
        advance(len(numbers))
    if ranks.world == 1:
        return found
    shares = ranks.gather(found)
    return {size: np.concatenate([share.pop(size) for share in shares]) for size in views.sizes}


def _logits(model: nn.Module, images: Tensor, precision: torch.dtype) -> Tensor:
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        return model(images).logits.float()


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """A pipeline's uint8 [B, H, W, 3] as a network's input [B, 3, H, W], channels_last, without any mixing."""
    return mix.mix(pixels, _plain(len(pixels), pixels.device), IMAGENET_MEAN, IMAGENET_STD, dtype).images


@lru_cache(maxsize=4)  # a pass has batches of two sizes, on one device
def _plain(batch: int, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(mix.plain_params(batch)), device)
