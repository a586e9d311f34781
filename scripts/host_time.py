"""What a step asks of the host besides the network: python scripts/host_time.py --data DIR [--json FILE]

Milliseconds of one core, by the clock of the thread that does the work, medians over steps. The main thread runs DALI
(which takes what the source made, and hands it to its own threads), stages a batch's labels and mix parameters, and
calls the step; a thread of its own works out the source's draws ahead of it. The step's row is that of a network of
one parameter, with the work that a GPU would do, so it is more than what a GPU's host does, launches of the network
apart.
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
from fasttrain.benchmarks.common import OWN, write_figures
from fasttrain.benchmarks.pipeline import repeated
from fasttrain.config.schema import DataConfig
from fasttrain.data.index import open_data
from fasttrain.pipelines.ahead import Ahead
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import PREFETCH, Source, build
from fasttrain.training.inputs import InputBuilder

STEPS = 40
TARGET = 2500  # images per second; what a step of a batch may take at that rate
CPU = torch.device("cpu")


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True), help="Photographs in class folders.")
@click.option("--batch-size", "batches", type=click.IntRange(1), multiple=True, default=(128, 256), show_default=True)
@click.option("--steps", type=click.IntRange(3), default=STEPS, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(data: str, batches: tuple[int, ...], steps: int, json_path: Path | None) -> None:
    """Measure, and print a line per batch size."""
    torch.set_num_threads(1)
    photos, _ = open_data(DataConfig(train=(data,)))
    *_, rows = step_benchmark.host(CPU, rounds=5, only=[OWN])
    loop = rows[0].seconds * 1e3
    found = []
    for batch in batches:
        index = repeated(photos, batch * (steps + 10))
        plan = Plan.of(replace(recipes.for_arch("tresnet_xl"), batch_size=batch), index)
        source = Source(plan, index, 0, plan.steps)
        row = {
            "batch": batch,
            "allowed_ms": batch / TARGET * 1e3,
            "source_ms": milliseconds(partial(draw, source), steps),
            "dali_run_ms": dali(source, steps),
            "stage_ms": milliseconds(staging(plan, index.labels), steps),
            "step_ms": loop,
        }
        row["main_thread_ms"] = row["dali_run_ms"] + row["stage_ms"] + row["step_ms"]
        found.append(row)
        click.echo(", ".join(f"{key} {value:.2f}" for key, value in row.items()))
        if json_path:
            write_figures(json_path, CPU, found, {"steps": steps, "target_images_per_s": TARGET})


def draw(source: Source, step: int) -> None:
    source(SimpleNamespace(iteration=step))


def milliseconds(work: Callable[[int], Any], steps: int) -> float:
    """Median over calls of what the thread computes."""
    times = []
    for step in range(steps):
        start = time.thread_time()
        work(step)
        times.append(time.thread_time() - start)
    return median(times) * 1e3


def dali(source: Source, steps: int) -> float:
    """What DALI's run asks of the main thread: to take what the source made, and to begin a batch."""
    with Ahead(source, PREFETCH + 1) as feed:
        pipe = build(source, CPU, 1, feed=feed)
        pipe.build()
        for _ in range(PREFETCH):
            pipe.schedule_run()

        def one(_: int) -> None:
            pipe.share_outputs()  # waits, and computes nothing meanwhile
            pipe.release_outputs()
            pipe.schedule_run()

        return milliseconds(one, min(steps, 20))


def staging(plan: Plan, labels: Any) -> Callable[[int], Any]:
    inputs = InputBuilder(plan, torch.from_numpy(labels), CPU, torch.bfloat16)
    pixels = torch.zeros(plan.micro_batch, 8, 8, 3, dtype=torch.uint8)
    return lambda step: inputs.on_host(step, 0, Images(pixels, torch.from_numpy(plan.images(step, 0).copy())))


if __name__ == "__main__":
    main()
