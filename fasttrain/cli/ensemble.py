"""`fasttrain ensemble` and `fasttrain score`: saved probabilities combined, and submissions."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import FILE
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fasttrain.evaluation.predictions import Predictions


@click.command(short_help="Average the probabilities of several models.")
@click.argument("files", metavar="FILE.npz…", nargs=-1, required=True, type=FILE)
@click.option("--weights", metavar="W,W,…", help="One weight per file. Default: equal weights.")
@click.option(
    "--fit",
    "fit_files",
    multiple=True,
    type=FILE,
    metavar="VAL.npz",
    help="Fit the weights greedily on the same models' probabilities of labeled images. Once per file, in order.",
)
@click.option(
    "--calibrate",
    "calibration_files",
    multiple=True,
    type=FILE,
    metavar="VAL.npz",
    help="Scale the average by a temperature fitted on the same models' probabilities of labeled images. Once per "
    "file, in order.",
)
@click.option("--out", type=FILE, metavar="FILE.npz", help="Write the averaged probabilities.")
@click.option("--metrics", "metrics_path", type=FILE, metavar="FILE.json",
              help="Write all scores, and each class's precision, recall and number of images.")  # fmt: skip
@click.option("--submission", "submission_path", type=FILE, metavar="FILE.csv", help="Write the challenge's CSV.")
def ensemble(
    files: tuple[Path, ...],
    weights: str | None,
    fit_files: tuple[Path, ...],
    calibration_files: tuple[Path, ...],
    out: Path | None,
    metrics_path: Path | None,
    submission_path: Path | None,
) -> None:
    """Average the probabilities that `eval` or `predict` wrote for several models.

    Prints each file's accuracy and the ensemble's, where labels are known, and how often two files agree.
    """
    import numpy as np

    from fasttrain.evaluation import calibration, metrics, predictions, submission
    from fasttrain.evaluation.ensemble import agreement, fuse, greedy_weights, load_members
    from fasttrain.utils.text import printable

    if weights and fit_files:
        raise UserError("--weights and --fit exclude each other: fitting finds the weights")
    if out:
        if any(out.resolve() == path.resolve() for path in (*files, *fit_files, *calibration_files)):
            raise UserError(f"--out {printable(out)} is one of the files to average; name another file")
        predictions.check_overwritable(out)
    if submission_path:
        submission.check_overwritable(submission_path)
    shares = _parse_weights(weights, len(files)) if weights else None
    temperature, fitted_classes = None, {}
    if fit_files:
        val, labels = _labeled("--fit", fit_files, len(files))
        shares = greedy_weights([member.probs for member in val], labels)
        fitted_classes["--fit"] = val[0].classes.tolist()
        del val  # its memory is needed for the files to average
    if calibration_files:
        val, labels = _labeled("--calibrate", calibration_files, len(files))
        temperature = calibration.temperature(fuse([member.probs for member in val], shares), labels)
        fitted_classes["--calibrate"] = val[0].classes.tolist()
        del val
    members = load_members(files)
    first = members[0]
    for option, classes in fitted_classes.items():
        if classes != first.classes.tolist():
            raise UserError(f"{option}: its files have other classes than the files to average")
    if metrics_path:
        if first.labels is None:
            raise UserError("--metrics needs labels, and these files have none")
        metrics.check_overwritable(metrics_path)
    ids = first.ids.tolist()
    if submission_path:
        submission.image_names(ids)  # raises before anything is written
    fused = fuse([member.probs for member in members], shares)
    if temperature is not None:
        fused = calibration.scaled(fused, temperature)
        click.echo(f"temperature {temperature:.4f}")
    if out:
        predictions.save(replace(first, probs=fused, per_size={}), out)
    if submission_path:
        numbers = np.array(submission.class_numbers(first.classes.tolist()))
        submission.write(submission_path, ids, numbers[fused.argmax(1)].tolist())
    for number, (path, member) in enumerate(zip(files, members, strict=True)):
        weight = f"weight {shares[number]:.3f}  " if shares else ""
        top1 = f"top-1 {metrics.scores(member.probs, first.labels).top1:.2%}  " if first.labels is not None else ""
        click.echo(f"{number:>3}  {top1}{weight}{printable(path)}")
    if len(members) > 1:
        click.echo("agreement of pairs (share of images given the same class):")
        for number, row in enumerate(agreement([member.probs for member in members])):
            click.echo(f"{number:>3}  " + " ".join(f"{share:6.1%}" for share in row))
    if first.labels is not None:
        scores = metrics.scores(fused, first.labels)
        click.echo(f"fused: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images")
        click.echo(metrics.summary(scores))
        if metrics_path:
            metrics.write(metrics_path, scores, first.classes.tolist())
            click.echo(f"wrote {printable(metrics_path)}")
    for path in filter(None, (out, submission_path)):
        click.echo(f"wrote {printable(path)}: {len(fused)} predictions")


def _labeled(option: str, files: tuple[Path, ...], count: int) -> "tuple[list[Predictions], NDArray[np.int64]]":
    """The members' predictions of labeled images, and the labels. count: of the files to average."""
    from fasttrain.evaluation.ensemble import load_members
    from fasttrain.utils.text import printable

    if len(files) != count:
        raise UserError(f"{option} is given {len(files)} times for {count} files; name one for each of them")
    members = load_members(files)
    if members[0].labels is None:
        raise UserError(f"{option} {printable(files[0])} has no labels; use files that `eval` wrote")
    return members, members[0].labels


def _parse_weights(text: str, count: int) -> list[float]:
    """`count` numbers that sum to 1, from text such as 2,1."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 <= weight <= 1e9 for weight in weights) or not sum(weights):
        raise UserError(f"--weights {text}: give {count} numbers with commas, between 0 and 1e9 and not all 0")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@click.command(short_help="Score a submission offline.")
@click.argument("submission_path", metavar="SUBMISSION.csv", type=FILE)
@click.option("--labels", required=True, type=FILE, metavar="FILE.csv",
              help="The right classes: the line Image IDs,Labels, then id,class.")  # fmt: skip
def score(submission_path: Path, labels: Path) -> None:
    """Top-1 of a submission, which must name each image of the labels once, and no other."""
    from fasttrain.evaluation import submission

    top1, images = submission.score(submission_path, labels)
    click.echo(f"top-1 {top1:.4f} of {images} images")
