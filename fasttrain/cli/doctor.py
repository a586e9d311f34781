"""`fasttrain doctor`: what a machine has and lacks, and which decoders work on its GPU."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fasttrain.cli.options import (
    FILE,
    FOLDER,
)
from fasttrain.utils.errors import UserError

if TYPE_CHECKING:
    pass


@click.command()
@click.option("--gpu", is_flag=True, help="Try every decoder on the GPU instead; takes a minute.")
@click.option("--data", type=FOLDER, metavar="DIR", help="With --gpu: images in class folders. Default: drawn ones.")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="With --gpu: write the figures.")
def doctor(gpu: bool, data: str | None, json_path: Path | None) -> None:
    """Say what this machine has and lacks, with the command that fixes it.

    Exit status 1 where something that is needed is missing, or, with --gpu, where the decoder that a run takes by
    default does not work.
    """
    if gpu:
        _try_decoders(data, json_path)
        return
    if data or json_path:
        raise UserError("doctor takes --data and --json together with --gpu only")
    from fasttrain.doctor.machine import examine

    findings = examine()
    for finding in findings:
        click.echo(f"{'ok  ' if finding.good else 'LACK'}  {finding.what}: {finding.found}")
        if finding.fix:
            click.echo(f"      {finding.fix}")
    sys.exit(0 if all(each.good or not each.needed for each in findings) else 1)


def _try_decoders(data: str | None, json_path: Path | None) -> None:
    import torch

    from fasttrain.benchmarks import common
    from fasttrain.doctor import decoders as decoder_check
    from fasttrain.pipelines import decoders

    if json_path:
        common.check_overwritable(json_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for line, trials in decoder_check.report(data):
        click.echo(line)
        if json_path:
            settings = {"data": "given" if data else "drawn", "advice": line}
            common.write_figures(json_path, device, [vars(each) for each in trials], settings)
    chosen = [each for each in trials if each.kind == decoders.rule().auto]
    if chosen and not chosen[0].good:
        sys.exit(1)
