"""`fasttrain ensemble` and `fasttrain score`: saved probabilities together, and submissions."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import (
    FILE,
)
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("files", metavar="FILE.npz…", nargs=-1, required=True, type=FILE)
@click.option("--weights", metavar="W,W,…", help="A weight for each file. Default: all the same.")
@click.option(
    "--fit",
    "fit_files",
    multiple=True,
    type=FILE,
    metavar="VAL.npz",
    help="Fit the weights greedily: the same models on labelled images, once for each file, in their order.",
)
@click.option("--out", type=FILE, metavar="FILE.npz", help="Write the fused probabilities.")
@click.option("--submission", "submission_path", type=FILE, metavar="FILE.csv", help="Write the challenge's CSV.")
def ensemble(
    files: tuple[Path, ...],
    weights: str | None,
    fit_files: tuple[Path, ...],
    out: Path | None,
    submission_path: Path | None,
) -> None:
    """Mean of the probabilities that `eval` or `predict` wrote for several models.

    Prints each file's own accuracy and the fused one, where labels are known, and how often the files agree.
    """
    from fasttrain.evaluation import predictions, submission
    from fasttrain.evaluation.ensemble import agreement, fuse, greedy_weights, load_alike
    from fasttrain.utils.text import printable

    if weights and fit_files:
        raise UserError("--weights and --fit exclude each other: fitting finds the weights")
    if out:
        predictions.check_overwritable(out)
    if submission_path:
        submission.check_overwritable(submission_path)
    shares: list[float] | None = None
    if weights:
        shares = _weights(weights, len(files))
    if fit_files:
        if len(fit_files) != len(files):
            raise UserError(f"--fit is given {len(fit_files)} times for {len(files)} files; name one for each of them")
        val = load_alike(fit_files)
        if val[0].labels is None:
            raise UserError(f"--fit {printable(fit_files[0])} has no labels; use files that `eval` wrote")
        shares = greedy_weights([each.probs for each in val], val[0].labels)
        fitted_classes = val[0].classes.tolist()
        del val
    members = load_alike(files)
    if fit_files and fitted_classes != members[0].classes.tolist():
        raise UserError("--fit: its files are of other classes than the files to be fused")
    fused = fuse([each.probs for each in members], shares)
    first = members[0]
    if out:
        predictions.save(replace(first, probs=fused, per_size={}), out)
    if submission_path:
        submission.write(submission_path, [str(each) for each in first.ids], fused.argmax(1).tolist())
    for at, (path, member) in enumerate(zip(files, members, strict=True)):
        share = f"weight {shares[at]:.3f}  " if shares else ""
        own = f"top-1 {predictions.scores(member.probs, first.labels).top1:.2%}  " if first.labels is not None else ""
        click.echo(f"{at:>3}  {own}{share}{printable(path)}")
    if len(members) > 1:
        click.echo("agreement of pairs (share of images given the same class):")
        for at, row in enumerate(agreement([each.probs for each in members])):
            click.echo(f"{at:>3}  " + " ".join(f"{each:6.1%}" for each in row))
    if first.labels is not None:
        scores = predictions.scores(fused, first.labels)
        click.echo(f"fused: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images")
    for path in filter(None, (out, submission_path)):
        click.echo(f"wrote {printable(path)}: {len(fused)} predictions")


def _weights(text: str, count: int) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(0 <= each < float("inf") for each in found) or not sum(found):
        raise UserError(f"--weights {text}: {count} numbers with commas, 0 or more and not all 0")
    whole = math.fsum(found)
    return [each / whole for each in found]


@click.command()
@click.argument("submission_path", metavar="SUBMISSION.csv", type=FILE)
@click.option("--labels", required=True, type=FILE, metavar="FILE.csv",
              help="Right classes: the line Image IDs,Labels, then id,class.")  # fmt: skip
def score(submission_path: Path, labels: Path) -> None:
    """Top-1 of a submission, which must name each image of the labels once, and no other."""
    from fasttrain.evaluation import submission

    top1, images = submission.score(submission_path, labels)
    click.echo(f"top-1 {top1:.4f} of {images} images")
