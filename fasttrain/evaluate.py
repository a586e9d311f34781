"""Top-1 and top-5 of a network over an evaluation pipeline."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fasttrain.config import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.dataset import Index
from fasttrain.distributed import Ranks
from fasttrain.kernels import mix
from fasttrain.meter import Scores
from fasttrain.pipelines.train import Images


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Images], index: Index, ranks: Ranks, precision: torch.dtype) -> Scores:
    """Scores of a network (in eval mode meanwhile) over all ranks' batches. With fewer than five classes top-5 is 1.

    precision: bfloat16 or float16 for autocast, float32 for none.
    """
    device = ranks.device
    training = model.training
    model.eval()
    labels = torch.from_numpy(index.labels)
    top = min(5, len(index.classes))
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for pixels, numbers in batches:
        target = labels[numbers].to(device, non_blocking=True)
        images = normalised(pixels, precision)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(images).logits
        hits = logits.float().topk(top, dim=1).indices == target[:, None]
        counts[0] += hits[:, 0].sum()
        counts[1] += hits.sum()
        counts[2] += len(target)
    model.train(training)
    first, five, images_seen = ranks.sum(counts).tolist()
    return Scores(first / images_seen, five / images_seen, images_seen)


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """A pipeline's uint8 [B, H, W, 3] as a network's input [B, 3, H, W], channels_last, without any mixing."""
    params = torch.from_numpy(mix.plain_params(len(pixels))).to(pixels.device, non_blocking=True)
    return mix.mix(pixels, params, IMAGENET_MEAN, IMAGENET_STD, dtype).images
