"""`fasttrain export`: a run's network as a file for other programs."""

import signal
import sys
from pathlib import Path

import click

from fasttrain.cli.options import (
    DATA,
    FILE,
    GroupedCommand,
    data_option,
    evaluation_option,
    links_option,
    output_option,
)
from fasttrain.utils.decoder_messages import shown_once


@click.command(cls=GroupedCommand, short_help="Write a network for other programs, and check it.")
@click.argument("checkpoint_path", metavar="RUN", type=click.Path(path_type=Path))
@output_option("--to", required=True, type=FILE, metavar="FILE",
               help="Write this file: .safetensors or .pth (for timm), .onnx, or .pt2 (torch.export).")  # fmt: skip
@output_option(
    "--preprocess",
    is_flag=True,
    help="For .onnx and .pt2: build the crop, normalization and softmax into the file.",
)
@evaluation_option("--raw", is_flag=True, help="Use the raw weights where the checkpoint also has averaged ones.")
@data_option("--data", type=DATA, metavar="DIR|FILE",
             help="Images to check the file on. Default: the run's validation images, or the demo set.")  # fmt: skip
@links_option
@evaluation_option("--max-images", type=click.IntRange(0), default=500, show_default=True,
                   help="Check at most so many images, spread over all; 0: all.")  # fmt: skip
def export(
    checkpoint_path: Path, to: Path, preprocess: bool, raw: bool, data: str | None, links: str, max_images: int
) -> None:
    """Write a run's network for programs that do not have fasttrain.

    RUN is a run's folder (its best checkpoint), `last` or `best` in it, or a checkpoint's folder.

    The file is run on images (.onnx by onnxruntime, weights by timm) before it is put in place: its top-1 class must be
    the checkpoint's for 99.5 % of them. FILE.parity.json has the comparison, and config.json next to FILE has the
    classes and the preprocessing. `fasttrain eval` and `fasttrain predict` take FILE, too.
    """
    from fasttrain.export import export as exporting
    from fasttrain.utils.text import printable

    # An exception, after which temporary files are removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with shown_once():
            parity = exporting.export(
                checkpoint_path, to, takes_pixels=preprocess, raw=raw, data=data, links=links, most_images=max_images
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    click.echo(f"{parity}\nwrote {printable(to)}, config.json and {printable(to.name)}.parity.json")
