"""What a search has found: the best recipe, a table of the trials, and a picture of the score over each setting."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.evaluation.metrics import NAMES
from fasttrain.tune.search import Range
from fasttrain.utils.files import replacing

if TYPE_CHECKING:
    import optuna

BEST, TABLE, PICTURE = "best.toml", "trials.csv", "trials.png"


def write_best(out: Path, recipe: Recipe) -> None:
    """Write the best recipe, with a comment for each setting."""
    with replacing(out / BEST) as temporary:
        temporary.write_text(toml.to_toml(recipe, comments=True), encoding="utf-8")


def write_table(out: Path, trials: Sequence["optuna.trial.FrozenTrial"], ranges: Sequence[Range]) -> None:
    """Write one row per trial: its state, its score (where it was stopped early, the last one), epochs, seconds and
    settings."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", "state", "score", "epochs", "seconds", *(each.key for each in ranges)])
    for trial in trials:
        if trial.state.name == "WAITING":
            continue
        epochs = max(trial.intermediate_values, default=0)
        score = trial.value if trial.value is not None else trial.intermediate_values.get(epochs, "")
        values = [trial.params.get(each.key, "") for each in ranges]
        writer.writerow(
            [trial.number, trial.state.name.lower(), score, epochs, trial.user_attrs.get("seconds", ""), *values]
        )
    with replacing(out / TABLE) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def draw(
    out: Path, trials: Sequence["optuna.trial.FrozenTrial"], ranges: Sequence[Range], criterion: str, software: str
) -> bool:
    """Draw each trial's score over each setting. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    columns = min(3, len(ranges))
    rows = -(-len(ranges) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(ranges) :]:
        panel.set_visible(False)
    for panel, each in zip(panels.flat, ranges, strict=False):
        words = each.words
        for state, color, label in (("PRUNED", "0.7", "stopped early"), ("COMPLETE", "tab:blue", "trained to the end")):
            points: list[tuple[Any, float]] = []
            for trial in trials:
                if trial.state.name == state and each.key in trial.params and trial.intermediate_values:
                    value = trial.params[each.key]
                    score = trial.intermediate_values[max(trial.intermediate_values)]
                    points.append((words.index(value) if words else value, score))
            if points:
                panel.plot(*zip(*points, strict=True), "o", color=color, alpha=0.7, label=label)
        if words:
            panel.set_xticks(range(len(words)), [word.strip('"') for word in words])
            panel.set_xlim(-0.5, len(words) - 0.5)
        elif each.kind == "log":
            panel.set_xscale("log")
        panel.set_xlabel(each.key)
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel(NAMES[criterion])
    handles, labels = panels.flat[0].get_legend_handles_labels()
    if handles:
        panels.flat[0].legend(handles, labels, fontsize="small")
    with replacing(out / PICTURE) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": software})
    return True
