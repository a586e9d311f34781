"""`fasttrain data`: make and check folders of images."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import DATA, FILE, FOLDER, links_option, program, shell_word
from fasttrain.config.choices import ON_BAD
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    from fasttrain.data.place_files import Placed


@click.group("data")
def data_() -> None:
    """Make and check folders and files of images."""


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


_workers_option = click.option("--workers", type=click.IntRange(0, 1024), default=0, show_default=True,
                               help="Processes that decode; 0: one per core.")  # fmt: skip


@data_.command("check", short_help="Name every bad image of a folder or a file of images.")
@click.argument("folder", metavar="DIR|FILE", type=DATA)
@click.option("--quarantine", type=FOLDER, metavar="DIR", help="Move bad files here; `data restore` moves them back.")
@click.option("--out", type=FILE, metavar="FILE.json", help="Write the report.")
@_workers_option
@links_option
def data_check(folder: str, quarantine: str | None, out: Path | None, workers: int, links: str) -> None:
    """Decode every image with PIL and DALI, name the bad ones and what is unusual about others.

    DIR holds class folders, or train/ and val/ with class folders; FILE is a table, tar shards or parquet. The images
    of a pack are compared with their hashes. Exit status 1 if an image is bad.
    """
    from fasttrain.data import check
    from fasttrain.data import quarantine as quarantines
    from fasttrain.data.open_data import is_container
    from fasttrain.data.scan import Limits
    from fasttrain.data.stage import local_name
    from fasttrain.data.stores.pack import is_pack
    from fasttrain.utils.text import printable

    if out:
        check.require_writable(out)
    folder = local_name(folder)
    if quarantine:
        quarantines.check_quarantine_folder(folder, quarantine)
    if quarantine and links == "follow":
        raise UserError("--quarantine moves files, and those that links lead to may belong to other folders")
    if quarantine and is_container(folder):
        raise UserError("--quarantine moves the bad files of a folder; these images are in, or listed by, a file")
    if is_pack(folder):
        report = check.examine_pack(folder)
    elif is_container(folder):
        report = check.examine_container(folder, workers, Limits(links))
    else:
        report = check.examine(folder, workers, links == "follow")
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
@click.option(
    "--long-tail",
    type=click.FloatRange(1, 1e9),
    default=1.0,
    metavar="RATIO",
    help="Classes of unequal size: the largest has --per-class training images, the smallest a RATIOth of them.",
)
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="The set to make.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed.")
@_place_option
@links_option
def data_cut(
    folder: str,
    per_class: int,
    val_per_class: int | None,
    long_tail: float,
    out: str,
    seed: int,
    link: bool,
    links: str,
) -> None:
    """Draw a small OUT/train and OUT/val from a folder of class folders."""
    from fasttrain.data.scan import Limits
    from fasttrain.data.subset import make

    val = per_class if val_per_class is None else val_per_class
    placed = make(Path(folder), per_class, val, Path(out), seed, link, limits=Limits(links), long_tail=long_tail)
    _print_placed(out, placed)


@data_.command("pack", short_help="Put a data set into one file that is quick to read.")
@click.argument("data", metavar="DIR|FILE", type=DATA)
@click.option("--out", required=True, type=FILE, metavar="FILE.safetensors", help="The pack to make.")
@click.option(
    "--pixels",
    type=click.Choice(["same", "jpeg", "raw"]),
    default="same",
    show_default=True,
    help="Keep the files, encode them again as JPEGs, or store their pixels, which need no decoder.",
)
@click.option(
    "--shorter-side",
    type=click.IntRange(16),
    metavar="N",
    help="With jpeg and raw: reduce larger images to this side, in pixels. Default: no image is reduced.",
)
@click.option("--quality", type=click.IntRange(1, 95), default=90, show_default=True, help="Of jpeg.")
@click.option(
    "--split",
    type=click.Choice(["all", "train", "val"]),
    default="all",
    show_default=True,
    help="Which images, where DIR holds train/ and val/.",
)
@click.option(
    "--on-bad",
    type=click.Choice(ON_BAD),
    default="stop",
    show_default=True,
    help="An image that cannot be decoded ends the command or is left out.",
)
@_workers_option
@links_option
def data_pack(
    data: str,
    out: Path,
    pixels: str,
    shorter_side: int | None,
    quality: int,
    split: str,
    on_bad: str,
    workers: int,
    links: str,
) -> None:  # fmt: skip
    """Put the images of DIR, or of a table, shards or parquet, into one file, which `--data FILE` takes like a folder.

    The file is an ordinary safetensors file. A command that was interrupted resumes when it is called again.
    """
    from fasttrain.data import pack
    from fasttrain.data.open_data import open_splits
    from fasttrain.data.scan import Limits
    from fasttrain.utils.text import printable

    def say(line: str) -> None:
        click.echo(line, err=True)

    indices = open_splits(data, split, Limits(links), keep_unreadable=on_bad == "skip")
    command = shlex.join(["fasttrain", "data", "pack", *sys.argv[3:]])
    encoding = pack.Encoding(pixels, shorter_side or 0, quality)
    made = pack.make(indices, out, encoding, workers=workers, skip_bad=on_bad == "skip", command=command, say=say)
    for image_id, reason in made.left_out:
        click.echo(f"left out {printable(image_id)}: {reason}")
    click.echo(f"wrote {printable(out)}: {made.images} images, {made.bytes / 1e6:.1f} MB")


@data_.command("unpack", short_help="Give the folder of a pack back.")
@click.argument("pack_path", metavar="PACK", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="The folder to make.")  # fmt: skip
def data_unpack(pack_path: Path, out: Path) -> None:
    """Write the images of a pack as files in class folders, in OUT/train and OUT/val where it has both.

    Each image is compared with its hash. Pixels become PNGs.
    """
    from fasttrain.data import pack
    from fasttrain.utils.text import printable

    click.echo(f"wrote {printable(out)}: {pack.unpack(pack_path, out)} images")


def _print_placed(out: str, placed: "Placed") -> None:
    from fasttrain.utils.text import printable

    counts = ", ".join(f"{count} {split}" for split, count in placed.counts.items())
    before = sum(placed.counts.values()) - placed.new
    reused = f" ({before} were there before)" if placed.made and before else ""
    click.echo(f"{'made' if placed.made else 'already there:'} {printable(out)}: {counts} images{reused}")
