"""What a run's folder says: its settings, its log, its checkpoint, and its images where they are there."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.checkpoints import checkpoint, meta
from fasttrain.checkpoints.resume import val_fingerprint
from fasttrain.checkpoints.run_dir import RECIPE
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index, require_classes
from fasttrain.data.open_data import open_data, open_labeled
from fasttrain.data.scan import Limits
from fasttrain.data.stage import is_address
from fasttrain.distributed.ranks import ranks
from fasttrain.evaluation.cross_validation import fold_runs
from fasttrain.evaluation.metrics import NAMES, better
from fasttrain.evaluation.predictions import Predictions
from fasttrain.losses import LOSSES
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.predict import predict
from fasttrain.report import run_log
from fasttrain.report.run_log import Row
from fasttrain.utils.environment import torchrun_variable
from fasttrain.utils.errors import CommandError, UserError
from fasttrain.utils.files import read_text
from fasttrain.utils.text import printable


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A run of a report. name: unlike the other runs'. rows: the log without abandoned attempts; all_rows: with them.
    damaged: lines of the log that are not events. classes: of its checkpoint; empty without one. step: steps of the
    checkpoint. missing: what cannot be shown, one line each."""

    folder: Path
    name: str
    recipe: Recipe
    recipe_text: str
    rows: list[Row]
    all_rows: list[Row]
    damaged: int = 0
    checkpoint: Path | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        return list(self.meta.get("classes", ()))

    def best_scores(self) -> tuple[int, dict[str, float]] | None:
        """The step and the scores of the best evaluation in the log, of the averaged weights where there are any."""
        criterion, best = self.recipe.evaluation.best, None
        for row in self.rows:
            step = run_log.step_of(row)
            if row["event"] != "eval" or step is None:
                continue
            scores = scores_in(row)
            if best is None or better(scores.get(criterion), best[1].get(criterion), criterion):
                best = step, scores
        return best


def scores_in(row: Row) -> dict[str, float]:
    """The scores that count of an evaluation in the log, by the names of `metrics.NAMES`."""
    averaged = row.get("ema")
    table = averaged if isinstance(averaged, dict) else row
    return {name: value for name in NAMES if (value := run_log.number(table.get(name))) is not None}


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs in these folders; the folder of a cross-validation stands for its runs. Raises UserError where one is
    not a run's folder."""
    found = [each for folder in folders for each in (fold_runs(folder) or [folder])]
    names = [printable(each.resolve().name) for each in found]
    if len(set(names)) < len(names):
        names = [printable(each) for each in found]
    for number, each in enumerate(found):
        if any(each.resolve() == other.resolve() for other in found[:number]):
            raise UserError(f"{printable(each)} is given twice; name different runs")
    return [read_run(folder, name) for folder, name in zip(found, names, strict=True)]


def read_run(folder: Path, name: str = "") -> RunFolder:
    """What a run's folder holds. Raises UserError where it is not one; a log or a checkpoint may be missing."""
    recipe, text = read_recipe(folder)
    missing = []
    lines, found, content = run_log.Lines([], 0), None, {}
    try:
        lines = run_log.read_lines(folder)
    except UserError as error:
        missing.append(f"curves and events: {error}")
    try:
        found = checkpoint.find(folder)
        content = meta.read(found)
    except UserError as error:
        found = None
        missing.append(f"a checkpoint: {error}")
    return RunFolder(
        folder=folder,
        name=name or printable(folder.resolve().name),
        recipe=recipe,
        recipe_text=text,
        rows=run_log.current(lines.rows),
        all_rows=lines.rows,
        damaged=lines.damaged,
        checkpoint=found,
        meta=content,
        missing=tuple(missing),
    )


def read_recipe(folder: Path) -> tuple[Recipe, str]:
    """A run's recipe, and its text. Raises UserError where the folder has none."""
    path = folder / RECIPE
    try:
        text = read_text(path, toml.TEXT_LENGTH)
    except OSError as error:
        raise UserError(f"{printable(folder)} is not a run's folder: {RECIPE}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"cannot read {printable(path)}: {printable(str(error))}") from None
    return toml.from_toml(text, where=printable(path)), text


def changed_settings(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from the defaults, by dotted key: the value and the default. A loss that is not in the
    default recipe, cross entropy alone, has the default None for `losses`."""
    own = toml.to_dict(recipe)
    default = toml.to_dict(Recipe(name=recipe.name, arch=recipe.arch, losses=(CrossEntropy(),)))
    default["losses"] = {name: dataclasses.asdict(LOSSES[name]()) for name in own["losses"]}
    changed: dict[str, tuple[Any, Any]] = {}
    if list(own["losses"]) != [CrossEntropy.name]:
        changed["losses"] = (" + ".join(own["losses"]), CrossEntropy.name)
    values, defaults = toml.flat(own), toml.flat(json.loads(json.dumps(default)))
    for key, value in values.items():
        # A run's recipe has what `auto` became on its machine.
        if value != defaults.get(key) and defaults.get(key) != "auto":
            changed[key] = (value, defaults.get(key))
    return changed


def differing(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """The settings in which recipes differ, by dotted key: the value of each; None where it has no such setting. The
    peak learning rate, which follows from several settings, is one of them."""
    tables = [toml.flat(toml.to_dict(recipe)) | {"peak learning rate": recipe.peak_lr} for recipe in recipes]
    keys = dict.fromkeys(key for table in tables for key in table)
    found = {key: [table.get(key) for table in tables] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def setting(value: Any) -> str:
    """A setting's value, as TOML writes it."""
    return (
        "—" if value is None else value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    )


class Images(NamedTuple):
    """A run's images. no_train, no_val: why one of the indices is None."""

    train: Index | None
    val: Index | None
    no_train: str = ""
    no_val: str = ""


def own_images(run: RunFolder) -> Images:
    """The images that a run's recipe names, as far as they are on this machine: nothing is copied from elsewhere."""
    recipe = run.recipe
    if not recipe.data.train:
        why = "the recipe names no images; --data DIR names some"
        return Images(None, None, why, why)
    if any(map(is_address, (*recipe.data.train, recipe.data.val))):
        why = "the run read its images from an address; --data DIR names a local copy"
        return Images(None, None, why, why)
    try:
        train, val = open_data(recipe.data)
        return Images(train, val, no_val="" if val else "the run had no validation images; --data DIR names some")
    except CommandError as error:
        why = str(error)
    if recipe.data.val and not recipe.data.folds and run.classes:
        try:
            limits = Limits.of(recipe.data)
            return Images(None, open_labeled(recipe.data.val, run.classes, run.folder, limits), no_train=why)
        except CommandError as error:
            return Images(None, None, why, str(error))
    return Images(None, None, why, why)


def val_changed(run: RunFolder, val: Index) -> bool:
    """Whether validation images are other ones than those that the run's checkpoint was chosen by."""
    before = run.meta.get("val")
    return before is not None and before != val_fingerprint(val)


@dataclass(frozen=True)
class Options:
    """How predictions are made, as in `eval`. device: auto, cpu or cuda. raw: the raw weights where a checkpoint has
    averaged ones too. batch_size: images at once. workers: DALI threads; 0: one per core."""

    device: str = "auto"
    raw: bool = False
    batch_size: int = 64
    workers: int = 0


DEFAULTS = Options()


def predictions_of(run: RunFolder, data: str | None, val: Index | None, options: Options) -> tuple[Index, Predictions]:
    """The probabilities of a run's best checkpoint for the labeled images that `data` names, or for `val`; with their
    index. Raises UserError and RunError like `predict`, and where the classes differ."""
    if run.checkpoint is None:
        raise UserError(f"{printable(run.folder)} has no checkpoint")
    if torchrun_variable("WORLD_SIZE", 1) > 1:
        raise UserError("reports and comparisons are made by one process; start the command without torchrun")
    opened: list[Index] = []

    def open_index(recipe: Recipe, classes: list[str]) -> Index:
        if data is not None:
            opened.append(open_labeled(data, classes, run.folder, Limits.of(recipe.data)))
        else:
            assert val is not None
            require_classes(classes, run.folder, val.classes, "its validation images")
            opened.append(val)
        return opened[0]

    with ranks(options.device) as rank:
        found = predict(
            run.checkpoint,
            open_index,
            rank,
            raw=options.raw,
            batch_size=options.batch_size,
            workers=options.workers,
        )
    assert found is not None  # there is one rank
    return opened[0], found
