"""`fasttrain ensemble` and `fasttrain score`: saved probabilities combined, and submissions."""

import math
from dataclasses import replace
from pathlib import Path

import click

from fasttrain.cli.options import FILE
from fasttrain.utils.errors import UserError


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
@click.option("--out", type=FILE, metavar="FILE.npz", help="Write the averaged probabilities.")
@click.option("--submission", "submission_path", type=FILE, metavar="FILE.csv", help="Write the challenge's CSV.")
def ensemble(
    files: tuple[Path, ...],
    weights: str | None,
    fit_files: tuple[Path, ...],
    out: Path | None,
    submission_path: Path | None,
) -> None:
    """Average the probabilities that `eval` or `predict` wrote for several models.

    Prints each file's accuracy and the ensemble's, where labels are known, and how often two files agree.
    """
    import numpy as np

    from fasttrain.evaluation import predictions, submission
    from fasttrain.evaluation.ensemble import agreement, fuse, greedy_weights, load_members
    from fasttrain.utils.text import printable

    if weights and fit_files:
        raise UserError("--weights and --fit exclude each other: fitting finds the weights")
    if out:
        if any(out.resolve() == path.resolve() for path in (*files, *fit_files)):
            raise UserError(f"--out {printable(out)} is one of the files to average; name another file")
        predictions.check_overwritable(out)
    if submission_path:
        submission.check_overwritable(submission_path)
    shares = _parse_weights(weights, len(files)) if weights else None
    fitted_classes = None
    if fit_files:
        if len(fit_files) != len(files):
            raise UserError(f"--fit is given {len(fit_files)} times for {len(files)} files; name one for each of them")
        val = load_members(fit_files)
        if val[0].labels is None:
            raise UserError(f"--fit {printable(fit_files[0])} has no labels; use files that `eval` wrote")
        shares = greedy_weights([member.probs for member in val], val[0].labels)
        fitted_classes = val[0].classes.tolist()
        del val
    members = load_members(files)
    first = members[0]
    if fitted_classes is not None and fitted_classes != first.classes.tolist():
        raise UserError("--fit: its files have other classes than the files to average")
    ids = first.ids.tolist()
    if submission_path:
        submission.image_names(ids)  # raises before anything is written
    fused = fuse([member.probs for member in members], shares)
    if out:
        predictions.save(replace(first, probs=fused, per_size={}), out)
    if submission_path:
        numbers = np.array(submission.class_numbers(first.classes.tolist()))
        submission.write(submission_path, ids, numbers[fused.argmax(1)].tolist())
    for number, (path, member) in enumerate(zip(files, members, strict=True)):
        weight = f"weight {shares[number]:.3f}  " if shares else ""
        top1 = f"top-1 {predictions.scores(member.probs, first.labels).top1:.2%}  " if first.labels is not None else ""
        click.echo(f"{number:>3}  {top1}{weight}{printable(path)}")
    if len(members) > 1:
        click.echo("agreement of pairs (share of images given the same class):")
        for number, row in enumerate(agreement([member.probs for member in members])):
            click.echo(f"{number:>3}  " + " ".join(f"{share:6.1%}" for share in row))
    if first.labels is not None:
        scores = predictions.scores(fused, first.labels)
        click.echo(f"fused: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images")
    for path in filter(None, (out, submission_path)):
        click.echo(f"wrote {printable(path)}: {len(fused)} predictions")


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
