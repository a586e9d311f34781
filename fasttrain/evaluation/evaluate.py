"""Runs a network on images: scores over one view during training, probabilities over any views afterwards."""

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.index import Index
from fasttrain.distributed.ranks import PeerFailure, Ranks
from fasttrain.evaluation.metrics import Scores, Sums
from fasttrain.kernels import mix
from fasttrain.losses.base import Output
from fasttrain.pipelines.eval_loader import Crops, EvalLoader
from fasttrain.utils.errors import RunError
from fasttrain.utils.tensors import to_device
from fasttrain.utils.text import printable


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Crops], index: Index, ranks: Ranks, precision: torch.dtype) -> Scores:
    """Scores of a network over all ranks' batches of one crop; it is in eval mode meanwhile.

    precision: bfloat16 or float16 for autocast, float32 for none. Raises EvaluationFailed on all ranks if one of them
    fails, for example because an image cannot be decoded.
    """
    device = ranks.device
    training = model.training
    model.eval()
    labels = torch.from_numpy(index.labels)
    sums, error = Sums(len(index.classes), device), None
    try:
        for (pixels,), indices in batches:
            target = to_device(labels[indices], device)
            logits = _logits(model, normalize(pixels, precision), precision)
            sums.add(logits.double().log_softmax(1), target, logits.isfinite().all(1))
    except Exception as caught:  # the other ranks wait for this one below
        error = caught
    model.train(training)
    if ranks.any(error is not None):
        raise EvaluationFailed() from error
    ranks.sum(sums.values)
    return sums.scores()


class EvaluationFailed(PeerFailure):
    """Evaluation failed on a rank. All ranks raise this together; on the one that failed, `__cause__` is the error."""


@torch.no_grad()
def probabilities(
    model: Callable[[Tensor], Output],
    classes: int,
    batches: EvalLoader,
    ranks: Ranks,
    precision: torch.dtype,
    advance: Callable[[int], object] = lambda images: None,
) -> dict[int, NDArray[np.float32]]:
    """Mean softmax over each size's views, {size: float32 [N, K]}: of all N images of the index on rank 0, and of the
    rank's own share on other ranks. classes: K. advance: called after each batch with its number of images. A network
    must be in eval mode. Raises RunError where an output is not finite.

    Views go through the network one after another, so memory never holds more activations than those of one batch at
    the largest size.
    """
    views = batches.source.views
    count, done = len(batches.source.indices), 0
    results = {size: np.empty((count, classes), np.float32) for size in views.sizes}
    for pixels, indices in batches:
        sums: dict[int, Tensor] = {}
        for crop, crop_pixels in zip(views.crops, pixels, strict=True):
            images = normalize(crop_pixels, precision)
            for view in (images, images.flip(3)) if views.flip else (images,):
                probs = _logits(model, view, precision).softmax(1)
                sums[crop.size] = sums[crop.size] + probs if crop.size in sums else probs
        for size, total in sums.items():
            rows = (total * (len(views.sizes) / len(views))).cpu().numpy()
            _require_finite(rows, batches.source.index, indices, f" at {size} pixels")
            results[size][done : done + len(indices)] = rows
        done += len(indices)
        advance(len(indices))
    return _of_all_ranks(results, ranks)


@torch.no_grad()
def whole_image_probabilities(
    graph: Callable[[Tensor], Tensor],
    classes: int,
    batches: EvalLoader,
    ranks: Ranks,
    advance: Callable[[int], object] = lambda images: None,
) -> NDArray[np.float32]:
    """The probabilities of a graph that crops images itself, float32 [N, K]; otherwise like `probabilities`. graph:
    maps uint8 [1, H, W, 3] to probabilities [1, K]. batches: of whole images."""
    results = np.empty((len(batches.source.indices), classes), np.float32)
    for number, ((pixels,), indices) in enumerate(batches):
        rows = graph(pixels).numpy()
        _require_finite(rows, batches.source.index, indices)
        results[number] = rows[0]
        advance(1)
    return _of_all_ranks({0: results}, ranks)[0]


def _require_finite(rows: NDArray[np.float32], index: Index, indices: Tensor, where: str = "") -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        path = printable(index.paths[int(indices[bad[0]])])
        raise RunError(f"the network's output for {path}{where} is not finite: it has diverged")


def _of_all_ranks(results: dict[int, NDArray[np.float32]], ranks: Ranks) -> dict[int, NDArray[np.float32]]:
    """All rows on rank 0, and the rank's own ones on other ranks."""
    if ranks.world == 1:
        return results
    shares = ranks.gather(results)
    return {size: np.concatenate([share.pop(size) for share in shares]) for size in list(results)}


def _logits(model: Callable[[Tensor], Output], images: Tensor, precision: torch.dtype) -> Tensor:
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        return model(images).logits.float()


def normalize(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a pipeline's uint8 [B, H, W, 3] into a network's input [B, 3, H, W], channels_last, without mixing."""
    return mix.mix(pixels, _plain(len(pixels), pixels.device), IMAGENET_MEAN, IMAGENET_STD, dtype).images


@lru_cache(maxsize=4)  # an evaluation has batches of at most two sizes, on one device
def _plain(batch: int, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(mix.plain_params(batch)), device)
