"""`fasttrain compare`: two runs, or two files of probabilities: the settings and the scores that differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.schema import Recipe
from fasttrain.data.index import require_classes
from fasttrain.evaluation import metrics, predictions
from fasttrain.evaluation.metrics import NAMES, Scores
from fasttrain.evaluation.predictions import Predictions
from fasttrain.report.markup import shorten
from fasttrain.report.paired import Difference, accuracy_difference, balanced_difference, mcnemar, mean_difference
from fasttrain.report.runs import DEFAULTS, Options, differing, own_images, predictions_of, read_run, setting
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_json_object, replacing, require_writable_folder
from fasttrain.utils.text import printable

MARK = "fasttrain_compare"
_SMALLEST = float(np.finfo(np.float64).eps)  # of probabilities in the log-loss, as in `metrics`


class Side(NamedTuple):
    """One of the two: its name, its recipe (None for a file of probabilities), its answers, and a fingerprint of the
    images' sizes (empty for a file)."""

    name: str
    recipe: Recipe | None
    predicted: Predictions
    sizes: str


class Comparison(NamedTuple):
    """settings: those that differ, with both values; None where one side is a file of probabilities. scores: of both.
    differences: the second's minus the first's. only_first, only_second: images that only one answers right. p: of
    McNemar's exact test."""

    names: tuple[str, str]
    images: int
    classes: int
    settings: dict[str, list[Any]] | None
    scores: tuple[Scores, Scores]
    differences: dict[str, Difference]
    only_first: int
    only_second: int
    p: float


def compare(first: Path, second: Path, *, data: str | None = None, options: Options = DEFAULTS) -> Comparison:
    """Compare two runs' folders, or .npz files of labeled probabilities.

    data: labeled images, as in `eval`; None: each run's own validation images. Raises UserError
    where the two do not have the same classes, images and labels.
    """
    one, other = (_side(path, data, options) for path in (first, second))
    require_classes(one.predicted.classes.tolist(), first, other.predicted.classes.tolist(), second)
    aligned = _aligned(one, other)
    labels = one.predicted.labels
    assert labels is not None
    if len(labels) < 2:
        raise UserError("a comparison takes two images or more")
    right, other_right = (each.probs.argmax(1) == labels for each in (one.predicted, aligned))
    losses = [_losses(each.probs, labels) for each in (one.predicted, aligned)]
    only_first, only_second = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    recipes = (one.recipe, other.recipe)
    return Comparison(
        names=(one.name, other.name),
        images=len(labels),
        classes=len(one.predicted.classes),
        settings=differing([recipe for recipe in recipes if recipe]) if all(recipes) else None,
        scores=(metrics.scores(one.predicted.probs, labels), metrics.scores(aligned.probs, labels)),
        differences={
            "top1": accuracy_difference(right, other_right),
            "balanced_accuracy": balanced_difference(right, other_right, labels),
            "log_loss": mean_difference(*losses),
        },
        only_first=only_first,
        only_second=only_second,
        p=mcnemar(only_first, only_second),
    )


def _side(path: Path, data: str | None, options: Options) -> Side:
    if path.suffix == ".npz":
        if data is not None:
            raise UserError(f"--data: {printable(path)} holds the answers to its own images; leave --data out")
        predicted = predictions.load(path, per_size=False)
        if predicted.labels is None:
            raise UserError(f"{printable(path)} has no labels; `eval --out` writes probabilities with labels")
        return Side(printable(path), None, predicted, "")
    run = read_run(path)
    val = None
    if data is None:
        images = own_images(run)
        if images.val is None:
            raise UserError(f"{printable(path)} has no validation images: {images.no_val}")
        val = images.val
    index, predicted = predictions_of(run, data, val, options)
    return Side(printable(path), run.recipe, predicted, index.fingerprint_of_sizes())


def _losses(probs: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each image's negative log probability of its label, float64 [N]."""
    own = probs[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(own, _SMALLEST))


def _aligned(one: Side, other: Side) -> Predictions:
    """The second side's predictions, with the first's order of images and classes. Raises UserError where the images or
    their labels differ."""
    ours, theirs = one.predicted, other.predicted
    assert ours.labels is not None and theirs.labels is not None
    columns = np.array([theirs.classes.tolist().index(name) for name in ours.classes.tolist()])
    if ours.ids.tolist() == theirs.ids.tolist():  # ids of several folders may not be unique
        rows = np.arange(len(theirs))
    else:
        missing = set(ours.ids.tolist()) ^ set(theirs.ids.tolist())
        if missing or len(ours) != len(theirs) or len(set(theirs.ids.tolist())) < len(theirs):
            example = f"only one has {printable(min(missing))!r}" if missing else "some have the same name"
            raise UserError(
                f"{one.name} and {other.name} have different validation images ({len(ours)} and {len(theirs)}; "
                f"{example}); --data DIR names images for both"
            )
        place = {image_id: number for number, image_id in enumerate(theirs.ids.tolist())}
        rows = np.array([place[image_id] for image_id in ours.ids.tolist()])
    position = np.argsort(columns)  # a class of theirs, as a class of ours
    labels = position[theirs.labels[rows]]
    unlike = np.flatnonzero(labels != ours.labels)
    if len(unlike):
        image = printable(str(ours.ids[unlike[0]]))
        raise UserError(
            f"{one.name} and {other.name} have different labels for {len(unlike)} images, such as {image}; --data DIR "
            "names images for both"
        )
    if one.sizes and other.sizes and one.sizes != other.sizes:
        raise UserError(
            f"{one.name} and {other.name} have validation images of the same names but other sizes; --data DIR names "
            "images for both"
        )
    return replace(theirs, ids=ours.ids, classes=ours.classes, labels=labels, probs=theirs.probs[rows][:, columns])


def text(found: Comparison) -> str:
    """A comparison in lines."""
    lines = [f"A: {found.names[0]}", f"B: {found.names[1]}"]
    if found.settings is not None:
        lines.append("settings that differ:" if found.settings else "the settings are the same")
        rows = [
            (key, *(shorten(printable(setting(value)), 60) for value in values))
            for key, values in found.settings.items()
        ]
        lines += _columns([("", "A", "B"), *rows], right=()) if rows else []
    lines.append(f"scores on the same {found.images} images of {found.classes} classes:")
    table: list[tuple[str, ...]] = [("", "A", "B", "B − A", "95 % interval")]
    for key, title in NAMES.items():
        values = [getattr(each, key) for each in found.scores]
        if None in values:
            continue
        shown = [f"{value:.4f}" if key == "log_loss" else f"{value:.2%}" for value in values]
        difference = found.differences.get(key)
        value = difference.value if difference else values[1] - values[0]
        interval = f"[{_signed(key, difference.low)}, {_signed(key, difference.high)}]" if difference else ""
        table.append((title, *shown, _signed(key, value), interval))
    lines += _columns(table, right=(1, 2, 3, 4))
    lines.append(
        f"only A is right on {found.only_first} images, only B on {found.only_second}: McNemar's exact test gives "
        f"p = {found.p:.3g}"
    )
    return "\n".join(lines)


def _signed(key: str, value: float) -> str:
    return f"{value:+.4f}" if key == "log_loss" else f"{100 * value:+.2f}"


def _columns(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(
            text.rjust(width) if number in right else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def check_overwritable(path: Path) -> None:
    """Raises UserError where `path` has no folder that can be written to, or exists and was not made by `write`."""
    require_writable_folder(path)
    if path.exists() and MARK not in read_json_object(path):
        raise UserError(f"{printable(path)} exists and holds no comparison; name another file")


def write(path: Path, found: Comparison) -> None:
    """Write a comparison as JSON. Raises UserError like `check_overwritable`, RunError where it cannot be written."""
    check_overwritable(path)
    content = {
        MARK: 1,
        "names": found.names,
        "images": found.images,
        "classes": found.classes,
        "settings": found.settings,
        "scores": [each.to_dict() for each in found.scores],
        "differences": {key: each._asdict() for key, each in found.differences.items()},
        "only_first_right": found.only_first,
        "only_second_right": found.only_second,
        "mcnemar_p": found.p,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
