"""`fasttrain doctor`: what a machine has and lacks, and which decoders work on its GPU."""

import sys
from pathlib import Path

import click

from fasttrain.cli.options import FILE, FOLDER
from fasttrain.utils.errors import UserError


@click.command(short_help="Check what this machine lacks.")
@click.option("--gpu", is_flag=True, help="Try every image decoder on the GPU instead; takes one to two minutes.")
@click.option("--data", type=FOLDER, metavar="DIR", help="With --gpu: images in class folders. Default: drawn ones.")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="With --gpu: write the figures.")
def doctor(gpu: bool, data: str | None, json_path: Path | None) -> None:
    """Check this machine, and print the command that installs or fixes what is missing.

    Exit status 1 if something that fasttrain needs is missing, or, with --gpu, if the default decoder does not work.
    """
    if gpu:
        _try_decoders(data, json_path)
        return
    if data or json_path:
        raise UserError("doctor takes --data and --json together with --gpu only")
    from fasttrain.doctor.machine import examine

    findings = examine()
    for finding in findings:
        click.echo(f"{'ok  ' if finding.good else 'LACK'}  {finding.name}: {finding.status}")
        for line in finding.fix.splitlines():
            click.echo(f"      {line}")
    sys.exit(0 if all(finding.good or not finding.needed for finding in findings) else 1)


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
            common.write_figures(json_path, device, [vars(trial) for trial in trials], settings)
    default = [trial for trial in trials if trial.kind == decoders.rule().auto]
    if default and not default[0].good:
        sys.exit(1)
