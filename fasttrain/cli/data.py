"""`fasttrain data`: make and inspect folders of images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import (
    FILE,
    FOLDER,
    program,
    shell_word,
)

if TYPE_CHECKING:
    from fasttrain.data.place_files import Placed


@click.group("data")
def data_() -> None:
    """Make and inspect folders of images."""


@data_.command("demo")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Other seed, other pictures.")
def data_demo(folder: Path, seed: int) -> None:
    """Draw the demo set: DIR/train and DIR/val with ten classes of 50 and 25 JPEGs each."""
    from fasttrain.data import demo_set
    from fasttrain.utils.text import printable

    made = demo_set.make(folder, seed)
    what = "made" if made else "already there:"
    click.echo(f"{what} {printable(folder)}: {len(demo_set.CLASSES)} classes, 500 train and 250 val images")


@data_.command("check")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--quarantine", "aside", type=FOLDER, metavar="DIR", help="Move bad files here, to be moved back later.")
@click.option("--out", type=FILE, metavar="FILE.json", help="Write the report.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes that decode. 0: one a core.")
def data_check(folder: str, aside: str | None, out: Path | None, workers: int) -> None:
    """Read every file of DIR with two decoders and name the bad ones, and what is odd about others.

    DIR holds class folders, or train/ and val/ with such. Exit status 1 where a file is bad.
    """
    from fasttrain.data import check, quarantine
    from fasttrain.utils.text import printable

    if out:
        check.require_writable(out)
    if aside:
        quarantine.require_place(folder, aside)
    report = check.examine(folder, workers)
    if out:
        check.write_report(report, out)
    click.echo(report.text())
    if out:
        click.echo(f"wrote {printable(out)}")
    if aside:
        moved = quarantine.quarantine(folder, [each.path for each in report.bad], aside)
        back = f"{program()} data restore {shell_word(aside)} {shell_word(folder)}"
        click.echo(f"moved {moved} files to {printable(aside)}; back: {back}")
    if report.bad:
        sys.exit(1)


@data_.command("restore")
@click.argument("aside", metavar="ASIDE", type=FOLDER)
@click.argument("folder", metavar="DIR", type=FOLDER)
def data_restore(aside: str, folder: str) -> None:
    """Move the files of a quarantine, ASIDE, back to where they were in DIR."""
    from fasttrain.data import quarantine
    from fasttrain.utils.text import printable

    click.echo(f"moved {quarantine.restore(aside, folder)} files back from {printable(aside)}")


_link_option = click.option("--link/--copy", default=False, help="Hard links instead of copies. Default: copies.")


@data_.command("vipriors")
@click.option("--imagenet", required=True, type=FOLDER, metavar="DIR", help="Holds train/<wnid>/ and val/.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="The set to make.")
@_link_option
def data_vipriors(imagenet: str, out: str, link: bool) -> None:
    """Build the VIPriors challenge's ImageNet-50 from a local ImageNet: OUT/train, OUT/val (50 images a class each)
    and OUT/test/imgs, with labels.csv for offline scoring.

    The same command again goes on where it was stopped.
    """
    from fasttrain.data import vipriors

    _say_placed(out, vipriors.prepare(Path(imagenet), Path(out), link))


@data_.command("cut")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--per-class", required=True, type=click.IntRange(1), help="Training images a class.")
@click.option("--val-per-class", type=click.IntRange(0), help="Validation images a class. Default: as many.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="The set to make.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Other seed, other images.")
@_link_option
def data_cut(folder: str, per_class: int, val_per_class: int | None, out: str, seed: int, link: bool) -> None:
    """Draw OUT/train and OUT/val, a few images a class each, from a folder of class folders."""
    from fasttrain.data.subset import make

    val = per_class if val_per_class is None else val_per_class
    _say_placed(out, make(Path(folder), per_class, val, Path(out), seed, link))


def _say_placed(out: str, placed: "Placed") -> None:
    from fasttrain.utils.text import printable

    counts = ", ".join(f"{count} {split}" for split, count in placed.counts.items())
    before = sum(placed.counts.values()) - placed.new
    was = f" ({before} were there from before)" if placed.made and before else ""
    click.echo(f"{'made' if placed.made else 'already there:'} {printable(out)}: {counts} images{was}")
