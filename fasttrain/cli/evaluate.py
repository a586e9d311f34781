"""`fasttrain eval` and `fasttrain predict`: a checkpoint's or an exported network on images."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain.cli.options import (
    DATA,
    FILE,
    PNG_SOFTWARE,
    GroupedCommand,
    data_option,
    evaluation_option,
    links_option,
    machine_option,
    output_option,
    require_png,
    writes_files,
)
from fasttrain.config.choices import DECODERS, DEVICES
from fasttrain.utils.decoder_messages import shown_once
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    from fasttrain.config.schema import Recipe
    from fasttrain.data.index import Index
    from fasttrain.data.scan import Limits
    from fasttrain.evaluation.predictions import Predictions

_NETWORK_OPTIONS = (
    evaluation_option("--views", type=click.Choice(["center", "report", "tencrop"]), default="center",
                      show_default=True, help="Views of each image, whose probabilities are averaged: a central crop; "
                      "the report's 16 (4 sizes, 2 crops, mirrored or not); ten crops."),
    evaluation_option("--sizes", metavar="N,N,…", help="Sizes of the crops, in pixels. Default: by the training size."),
    evaluation_option("--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear",
                      show_default=True, help="Of the resize."),
    evaluation_option("--raw", is_flag=True, help="Use the raw weights where the checkpoint also has averaged ones."),
    machine_option("--device", type=click.Choice(DEVICES), default="auto", show_default=True,
                   help="auto: a GPU where there is one."),
    machine_option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at once."),
    machine_option("--workers", type=click.IntRange(0, 1024), default=0, show_default=True,
                   help="DALI threads; 0: this rank's share of the cores."),
    machine_option("--decoder", type=click.Choice(DECODERS), default="auto", show_default=True,
                   help="What decodes the images on a GPU; see machine.decoder in `fasttrain recipes NAME`."),
)  # fmt: skip


def _network_command(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the argument and the options of a command that puts images through a checkpoint's network."""
    for option in reversed(_NETWORK_OPTIONS):
        command = option(command)
    return click.argument("checkpoint_path", metavar="CKPT", type=click.Path(path_type=Path))(command)


def _predict(
    checkpoint_path: Path,
    open_index: "Callable[[Recipe, list[str]], Index]",
    *,
    device: str,
    sizes: str | None,
    **options: Any,
) -> "Predictions | None":
    from fasttrain import exported
    from fasttrain.data.message_names import MessageNames
    from fasttrain.distributed.ranks import ranks
    from fasttrain.evaluation.cross_validation import fold_runs
    from fasttrain.predict import predict

    runs = fold_runs(checkpoint_path) or [checkpoint_path]
    if len(runs) > 1 and writes_files():
        click.echo(f"the mean of {len(runs)} runs", err=True)
    if exported.is_graph(checkpoint_path):
        if device == "cuda":
            raise UserError(f"--device cuda: {checkpoint_path.suffix} files run on the CPU here; leave --device out")
        device = "cpu"
    pixels = () if sizes is None else _parse_sizes(sizes)
    opened: list[Index] = []

    def open_once(recipe: "Recipe", classes: list[str]) -> "Index":
        opened.append(open_index(recipe, classes))
        return opened[-1]

    with shown_once() as messages, ranks(device) as rank:
        members = [predict(run, open_once, rank, sizes=pixels, **options) for run in runs]
        predicted = _mean(members) if len(runs) > 1 else members[0]
        with MessageNames(messages, lambda line: click.echo(line, err=True)) as names:
            names.look(lambda: opened[0].paths if opened[0].store is None else ())
        return predicted


def _mean(members: "list[Predictions | None]") -> "Predictions | None":
    """The mean of several networks' probabilities of the same images; None on ranks that have none."""
    from dataclasses import replace

    from fasttrain.evaluation.ensemble import fuse

    found = [member for member in members if member is not None]
    if not found:
        return None
    if any(member.classes.tolist() != found[0].classes.tolist() for member in found):
        raise UserError("the folder's runs do not have the same classes; name one of them")
    per_size = {size: fuse([member.per_size[size] for member in found]) for size in found[0].per_size}
    return replace(found[0], probs=fuse([member.probs for member in found]), per_size=per_size)


def _limits(recipe: "Recipe", links: str) -> "Limits":
    """What a scan takes: the training run's limit of pixels, and these links."""
    from fasttrain.data.scan import Limits

    return Limits.of(recipe.data)._replace(links=links)


def _parse_sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--sizes {text}: give numbers of pixels with commas, as in 224,320")
    return tuple(map(int, parts))


@click.command("eval", cls=GroupedCommand, short_help="Evaluate a checkpoint on labeled images.")
@_network_command
@data_option("--data", required=True, type=DATA, metavar="DIR|FILE",
             help="Labeled images: DIR, DIR/val where DIR holds train/ and val/, or a file as in `run`.")  # fmt: skip
@links_option
@output_option("--out", type=FILE, metavar="FILE.npz", help="Write the probabilities.")
@output_option("--metrics", "metrics_path", type=FILE, metavar="FILE.json",
               help="Write all scores, and each class's precision, recall and number of images.")  # fmt: skip
@output_option("--confusion", "confusion_path", type=FILE, metavar="FILE.png", help="Draw the confusion matrix.")
def evaluate_(
    checkpoint_path: Path,
    data: str,
    links: str,
    out: Path | None,
    metrics_path: Path | None,
    confusion_path: Path | None,
    **options: Any,
) -> None:
    """The scores of a checkpoint on labeled images, the worst classes and the most confused pairs.

    CKPT is a run's folder (its best checkpoint), `last` or `best` in it, or a checkpoint's folder; the folder of `run
    --folds`, for the mean of its runs; or a file of `fasttrain export`. A .pt2 file can run code when it is opened.
    """
    from fasttrain.data.open_data import open_labeled
    from fasttrain.evaluation import confusion, metrics, predictions
    from fasttrain.utils.text import printable

    def open_index(recipe: "Recipe", classes: list[str]) -> "Index":
        return open_labeled(data, classes, checkpoint_path, _limits(recipe, links))

    if out and writes_files():
        predictions.check_overwritable(out)
    if metrics_path and writes_files():
        metrics.check_overwritable(metrics_path)
    if confusion_path and writes_files():
        require_png(confusion_path, "--confusion")
        confusion.require_matplotlib()
    predicted = _predict(checkpoint_path, open_index, **options)
    if predicted is None or predicted.labels is None:
        return
    answers, classes = predicted.probs.argmax(1), [str(name) for name in predicted.classes]
    for size, probs in predicted.per_size.items():
        scores = metrics.scores(probs, predicted.labels)
        click.echo(f"{size:>5} px: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}")
    scores = metrics.scores(predicted.probs, predicted.labels)
    fused = "   fused: " if predicted.per_size else ""
    click.echo(f"{fused}top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images")
    click.echo(metrics.summary(scores))
    click.echo(confusion.summary(predicted.labels, answers, classes))
    if out:
        predictions.save(predicted, out)
        click.echo(f"wrote {printable(out)}")
    if metrics_path:
        metrics.write(metrics_path, scores, classes)
        click.echo(f"wrote {printable(metrics_path)}")
    if confusion_path:
        confusion.draw(predicted.labels, answers, classes, confusion_path, PNG_SOFTWARE)
        click.echo(f"wrote {printable(confusion_path)}")


@click.command(cls=GroupedCommand, short_help="Save probabilities of images without labels.")
@_network_command
@data_option(
    "--images",
    required=True,
    type=DATA,
    metavar="DIR|FILE",
    help="Images in DIR and its folders, or a file as in `run`.",
)
@links_option
@output_option("--out", required=True, type=FILE, metavar="FILE.npz", help="Write the probabilities here.")
def predict(checkpoint_path: Path, images: str, links: str, out: Path, **options: Any) -> None:
    """Probabilities of images without labels.

    CKPT is a run's folder (its best checkpoint), `last` or `best` in it, or a checkpoint's folder; the folder of `run
    --folds`, for the mean of its runs; or a file of `fasttrain export`. A .pt2 file can run code when it is opened.
    """
    from fasttrain.data.open_data import open_unlabeled
    from fasttrain.evaluation import predictions
    from fasttrain.utils.text import printable

    if writes_files():
        predictions.check_overwritable(out)

    def open_index(recipe: "Recipe", classes: list[str]) -> "Index":
        return open_unlabeled(images, _limits(recipe, links))

    predicted = _predict(checkpoint_path, open_index, **options)
    if predicted is not None:
        predictions.save(predicted, out)
        click.echo(f"wrote {printable(out)}: {len(predicted)} images, {len(predicted.classes)} classes")
