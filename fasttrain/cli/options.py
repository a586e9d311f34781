"""What several commands share: option groups, types and checks."""

import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from fasttrain.config.choices import LINKS
from fasttrain.utils.environment import torchrun_variable
from fasttrain.utils.errors import UserError

PNG_SOFTWARE = "fasttrain"  # marks our pictures, so that a later command may overwrite them
SET_HELP = "Change a setting: key=value or part.key=value. Repeatable. `fasttrain recipes NAME` lists all settings."
FOLDER = click.Path(file_okay=False)
DATA = click.Path()  # a folder, a file of images, a pattern of such files, or an address
FILE = click.Path(dir_okay=False, path_type=Path)


class GroupedOption(click.Option):
    """An option that `--help` lists under the heading `group`."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in GROUPS:
            options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
            chosen = [option for option in options if getattr(option, "group", "Other") == group]
            records = [record for option in chosen if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


GROUPS = ("Model", "Data", "Training", "Search", "Evaluation", "Benchmark", "Machine", "Output", "Other")
(
    model_option,
    data_option,
    training_option,
    tuning_option,
    evaluation_option,
    benchmark_option,
    machine_option,
    output_option,
) = (partial(click.option, cls=GroupedOption, group=group) for group in GROUPS[:-1])


links_option = data_option("--links", type=click.Choice(LINKS), default="inside", show_default=True,
                           help="Take links to places inside the folder, or follow all links.")  # fmt: skip


def require_png(path: Path, option: str) -> None:
    """Raises UserError where an option's path cannot be a picture, or is a file that fasttrain did not draw."""
    from fasttrain.utils.text import printable

    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"{option} {printable(path)}: name a file that ends in .png, in a folder that exists")
    if path.exists() and PNG_SOFTWARE.encode() not in path.read_bytes()[:4096]:
        raise UserError(f"{option} {printable(path)} exists and is not a picture made by fasttrain; name another file")


def writes_files() -> bool:
    """Whether this process writes files: rank 0 does. On other machines the folders need not exist."""
    return torchrun_variable("RANK", 0) == 0


def shell_word(path: str | Path) -> str:
    """A path, quoted for a command line that the user can paste."""
    from fasttrain.utils.text import printable

    return shlex.quote(printable(path))


def program() -> str:
    """How this program was called, for command lines that the user can paste."""
    called = sys.argv[0]
    if called.endswith("__main__.py"):
        return "python -m fasttrain"
    on_path = shutil.which("fasttrain")
    elsewhere = not on_path or os.path.abspath(called) != os.path.abspath(on_path)
    return shell_word(called) if elsewhere and Path(called).name == "fasttrain" else "fasttrain"
