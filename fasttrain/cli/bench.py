"""`fasttrain bench`. torch, timm and DALI are imported inside the commands, so that help comes at once."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain.cli.options import COMBINATIONS, DECODERS, FILE, FOLDER, PNG_SOFTWARE, SET_HELP, require_png
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from fasttrain.benchmarks.common import Row
    from fasttrain.config.schema import Recipe
    from fasttrain.distributed.ranks import Ranks

Figures = tuple[Iterable[list["Row"]], dict[str, Any]]  # of a benchmark, case by case, and what it was asked to do


@click.group()
def bench() -> None:
    """Measure this machine, always compared with peers in the same run."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("bench measures one process; run it without torchrun")


_Command = Callable[..., Any]
_COMPILE = {None: None, True: "on", False: "off"}


def _measured(rounds: int) -> Callable[[_Command], _Command]:
    """What all benchmarks have: the options; this process as `here`, for a command that gives its figures and what it
    was asked to do; and the telling of both. It comes next to the command: what is above it adds options to all."""
    options = (
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--rounds", type=click.IntRange(1), default=rounds, show_default=True,
                     help="Turns that each contender has."),
        click.option("--only", multiple=True, metavar="PATTERN",
                     help="Only these contenders (of kernels: cases), with * for any text. Repeatable."),
        click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write the figures."),
        click.option("--plot", type=FILE, metavar="FILE.png", help="Draw the figures."),
    )  # fmt: skip

    def add(command: _Command) -> _Command:
        @wraps(command)
        def measured(device: str, json_path: Path | None, plot: Path | None, **asked: Any) -> None:
            from fasttrain.distributed.ranks import ranks

            _require_outputs(json_path, plot)
            with ranks(device) as here:
                cases, settings = command(here, **asked)
                _tell(cases, here.device, json_path, plot, settings)

        for option in reversed(options):
            measured = option(measured)
        return measured

    return add


def _require_outputs(json_path: Path | None, plot: Path | None) -> None:
    """UserError, before anything is measured, where `_tell` could not write the figures."""
    from fasttrain.benchmarks import common

    if json_path:
        common.check_overwritable(json_path)
    if plot:
        require_png(plot, "--plot")
        common.require_matplotlib()


def _tell(
    cases: Iterable[list["Row"]],
    device: "torch.device",
    json_path: Path | None,
    plot: Path | None,
    settings: dict[str, Any],
) -> None:
    """Print a benchmark's figures, case by case, and write them where asked, as often as there are new ones: what ends
    it early leaves those that were measured. cases: the rows of a case, or again with more turns. settings: what it was
    asked to do."""
    from fasttrain.benchmarks import common

    found: dict[tuple[str, str], list[Row]] = {}
    for case in cases:
        name = case[0].work, case[0].case
        if found and name not in found:
            click.echo(common.table([*found.values()][-1]) + "\n")
        found[name] = case
        rows = [row for each in found.values() for row in each]
        if json_path:
            common.write_json(json_path, device, rows, settings)
        if plot:
            common.write_plot(plot, rows, PNG_SOFTWARE)
    click.echo(common.table([*found.values()][-1]))


@bench.command("kernels")
@_measured(rounds=15)
def bench_kernels(here: "Ranks", rounds: int, only: Sequence[str]) -> Figures:
    """Mix, triplet and averaging of weights, compared with eager, compiled and library versions of the same work."""
    from fasttrain.benchmarks.kernels import kernels

    return kernels(here.device, rounds, only), {"rounds": rounds}


@bench.command("pipeline")
@click.option("--data", required=True, type=FOLDER, metavar="DIR", help="Images in class folders.")
@click.option("--batch-size", "batch_sizes", type=click.IntRange(2), multiple=True, default=(64,), show_default=True,
              help="Images a batch. Repeatable.")  # fmt: skip
@click.option("--image-size", type=click.IntRange(8), default=224, show_default=True, help="In pixels.")
@click.option("--autoaugment", "policies", type=click.Choice(["none", "imagenet"]), multiple=True,
              default=("none", "imagenet"), show_default=True, help="Repeatable.")  # fmt: skip
@click.option("--cutmix/--no-cutmix", default=True, show_default=True, help="Mix each batch.")
@click.option("--images-per-class", type=click.IntRange(0), default=4, show_default=True,
              help="Of the P x K batches; 0: leave them out.")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    help="Threads, or processes. 0: a run's default, and for peers one per core.",
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Batches a turn.")
@click.option("--profile", is_flag=True, help="Also where the project's own pipeline spends its time.")
@click.option("--decoder", type=click.Choice(DECODERS), default="auto", show_default=True,
              help="On a GPU: what decodes the project's images.")  # fmt: skip
@_measured(rounds=5)
def bench_pipeline(
    here: "Ranks", data: str, precision: str, workers: int, profile: bool, decoder: str, **asked: Any
) -> Figures:
    """The training pipeline, compared with timm's loader, torchvision v2 and DALI's stock pipeline on the same
    images."""
    from fasttrain.benchmarks import pipeline
    from fasttrain.config.schema import DataConfig, MachineConfig
    from fasttrain.data import index as dataset
    from fasttrain.pipelines import decoders

    index, _ = dataset.open_data(DataConfig(train=(data,)))
    asked |= {"workers": here.threads(workers), "processes": workers or here.cores}
    dtype = pipeline.dtype_of(precision, here.device)
    kind = decoders.resolve(decoder, here.device)
    rows = pipeline.pipeline(
        index,
        here.device,
        dtype,
        profile=profile,
        decoder=decoders.Decoder(kind, MachineConfig().hardware_load),
        **asked,
    )
    return rows, {"images": len(index), "precision": precision, "decoder": kind, **asked}


def _of_networks(command: _Command) -> _Command:
    """The options of a benchmark that trains networks; see `_chosen_networks`."""
    options = (
        click.option("--arch", "archs", multiple=True, metavar="A",
                     help="Network; repeatable. Default: the report's three."),
        click.option("--loss", type=click.Choice(COMBINATIONS), help="Default: ce."),
        click.option("--batch-size", type=click.IntRange(2), help="Default: the recipe's."),
        click.option("--image-size", type=click.IntRange(8), help="In pixels. Default: the recipe's."),
        click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), help="Default: the recipe's."),
        click.option("--compile/--no-compile", "compiled", default=None,
                     help="torch.compile. Default: the recipe's, which is on for CUDA."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP),
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
    named: Sequence[str] = (),
    **options: Any,
) -> "list[Recipe]":
    """What the options of `_of_networks` ask for, a resolved recipe per network, and the recipes that are `named`."""
    from fasttrain import recipes
    from fasttrain.benchmarks.step import recipe_of
    from fasttrain.models import ARCHS

    if loss and named:
        raise UserError("--loss chooses the losses of networks by --arch; --recipe has losses of its own")
    chosen = [replace(recipes.for_arch(arch, loss or "ce"), name=arch) for arch in archs or (() if named else ARCHS)]
    chosen += [recipes.by_name(name) for name in named]
    return [recipe_of(each, device, compiled=_COMPILE[compiled], **options) for each in chosen]


def _losses(chosen: "list[Recipe]") -> dict[str, list[str]]:
    """Names of each recipe's losses."""
    return {each.name: [loss.name for loss in each.losses] for each in chosen}


@bench.command("step")
@_of_networks
@click.option("--recipe", "named", multiple=True, metavar="R", help="Recipe, or its TOML file; repeatable.")
@click.option("--classes", type=click.IntRange(2), default=1000, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Steps a turn.")
@click.option("--peers/--no-peers", default=True,
              help="Compared with timm's, or the project's step alone.  [default: peers]")  # fmt: skip
@click.option("--also", multiple=True, metavar="KEY=VALUE", help="The project's step once more, with this setting.")
@click.option("--host", is_flag=True, help="Only what the loops ask of the host, with a network of one parameter.")
@_measured(rounds=5)
def bench_step(
    here: "Ranks",
    classes: int,
    steps: int,
    peers: bool,
    also: tuple[str, ...],
    host: bool,
    rounds: int,
    only: tuple[str, ...],
    **options: Any,
) -> Figures:
    """The training step on a batch that is on the device, compared with timm's loop in each memory format, eager and
    compiled."""
    from fasttrain.benchmarks import step

    if host:
        return step.host(here.device, rounds=rounds, only=only), {"rounds": rounds}
    chosen = _chosen_networks(here.device, **options)
    if not peers:
        if only:
            raise UserError("--only and --no-peers exclude each other: --no-peers is --only fasttrain")
        only = (step.OWN, f"{step.OWN}, *") if also else (step.OWN,)
    rows = step.step(chosen, here.device, classes=classes, rounds=rounds, steps=steps, only=only, also=also)
    return rows, {"losses": _losses(chosen), "classes": classes, "steps": steps, "rounds": rounds}


@bench.command("train")
@click.option("--data", required=True, type=FOLDER, metavar="DIR", help="Images in class folders.")
@_of_networks
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    help="Threads, or processes. 0: a run's default, and for peers one per core.",
)
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Steps a turn.")
@click.option("--warm-up", type=click.IntRange(1), default=20, show_default=True, help="Steps before them.")
@_measured(rounds=3)
def bench_train(
    here: "Ranks", data: str, workers: int, steps: int, warm_up: int, rounds: int, only: tuple[str, ...], **options: Any
) -> Figures:
    """Real runs, compared with their step alone, their pipeline alone, and timm's loader and loop."""
    from fasttrain.benchmarks.train import end_to_end
    from fasttrain.config.schema import DataConfig
    from fasttrain.data import index as dataset

    index, _ = dataset.open_data(DataConfig(train=(data,)))
    threads = here.threads(workers)
    chosen = _chosen_networks(here.device, workers=workers, **options)
    turns = {"steps": steps, "warm_up": warm_up, "rounds": rounds}
    rows = end_to_end(chosen, index, here, only=only, **turns)
    return rows, {"images": len(index), "losses": _losses(chosen), "workers": threads, **turns}
