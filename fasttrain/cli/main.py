"""The command line. Commands import torch, timm and DALI inside their functions, so that `--help` is quick."""

import errno
import io
import sys
from subprocess import CalledProcessError
from typing import Any

import click

from fasttrain import __version__
from fasttrain.cli.bench import bench
from fasttrain.cli.data import data_
from fasttrain.cli.doctor import doctor
from fasttrain.cli.ensemble import ensemble, score
from fasttrain.cli.evaluate import evaluate_, predict
from fasttrain.cli.export import export
from fasttrain.cli.recipes import recipes_, show
from fasttrain.cli.report import compare, report
from fasttrain.cli.run import run
from fasttrain.cli.tune import tune
from fasttrain.utils.environment import explain, out_of_memory, require_current_folder, require_working_python
from fasttrain.utils.errors import CommandError
from fasttrain.utils.output import discard_output, tolerant_output

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Group(click.Group):
    """Ends a command that fails for a known reason with one line and its exit status, even if nobody reads the line."""

    def main(self, *args: Any, **settings: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # the terminal's encoding may lack some characters
                stream.reconfigure(errors="backslashreplace")
        with tolerant_output(stdout=False):
            try:
                result = super().main(*args, **settings)
                sys.stdout.flush()
            except OSError as error:  # of stdout: errors of files are CommandErrors, and click handles a closed pipe
                if error.filename is not None or error.errno not in _WRITE_ERRORS:
                    raise
                discard_output()
                _print_error(f"cannot write the output: {error.strerror}")
                sys.exit(1)
            return result

    def invoke(self, ctx: click.Context) -> Any:
        try:
            require_current_folder()
            require_working_python()
            return super().invoke(ctx)
        except CommandError as error:
            if str(error):
                _print_error(str(error))
            sys.exit(error.exit_status)
        except ImportError as error:
            _print_error(f"{error} (Python {sys.executable}); `fasttrain doctor` lists what is missing")
            sys.exit(1)
        except (RuntimeError, CalledProcessError, MemoryError) as error:
            full = out_of_memory(error)
            if not full and (line := explain(error)):
                _print_error(line)
                sys.exit(1)
            if not full:
                raise
            training = ctx.invoked_subcommand == "run"
            smaller = "--set micro_batch=N or --image-size" if training else "--batch-size"
            _print_error(f"CUDA is out of memory; stop other programs on the GPU, or try a smaller {smaller}")
            sys.exit(1)
        except KeyboardInterrupt:
            resumes = (
                "; the same command goes on from the last checkpoint, if there is one"
                if ctx.invoked_subcommand == "run"
                else ""
            )
            _print_error(f"interrupted{resumes}")
            sys.exit(130)


def _print_error(line: str) -> None:
    click.echo(f"fasttrain: {line}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Train image classifiers from scratch, with NVIDIA DALI pipelines and a channels-last mixed-precision loop."""


_COMMANDS = (
    run, tune, evaluate_, predict, ensemble, score, report, compare, export, data_, recipes_, show, bench, doctor
)  # fmt: skip
for _command in _COMMANDS:
    main.add_command(_command)
