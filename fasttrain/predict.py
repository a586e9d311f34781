"""From a checkpoint, or an exported file, and images to Predictions: what `eval` and `predict` share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fasttrain import exported
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index, facts
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.evaluate import probabilities, whole_image_probabilities
from fasttrain.evaluation.predictions import Predictions
from fasttrain.exported import Graph
from fasttrain.models import Classifier, build_on_meta, check_input_shape
from fasttrain.pipelines.eval_loader import INTERPOLATIONS, EvalLoader
from fasttrain.pipelines.views import WHOLE, views_by_name
from fasttrain.prepare import decoder_of, resolve_auto
from fasttrain.training.step import DTYPES
from fasttrain.utils.errors import UserError
from fasttrain.utils.progress_bar import progress_bar


def predict(
    path: Path,
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
    precision: str = "auto",
) -> Predictions | None:
    """The probabilities of a network for the images of an index, on rank 0; None on the other ranks.

    path: a checkpoint, a run or an exported file. open_index: opens the images, given the network's recipe and classes.
    views, sizes: see `views_by_name`. interpolation: bilinear or bicubic. raw: the raw weights, where the checkpoint
    has averaged ones too. batch_size: images at once. workers: DALI threads, 0 for this rank's share of the cores.
    decoder: `machine.decoder`. precision: the recipe's setting; graphs always compute in float32. Raises UserError
    where the network cannot be read or does not take these options, RunError where an image cannot be decoded or an
    answer is not finite.
    """
    if exported.is_exported(path):
        if raw:
            raise UserError("--raw: an exported file has one set of weights; export the run with --raw instead")
        model, recipe, classes = exported.network(path)
    else:
        model, recipe, classes = checkpoint.network(path, averaged=False if raw else None)
    crops = views_by_name(views, recipe.image_size, sizes)
    if interpolation not in INTERPOLATIONS:
        raise UserError(f"--interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}")
    if isinstance(model, Graph):
        model.check_views(crops, interpolation)
    else:
        meta_model = build_on_meta(recipe, len(classes))
        for size in crops.sizes:
            check_input_shape(meta_model, recipe.arch, 2, size, "name other --sizes or --views")
    index = ranks.in_turn(lambda: open_index(recipe, classes))
    ranks.require_same({"network's classes": "\0".join(classes)} | facts(index, "input"))
    try:
        machine = replace(recipe.machine, decoder=decoder, workers=workers)
        recipe = replace(recipe, precision="fp32" if isinstance(model, Graph) else precision, machine=machine)
    except ValueError as error:
        raise UserError(str(error)) from None
    recipe = resolve_auto(recipe, ranks.device)
    if isinstance(model, Classifier):
        model.to(ranks.device).to(memory_format=torch.channels_last)
    takes_pixels = isinstance(model, Graph) and model.config.takes_pixels
    loader = EvalLoader(
        index,
        WHOLE if takes_pixels else crops,
        1 if takes_pixels else batch_size,
        ranks.device,
        ranks.threads(workers),
        ranks.world,
        ranks.rank,
        interpolation,
        decoder_of(recipe, ranks.device),
    )
    images = len(loader.source.indices)
    with progress_bar(total=images, unit="img", desc="images", hidden=not ranks.first) as bar:
        if isinstance(model, Graph) and takes_pixels:
            rows = whole_image_probabilities(model.probabilities, len(classes), loader, ranks, bar.update)
            per_size = {recipe.image_size: rows}
        else:
            dtype = DTYPES[recipe.precision]
            per_size = probabilities(model, len(classes), loader, ranks, dtype, bar.update)
    if not ranks.first:
        return None
    probs = np.mean(np.stack(list(per_size.values())), axis=0) if len(per_size) > 1 else next(iter(per_size.values()))
    labels = index.labels if index.classes else None
    return Predictions(np.array(index.ids), np.array(classes), probs, labels, per_size if len(per_size) > 1 else {})
