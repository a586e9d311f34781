"""`fasttrain bench`: benchmarks, always compared with peers in the same run."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain.cli.options import (
    FILE,
    FOLDER,
    PNG_SOFTWARE,
    SET_HELP,
    GroupedCommand,
    benchmark_option,
    data_option,
    machine_option,
    model_option,
    output_option,
    require_png,
    training_option,
)
from fasttrain.config.choices import DECODERS, DEVICES, LOSS_COMBINATIONS, PRECISIONS
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from fasttrain.benchmarks.common import Row
    from fasttrain.config.schema import Recipe
    from fasttrain.distributed.ranks import Ranks

Figures = tuple[Iterable[list["Row"]], dict[str, Any]]  # a benchmark's rows, case by case, and its settings


@click.group(short_help="Measure this machine.")
def bench() -> None:
    """Measure this machine, compared with other libraries in the same run."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("bench measures one process; run it without torchrun")


_Command = Callable[..., Any]
_COMPILE = {None: None, True: "on", False: "off"}


def _benchmark(rounds: int) -> Callable[[_Command], _Command]:
    """Decorates a benchmark, which takes a Ranks and returns Figures: adds the options that all benchmarks have, and
    prints and writes the figures. Put it next to the function; decorators above it add more options."""
    options = (
        machine_option("--device", type=click.Choice(DEVICES), default="auto", show_default=True,
                       help="auto: a GPU where there is one."),
        benchmark_option("--rounds", type=click.IntRange(1), default=rounds, show_default=True,
                         help="How often each contender is measured."),
        benchmark_option("--only", multiple=True, metavar="PATTERN",
                         help="Only these contenders (of kernels: cases); * matches any text. Repeatable."),
        output_option("--json", "json_path", type=FILE, metavar="FILE", help="Write the figures."),
        output_option("--plot", type=FILE, metavar="FILE.png", help="Draw the figures."),
    )  # fmt: skip

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def measure(device: str, json_path: Path | None, plot: Path | None, **options: Any) -> None:
            from fasttrain.distributed.ranks import ranks

            _require_outputs(json_path, plot)
            with ranks(device) as rank:
                cases, settings = command(rank, **options)
                _report(cases, rank.device, json_path, plot, settings)

        for option in reversed(options):
            measure = option(measure)
        return measure

    return decorate


def _require_outputs(json_path: Path | None, plot: Path | None) -> None:
    """Check before the measurement that `_report` can write the figures. Raises UserError if not."""
    from fasttrain.benchmarks import common

    if json_path:
        common.check_overwritable(json_path)
    if plot:
        require_png(plot, "--plot")
        common.require_matplotlib()


def _report(
    cases: Iterable[list["Row"]],
    device: "torch.device",
    json_path: Path | None,
    plot: Path | None,
    settings: dict[str, Any],
) -> None:
    """Print a benchmark's figures, case by case. Files are written again after every round, so that an
    interrupted benchmark keeps its rounds so far. cases: the rows of a case; a case is repeated with more rounds."""
    from fasttrain.benchmarks import common

    rows_of: dict[tuple[str, str], list[Row]] = {}
    for case in cases:
        name = case[0].work, case[0].case
        if rows_of and name not in rows_of:
            click.echo(common.table([*rows_of.values()][-1]) + "\n")
        rows_of[name] = case
        rows = [row for case_rows in rows_of.values() for row in case_rows]
        if json_path:
            common.write_json(json_path, device, rows, settings)
        if plot:
            common.write_plot(plot, rows, PNG_SOFTWARE)
    click.echo(common.table([*rows_of.values()][-1]))


@bench.command("kernels", cls=GroupedCommand, short_help="The Triton kernels.")
@_benchmark(rounds=15)
def bench_kernels(rank: "Ranks", rounds: int, only: Sequence[str]) -> Figures:
    """The kernels (mix, triplet, averaging of weights), compared with eager, compiled and library versions."""
    from fasttrain.benchmarks.kernels import kernels

    return kernels(rank.device, rounds, only), {"rounds": rounds}


@bench.command("pipeline", cls=GroupedCommand, short_help="The training pipeline.")
@data_option("--data", required=True, type=FOLDER, metavar="DIR", help="Images in class folders.")
@data_option("--pack", "packs", type=FILE, multiple=True, metavar="FILE",
             help="Also fasttrain's pipeline with this pack. Repeatable.")  # fmt: skip
@training_option("--batch-size", "batch_sizes", type=click.IntRange(2), multiple=True, default=(64,), show_default=True,
                 help="Images per batch. Repeatable.")  # fmt: skip
@training_option("--image-size", type=click.IntRange(8), default=224, show_default=True, help="In pixels.")
@training_option("--autoaugment", "policies", type=click.Choice(["none", "imagenet"]), multiple=True,
                 default=("none", "imagenet"), show_default=True, help="Policy. Repeatable.")  # fmt: skip
@training_option("--cutmix/--no-cutmix", default=True, show_default=True, help="Mix each batch.")
@training_option("--images-per-class", type=click.IntRange(0), default=4, show_default=True,
                 help="Of P x K batches; 0: leave them out.")  # fmt: skip
@training_option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True, help="Of the images.")
@machine_option("--workers", type=click.IntRange(0, 1024), default=0, show_default=True,
                help="Threads or processes; 0: a run's default, and one per core for peers.")  # fmt: skip
@machine_option("--decoder", type=click.Choice(DECODERS), default="auto", show_default=True,
                help="What decodes fasttrain's images on a GPU.")  # fmt: skip
@benchmark_option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Batches per round.")
@benchmark_option("--profile", is_flag=True, help="Also measure the parts of fasttrain's own pipeline.")
@_benchmark(rounds=5)
def bench_pipeline(
    rank: "Ranks",
    data: str,
    packs: tuple[Path, ...],
    precision: str,
    workers: int,
    profile: bool,
    decoder: str,
    **options: Any,
) -> Figures:
    """The training pipeline, compared with timm's loader, torchvision v2 and DALI's stock pipeline on the same
    images."""
    from fasttrain.benchmarks import pipeline
    from fasttrain.config.schema import DataConfig, MachineConfig
    from fasttrain.data.open_data import open_data
    from fasttrain.pipelines import decoders

    index, _ = open_data(DataConfig(train=(data,)))
    packed = {path.stem: open_data(DataConfig(train=(str(path),)))[0] for path in packs}
    options |= {"workers": rank.threads(workers), "processes": workers or rank.cores}
    dtype = pipeline.dtype_of(precision, rank.device)
    kind = decoders.resolve(decoder, rank.device)
    rows = pipeline.pipeline(
        index,
        rank.device,
        dtype,
        profile=profile,
        packs=packed,
        decoder=decoders.Decoder(kind, MachineConfig().hardware_load),
        **options,
    )
    return rows, {
        "images": len(index),
        "packs": sorted(packed),
        "precision": precision,
        "decoder": kind,
        **options,
    }


def _network_options(command: _Command) -> _Command:
    """Adds the options of a benchmark that trains networks; see `_chosen_networks`."""
    options = (
        model_option("--arch", "archs", multiple=True, metavar="A",
                     help="Network. Repeatable. Default: the report's three."),
        model_option("--loss", type=click.Choice(LOSS_COMBINATIONS), help="Losses. Default: ce."),
        training_option("--batch-size", type=click.IntRange(2), help="Images per step. Default: the recipe's."),
        training_option("--image-size", type=click.IntRange(8), help="In pixels. Default: the recipe's."),
        training_option("--precision", type=click.Choice(PRECISIONS), help="Default: the recipe's."),
        training_option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP),
        machine_option("--compile/--no-compile", "compiled", default=None,
                       help="Use torch.compile. Default: the recipe's, which is on for CUDA."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _chosen_networks(
    device: "torch.device",
    *,
    archs: Sequence[str],
    loss: str | None,
    compiled: bool | None,
    recipe_names: Sequence[str] = (),
    **options: Any,
) -> "list[Recipe]":
    """The resolved recipes that the options of `_network_options` and --recipe describe."""
    from fasttrain import recipes
    from fasttrain.benchmarks.step import recipe_of
    from fasttrain.models import ARCHS

    if loss and recipe_names:
        raise UserError("--loss chooses the losses of networks by --arch; --recipe has losses of its own")
    chosen = [
        replace(recipes.for_arch(arch, loss or "ce"), name=arch) for arch in archs or (() if recipe_names else ARCHS)
    ]
    chosen += [recipes.by_name(name) for name in recipe_names]
    return [recipe_of(recipe, device, compiled=_COMPILE[compiled], **options) for recipe in chosen]


def _losses(chosen: "list[Recipe]") -> dict[str, list[str]]:
    """Names of each recipe's losses."""
    return {recipe.name: [loss.name for loss in recipe.losses] for recipe in chosen}


@bench.command("step", cls=GroupedCommand, short_help="The training step.")
@_network_options
@model_option("--recipe", "recipe_names", multiple=True, metavar="NAME|FILE.toml", help="Recipe. Repeatable.")
@model_option("--classes", type=click.IntRange(2), default=1000, show_default=True, help="Classes of the network.")
@benchmark_option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Steps per round.")
@benchmark_option("--peers/--no-peers", default=True,
                  help="Measure timm's step too, or fasttrain's only.  [default: peers]")  # fmt: skip
@benchmark_option(
    "--also", multiple=True, metavar="KEY=VALUE", help="Measure fasttrain's step again with this setting."
)
@benchmark_option("--host", is_flag=True, help="Only what the loops cost the host, with a network of one parameter.")
@_benchmark(rounds=5)
def bench_step(
    rank: "Ranks",
    classes: int,
    steps: int,
    peers: bool,
    also: tuple[str, ...],
    host: bool,
    rounds: int,
    only: tuple[str, ...],
    **options: Any,
) -> Figures:
    """The training step on a batch that is already on the device, compared with timm's loop.

    timm's loop is measured in both memory formats, eager and, on a GPU, compiled.
    """
    from fasttrain.benchmarks import step

    if host:
        return step.host(rank.device, rounds=rounds, only=only), {"rounds": rounds}
    chosen = _chosen_networks(rank.device, **options)
    if not peers:
        if only:
            raise UserError("--only and --no-peers exclude each other: --no-peers is --only fasttrain")
        only = (step.FASTTRAIN, f"{step.FASTTRAIN}, *") if also else (step.FASTTRAIN,)
    rows = step.step(chosen, rank.device, classes=classes, rounds=rounds, steps=steps, only=only, also=also)
    return rows, {"losses": _losses(chosen), "classes": classes, "steps": steps, "rounds": rounds}


@bench.command("train", cls=GroupedCommand, short_help="Whole runs.")
@data_option("--data", required=True, type=FOLDER, metavar="DIR", help="Images in class folders.")
@_network_options
@machine_option("--workers", type=click.IntRange(0, 1024), default=0, show_default=True,
                help="Threads or processes; 0: a run's default, and one per core for peers.")  # fmt: skip
@benchmark_option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Steps per round.")
@benchmark_option("--warm-up", type=click.IntRange(1), default=20, show_default=True, help="Steps before each round.")
@_benchmark(rounds=3)
def bench_train(
    rank: "Ranks", data: str, workers: int, steps: int, warm_up: int, rounds: int, only: tuple[str, ...], **options: Any
) -> Figures:
    """Whole runs, compared with their step alone, their pipeline alone, and timm's loader and loop."""
    from fasttrain.benchmarks.train import end_to_end
    from fasttrain.config.schema import DataConfig
    from fasttrain.data.open_data import open_data

    index, _ = open_data(DataConfig(train=(data,)))
    threads = rank.threads(workers)
    chosen = _chosen_networks(rank.device, workers=workers, **options)
    counts = {"steps": steps, "warm_up": warm_up, "rounds": rounds}
    rows = end_to_end(chosen, index, rank, only=only, **counts)
    return rows, {"images": len(index), "losses": _losses(chosen), "workers": threads, **counts}
