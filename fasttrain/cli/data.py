"""`fasttrain data`: make and check folders of images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import FILE, FOLDER, links_option, program, shell_word

if TYPE_CHECKING:
    from fasttrain.data.place_files import Placed


@click.group("data")
def data_() -> None:
    """Make and check folders of images."""


@data_.command("demo", short_help="Generate the demo set.")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed.")
def data_demo(folder: Path, seed: int) -> None:
    """Draw the demo set: ten classes with 50 JPEGs each in DIR/train and 25 each in DIR/val."""
    from fasttrain.data import demo_set
    from fasttrain.utils.text import printable

    made = demo_set.make(folder, seed)
    status = "made" if made else "already there:"
    click.echo(f"{status} {printable(folder)}: {len(demo_set.CLASSES)} classes, 500 train and 250 val images")


@data_.command("check", short_help="Name every bad file of a folder.")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--quarantine", type=FOLDER, metavar="DIR", help="Move bad files here; `data restore` moves them back.")
@click.option("--out", type=FILE, metavar="FILE.json", help="Write the report.")
@click.option("--workers", type=click.IntRange(0, 1024), default=0, show_default=True,
              help="Processes that decode; 0: one per core.")  # fmt: skip
@links_option
def data_check(folder: str, quarantine: str | None, out: Path | None, workers: int, links: str) -> None:
    """Decode every file of DIR with PIL and DALI, name the bad ones and what is unusual about others.

    DIR holds class folders, or train/ and val/ with class folders. Exit status 1 if a file is bad.
    """
    from fasttrain.data import check
    from fasttrain.data import quarantine as quarantines
    from fasttrain.utils.text import printable

    if out:
        check.require_writable(out)
    if quarantine:
        quarantines.check_quarantine_folder(folder, quarantine)
    report = check.examine(folder, workers, follow_links=links == "follow")
    if out:
        check.write_report(report, out)
    click.echo(report.text())
    if out:
        click.echo(f"wrote {printable(out)}")
    if quarantine:
        moved = quarantines.quarantine(folder, [finding.path for finding in report.bad], quarantine)
        undo = f"{program()} data restore {shell_word(quarantine)} {shell_word(folder)}"
        click.echo(f"moved {moved} files to {printable(quarantine)}; to undo: {undo}")
    if report.bad:
        sys.exit(1)


@data_.command("restore", short_help="Undo a quarantine.")
@click.argument("quarantine", metavar="QUARANTINE", type=FOLDER)
@click.argument("folder", metavar="DIR", type=FOLDER)
def data_restore(quarantine: str, folder: str) -> None:
    """Move the files of a quarantine back to where they were in DIR."""
    from fasttrain.data import quarantine as quarantines
    from fasttrain.utils.text import printable

    click.echo(f"moved {quarantines.restore(quarantine, folder)} files back from {printable(quarantine)}")


_place_option = click.option("--link/--copy", default=False, help="Make hard links or copies. Default: copies.")


@data_.command("vipriors", short_help="Build the VIPriors challenge's data set.")
@click.option("--imagenet", required=True, type=FOLDER, metavar="DIR", help="Holds train/<wnid>/ and val/.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="The set to make.")
@_place_option
def data_vipriors(imagenet: str, out: str, link: bool) -> None:
    """Build the VIPriors challenge's data set from a local ImageNet.

    Makes OUT/train and OUT/val (50 images per class each) and OUT/test/imgs, with labels.csv for offline scoring. A
    command that was interrupted resumes when it is called again.
    """
    from fasttrain.data import vipriors

    _print_placed(out, vipriors.prepare(Path(imagenet), Path(out), link))


@data_.command("cut", short_help="Draw a small set from a large folder.")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--per-class", required=True, type=click.IntRange(1), help="Training images per class.")
@click.option("--val-per-class", type=click.IntRange(0), help="Validation images per class. Default: as many.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="The set to make.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed.")
@_place_option
@links_option
def data_cut(
    folder: str, per_class: int, val_per_class: int | None, out: str, seed: int, link: bool, links: str
) -> None:
    """Draw a small OUT/train and OUT/val from a folder of class folders."""
    from fasttrain.data.scan import Limits
    from fasttrain.data.subset import make

    val = per_class if val_per_class is None else val_per_class
    _print_placed(out, make(Path(folder), per_class, val, Path(out), seed, link, limits=Limits(links)))


def _print_placed(out: str, placed: "Placed") -> None:
    from fasttrain.utils.text import printable

    counts = ", ".join(f"{count} {split}" for split, count in placed.counts.items())
    before = sum(placed.counts.values()) - placed.new
    reused = f" ({before} were there before)" if placed.made and before else ""
    click.echo(f"{'made' if placed.made else 'already there:'} {printable(out)}: {counts} images{reused}")
