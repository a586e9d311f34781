"""`fasttrain eval` and `fasttrain predict`: a checkpoint's network on images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain.cli.options import (
    DECODERS,
    FILE,
    FOLDER,
    PNG_SOFTWARE,
    require_png,
    writes,
)
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    from fasttrain.config.schema import Recipe
    from fasttrain.data.index import Index
    from fasttrain.evaluation.predictions import Predictions


def _sizes(text: str) -> tuple[int, ...]:
    parts = [each.strip() for each in text.split(",")]
    if not all(each.isascii() and each.isdigit() for each in parts):
        raise UserError(f"--sizes {text}: numbers of pixels with commas, as in 224,320")
    return tuple(map(int, parts))


_network_options = (
    click.option("--views", type=click.Choice(["center", "report", "tencrop"]), default="center", show_default=True,
                 help="Of each image: a central crop; the report's 16 (4 sizes, 2 crops, mirrored or not); ten crops."),
    click.option("--sizes", metavar="N,N,…", help="Sides of the crops in pixels, instead of the views' own."),
    click.option("--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear", show_default=True),
    click.option("--raw", is_flag=True, help="The raw weights, where the checkpoint has averaged ones as well."),
    click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at once."),
    click.option("--workers", type=click.IntRange(0), default=0,
                 help="DALI threads. 0: this rank's share of the cores."),
    click.option("--decoder", type=click.Choice(DECODERS), default="auto", show_default=True,
                 help="On a GPU: what decodes the images (machine.decoder of `fasttrain recipes NAME`)."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
)  # fmt: skip


def _of_a_network(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that puts images through a checkpoint's network."""
    for option in reversed(_network_options):
        command = option(command)
    return click.argument("checkpoint_path", metavar="CKPT", type=click.Path(path_type=Path))(command)


def _predict(
    checkpoint_path: Path, open_index: "Callable[[Recipe, list[str]], Index]", **options: Any
) -> "Predictions | None":
    """What a checkpoint's network says of an index's images, on rank 0; None on the others."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from fasttrain.checkpoints import checkpoint
    from fasttrain.distributed.ranks import ranks
    from fasttrain.evaluation.evaluate import probabilities
    from fasttrain.evaluation.predictions import Predictions
    from fasttrain.models import build_on_meta, check_input_shape
    from fasttrain.pipelines.eval_loader import EvalLoader
    from fasttrain.pipelines.views import views_by_name
    from fasttrain.prepare import decoder_of, resolve_auto
    from fasttrain.training.step import DTYPES

    sizes = () if options["sizes"] is None else _sizes(options["sizes"])
    with ranks(options["device"]) as here:
        model, recipe, classes = checkpoint.network(checkpoint_path, averaged=False if options["raw"] else None)
        views = views_by_name(options["views"], recipe.image_size, sizes)
        outline = build_on_meta(recipe, len(classes))
        for size in views.sizes:
            check_input_shape(outline, recipe.arch, 2, size, "name other --sizes or --views")
        index = here.in_turn(lambda: open_index(recipe, classes))
        model.to(here.device).to(memory_format=torch.channels_last)
        machine = replace(recipe.machine, decoder=options["decoder"])
        recipe = resolve_auto(replace(recipe, precision="auto", machine=machine), here.device)
        precision, threads = DTYPES[recipe.precision], here.threads(options["workers"])
        share = options["batch_size"], here.device, threads, here.world, here.rank
        batches = EvalLoader(index, views, *share, options["interpolation"], decoder_of(recipe, here.device))
        total = len(batches.source.numbers)
        with tqdm(total=total, unit="img", desc="images", disable=None if here.first else True) as bar:
            per_size = probabilities(model, len(classes), batches, here, precision, bar.update)
        if not here.first:
            return None
    probs = np.mean(np.stack(list(per_size.values())), axis=0) if len(per_size) > 1 else next(iter(per_size.values()))
    labels = index.labels if index.classes else None
    return Predictions(np.array(index.ids), np.array(classes), probs, labels, per_size if len(per_size) > 1 else {})


@click.command("eval")
@_of_a_network
@click.option("--data", required=True, type=FOLDER, metavar="DIR",
              help="Labelled images: DIR, or DIR/val where DIR holds train/ and val/.")  # fmt: skip
@click.option("--out", type=FILE, metavar="FILE.npz", help="Write the probabilities.")
@click.option("--confusion", "confusion_path", type=FILE, metavar="FILE.png", help="Draw the confusion matrix.")
def evaluate_(checkpoint_path: Path, data: str, out: Path | None, confusion_path: Path | None, **options: Any) -> None:
    """Top-1 and top-5 of a checkpoint over a folder of class folders; worst classes, most confused pairs.

    CKPT is a checkpoint's folder, `last` or `best`, or a run's folder (its best).
    """
    from fasttrain.data import index as dataset
    from fasttrain.evaluation import confusion, predictions
    from fasttrain.utils.text import printable

    def labelled(recipe: "Recipe", classes: list[str]) -> "Index":
        index = dataset.open_labelled(data)
        dataset.require_classes(classes, checkpoint_path, index.classes, data)
        return index

    if out and writes():
        predictions.check_overwritable(out)
    if confusion_path and writes():
        require_png(confusion_path, "--confusion")
        confusion.require_matplotlib()
    found = _predict(checkpoint_path, labelled, **options)
    if found is None or found.labels is None:
        return
    counts = confusion.matrix(found.labels, found.probs.argmax(1), len(found.classes))
    names = [str(each) for each in found.classes]
    if out:
        predictions.save(found, out)
    if confusion_path:
        confusion.draw(counts, names, confusion_path, PNG_SOFTWARE)
    for size, probs in found.per_size.items():
        of_size = predictions.scores(probs, found.labels)
        click.echo(f"{size:>5} px: top-1 {of_size.top1:.2%}, top-5 {of_size.top5:.2%}")
    scores = predictions.scores(found.probs, found.labels)
    fused = "   fused: " if found.per_size else ""
    click.echo(f"{fused}top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images")
    click.echo(confusion.told(counts, names))
    for path in filter(None, (out, confusion_path)):
        click.echo(f"wrote {printable(path)}")


@click.command()
@_of_a_network
@click.option("--images", required=True, type=FOLDER, metavar="DIR", help="Images, in DIR and folders inside it.")
@click.option("--out", required=True, type=FILE, metavar="FILE.npz", help="Where to write the probabilities.")
def predict(checkpoint_path: Path, images: str, out: Path, **options: Any) -> None:
    """Probabilities of images without labels.

    CKPT is a checkpoint's folder, `last` or `best`, or a run's folder (its best).
    """
    from fasttrain.data import index as dataset
    from fasttrain.evaluation import predictions
    from fasttrain.utils.text import printable

    if writes():
        predictions.check_overwritable(out)
    found = _predict(checkpoint_path, lambda recipe, classes: dataset.scan_unlabelled(images), **options)
    if found is not None:
        predictions.save(found, out)
        click.echo(f"wrote {printable(out)}: {len(found)} images, {len(found.classes)} classes")
