"""`fasttrain report` and `fasttrain compare`: runs on one page, and two of them side by side."""

from collections.abc import Callable
from pathlib import Path

import click

from fasttrain.cli.options import (
    DATA,
    FILE,
    GroupedCommand,
    data_option,
    evaluation_option,
    machine_option,
    output_option,
)
from fasttrain.config.choices import DEVICES
from fasttrain.utils.decoder_messages import shown_once

_RUN = click.Path(path_type=Path)
_OPTIONS = (
    data_option("--data", type=DATA, metavar="DIR|FILE",
                help="Labeled images, as in `eval`. Default: the validation images of the run's recipe."),
    evaluation_option("--raw", is_flag=True, help="Use the raw weights where a checkpoint also has averaged ones."),
    machine_option("--device", type=click.Choice(DEVICES), default="auto", show_default=True,
                   help="auto: a GPU where there is one."),
    machine_option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at once."),
    machine_option("--workers", type=click.IntRange(0, 1024), default=0, show_default=True,
                   help="DALI threads; 0: one per core."),
)  # fmt: skip


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(cls=GroupedCommand, short_help="Make a page about runs: curves, scores, mistakes.")
@click.argument("runs", metavar="RUN…", nargs=-1, required=True, type=_RUN)
@_with_options
@output_option("--out", type=FILE, default=Path("report.html"), show_default=True, metavar="FILE.html",
               help="Write the page here.")  # fmt: skip
def report(
    runs: tuple[Path, ...], data: str | None, raw: bool, device: str, batch_size: int, workers: int, out: Path
) -> None:
    """Make one HTML page, which loads nothing from elsewhere, about runs: settings, curves, scores of each class,
    calibration, confusions and mistakes with their images, a batch as the network saw it, events.

    RUN is a run's folder, or that of `run --folds`. Several runs are overlaid; the images are then of the best one.
    What a run lacks, such as images that are no longer there, is left out and named on the page.
    """
    from fasttrain.report import page
    from fasttrain.report.runs import Options
    from fasttrain.utils.text import printable

    page.check_overwritable(out)
    with shown_once():
        html = page.build(runs, data=data, options=Options(device, raw, batch_size, workers))
    page.write(out, html)
    click.echo(f"wrote {printable(out)}: {len(html.encode()) / 2**10:,.0f} KiB")


@click.command(cls=GroupedCommand, short_help="Compare two runs on the same images.")
@click.argument("first", metavar="RUN|FILE.npz", type=_RUN)
@click.argument("second", metavar="RUN|FILE.npz", type=_RUN)
@_with_options
@output_option("--json", "json_path", type=FILE, metavar="FILE.json", help="Write the figures.")
def compare(
    first: Path,
    second: Path,
    data: str | None,
    raw: bool,
    device: str,
    batch_size: int,
    workers: int,
    json_path: Path | None,
) -> None:
    """Print the settings in which two runs differ, and the scores of their best checkpoints on the same images.

    The differences have 95 % intervals, from a paired bootstrap over the images; for the log-loss the interval assumes
    a normal distribution. McNemar's p is the chance of a difference this large if both networks were equally good.

    RUN is a run's folder; FILE.npz has probabilities that `eval --out` wrote.
    """
    from fasttrain.report import compare as comparison
    from fasttrain.report.runs import Options
    from fasttrain.utils.text import printable

    if json_path:
        comparison.check_overwritable(json_path)
    with shown_once():
        found = comparison.compare(first, second, data=data, options=Options(device, raw, batch_size, workers))
    click.echo(comparison.text(found))
    if json_path:
        comparison.write(json_path, found)
        click.echo(f"wrote {printable(json_path)}")
