"""A step's CPU time on the host, without the network: python scripts/host_time.py --data DIR [--json FILE]

Milliseconds of one core, by the clock of the thread that does the work, medians over steps. The main thread runs DALI
(which takes the source's values and passes them to its own threads), stages a batch's labels and mix parameters, and
calls the step. Another thread computes the source's values in advance. The step is measured with a network of one
parameter and includes the work that a GPU would do, so on a GPU the host needs less time, except for the launches of
the network.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain import recipes
from fasttrain.benchmarks import step as step_benchmark
from fasttrain.benchmarks.common import FASTTRAIN, write_figures
from fasttrain.benchmarks.pipeline import repeated
from fasttrain.config.schema import DataConfig
from fasttrain.data.index import Index
from fasttrain.data.open_data import open_data
from fasttrain.pipelines.ahead import PrefetchedSource
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import PREFETCH, Source, build
from fasttrain.training.inputs import InputBuilder

STEPS = 40
TARGET = 2500  # images per second, which sets the time that a step may take
CPU = torch.device("cpu")


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True), help="Photographs in class folders.")
@click.option("--batch-size", "batches", type=click.IntRange(1), multiple=True, default=(128, 256), show_default=True)
@click.option("--steps", type=click.IntRange(3), default=STEPS, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(data: str, batches: tuple[int, ...], steps: int, json_path: Path | None) -> None:
    """Measure, and print one line per batch size."""
    torch.set_num_threads(1)
    photos, _ = open_data(DataConfig(train=(data,)))
    *_, rows = step_benchmark.host(CPU, rounds=5, only=[FASTTRAIN])
    step_ms = rows[0].seconds * 1e3
    results = []
    for batch in batches:
        index = repeated(photos, batch * (steps + 10))
        plan = Plan.of(replace(recipes.for_arch("tresnet_xl"), batch_size=batch), index)
        source = Source(plan, index, 0, plan.steps)
        row = {
            "batch": batch,
            "allowed_ms": batch / TARGET * 1e3,
            "source_ms": median_ms(partial(run_source, source), steps),
            "dali_run_ms": dali_ms(source, steps),
            "stage_ms": median_ms(staging(plan, index), steps),
            "step_ms": step_ms,
        }
        row["main_thread_ms"] = row["dali_run_ms"] + row["stage_ms"] + row["step_ms"]
        results.append(row)
        click.echo(", ".join(f"{key} {value:.2f}" for key, value in row.items()))
        if json_path:
            write_figures(json_path, CPU, results, {"steps": steps, "target_images_per_s": TARGET})


def run_source(source: Source, step: int) -> None:
    source(SimpleNamespace(iteration=step))


def median_ms(work: Callable[[int], Any], steps: int) -> float:
    """Median CPU time of this thread per call, in milliseconds."""
    times = []
    for step in range(steps):
        start = time.thread_time()
        work(step)
        times.append(time.thread_time() - start)
    return median(times) * 1e3


def dali_ms(source: Source, steps: int) -> float:
    """CPU time of the main thread in DALI per batch: it takes the source's values and starts a batch."""
    with PrefetchedSource(source, PREFETCH + 1) as feed:
        pipe = build(source, CPU, 1, feed=feed)
        pipe.build()
        for _ in range(PREFETCH):
            pipe.schedule_run()

        def run_batch(_: int) -> None:
            pipe.share_outputs()  # waits without computing
            pipe.release_outputs()
            pipe.schedule_run()

        return median_ms(run_batch, min(steps, 20))


def staging(plan: Plan, index: Index) -> Callable[[int], Any]:
    inputs = InputBuilder(plan, index, CPU, torch.bfloat16)
    pixels = torch.zeros(plan.micro_batch, 8, 8, 3, dtype=torch.uint8)
    return lambda step: inputs.on_host(step, 0, Images(pixels, torch.from_numpy(plan.images(step, 0).copy())))


if __name__ == "__main__":
    main()
