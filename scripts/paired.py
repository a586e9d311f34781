"""Scores of several settings over the same seeds: means, 95 % intervals (Student), gains paired by seed, a plot."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats


def interval(values: NDArray[Any]) -> float:
    """Half the width of the 95 % confidence interval of the mean; nan for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def entry(
    title: str, scores: Sequence[float], baseline: str | None = None, baseline_scores: Sequence[float] = ()
) -> dict[str, Any]:
    """A row of the table. scores, baseline_scores: one per seed, in the same order."""
    values = np.array(scores)
    row = {"title": title, "scores": values.tolist(), "mean": float(values.mean()), "interval": interval(values)}
    if baseline is not None:
        gain = values - np.array(baseline_scores)
        row |= {"beside": baseline, "gain": float(gain.mean()), "gain_interval": interval(gain)}
    return row


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    text = f"{row['title']:<28} {row['mean']:6.2%} ± {row['interval']:.2%}"
    if "gain" in row:
        text += f"   {row['gain']:+.2%} ± {row['gain_interval']:.2%} to {row['beside']}"
    return text


def draw(path: Path, table: list[dict[str, Any]], score: str) -> None:
    """Draw each row's mean with its interval, and its seeds as dots. score: the name of the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(table) + 1), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(reversed(table)):
        axes.errorbar(100 * row["mean"], y, xerr=100 * row["interval"], fmt="o", color="tab:blue", capsize=4)
        axes.plot([100 * value for value in row["scores"]], [y] * len(row["scores"]), ".", color="black", alpha=0.5)
    axes.set_yticks(range(len(table)), [row["title"] for row in reversed(table)])
    axes.set_xlabel(f"{score}, % (dots: seeds; bars: 95 % interval of the mean)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def device_name() -> str:
    """What the runs are trained on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, cores used: {len(os.sched_getaffinity(0))}"
