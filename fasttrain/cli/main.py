"""The command line. torch, timm and DALI are imported inside the commands, so that help comes at once."""

import sys
from typing import Any

import click

from fasttrain import __version__
from fasttrain.cli.bench import bench
from fasttrain.cli.data import data_
from fasttrain.cli.doctor import doctor
from fasttrain.cli.ensemble import ensemble, score
from fasttrain.cli.evaluate import evaluate_, predict
from fasttrain.cli.recipes import recipes_, show
from fasttrain.cli.run import run
from fasttrain.utils.errors import CommandError


class _Group(click.Group):
    """Ends every command that fails for a known reason with one line and the status that belongs to it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CommandError as error:
            if str(error):
                _complain(str(error))
            sys.exit(error.exit_status)
        except ImportError as error:
            _complain(f"{error} (Python {sys.executable}); `fasttrain doctor` says what is missing")
            sys.exit(1)
        except RuntimeError as error:
            # Not imported here: whoever raised torch's error has done so.
            if not isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
                raise
            training = ctx.invoked_subcommand == "run"
            smaller = "--set micro_batch=N or --image-size" if training else "--batch-size"
            _complain(f"CUDA is out of memory; end what else uses the GPU, or try a smaller {smaller}")
            sys.exit(1)
        except KeyboardInterrupt:
            goes_on = "; the same command goes on from the last checkpoint" if ctx.invoked_subcommand == "run" else ""
            _complain(f"interrupted{goes_on}")
            sys.exit(130)


def _complain(line: str) -> None:
    click.echo(f"fasttrain: {line}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Train image classifiers from scratch, with NVIDIA DALI pipelines and a channels-last mixed-precision loop."""


for _command in (run, evaluate_, predict, ensemble, score, data_, recipes_, show, bench, doctor):
    main.add_command(_command)
