"""From a checkpoint and images to Predictions: what `eval` and `predict` share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index, facts
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.evaluate import probabilities
from fasttrain.evaluation.predictions import Predictions
from fasttrain.models import build_on_meta, check_input_shape
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.views import views_by_name
from fasttrain.prepare import decoder_of, resolve_auto
from fasttrain.training.step import DTYPES


def predict(
    checkpoint_path: Path,
    open_index: Callable[[Recipe, list[str]], Index],
    ranks: Ranks,
    *,
    views: str = "center",
    sizes: tuple[int, ...] = (),
    interpolation: str = "bilinear",
    raw: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    decoder: str = "auto",
) -> Predictions | None:
    """The probabilities of a checkpoint's network for the images of an index, on rank 0; None on the other ranks.

    open_index: opens the images, given the checkpoint's recipe and classes. views, sizes: see `views_by_name`.
    interpolation: bilinear or bicubic. raw: the raw weights, where the checkpoint has averaged ones too. batch_size:
    images at once. workers: DALI threads, 0 for this rank's share of the cores. decoder: `machine.decoder`. Raises
    UserError where the checkpoint cannot be read or the network does not take these sizes, RunError where an image
    cannot be decoded or an answer is not finite.
    """
    model, recipe, classes = checkpoint.network(checkpoint_path, averaged=False if raw else None)
    crops = views_by_name(views, recipe.image_size, sizes)
    meta_model = build_on_meta(recipe, len(classes))
    for size in crops.sizes:
        check_input_shape(meta_model, recipe.arch, 2, size, "name other --sizes or --views")
    index = ranks.in_turn(lambda: open_index(recipe, classes))
    ranks.require_same({"network's classes": "\0".join(classes)} | facts(index, "input"))
    model.to(ranks.device).to(memory_format=torch.channels_last)
    machine = replace(recipe.machine, decoder=decoder)
    recipe = resolve_auto(replace(recipe, precision="auto", machine=machine), ranks.device)
    loader = EvalLoader(
        index,
        crops,
        batch_size,
        ranks.device,
        ranks.threads(workers),
        ranks.world,
        ranks.rank,
        interpolation,
        decoder_of(recipe, ranks.device),
    )
    images = len(loader.source.indices)
    with tqdm(total=images, unit="img", desc="images", disable=None if ranks.first else True) as bar:
        per_size = probabilities(model, len(classes), loader, ranks, DTYPES[recipe.precision], bar.update)
    if not ranks.first:
        return None
    probs = np.mean(np.stack(list(per_size.values())), axis=0) if len(per_size) > 1 else next(iter(per_size.values()))
    labels = index.labels if index.classes else None
    return Predictions(np.array(index.ids), np.array(classes), probs, labels, per_size if len(per_size) > 1 else {})
