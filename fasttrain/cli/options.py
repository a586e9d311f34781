"""What several commands of the command line take and check alike."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import click

from fasttrain.utils.errors import UserError

COMBINATIONS = ("ce", "ce+triplet", "ce+arcface")  # those of recipes/deepblueai.py, which would import torch
DECODERS = ("auto", "cpu", "gpu", "gpu-region", "gpu-hardware")  # those of config/schema.py, likewise
PNG_SOFTWARE = "fasttrain"  # in pictures, by which a later command knows that it may write over them
SET_HELP = "A setting of the recipe: key=value or part.key=value. Repeatable."
FOLDER = click.Path(file_okay=False)
FILE = click.Path(dir_okay=False, path_type=Path)


def require_png(path: Path, option: str) -> None:
    """UserError where an option's path is no place for a picture, or there is one there that is not ours."""
    from fasttrain.utils.text import printable

    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"{option} {printable(path)}: a PNG in a folder that is there; end the name in .png")
    if path.exists() and PNG_SOFTWARE.encode() not in path.read_bytes()[:4096]:
        raise UserError(f"{option} {printable(path)} is there and is no picture of fasttrain's; name another file")


def writes() -> bool:
    """Whether this process is the one that writes files; on other machines their folders need not be there."""
    return int(os.environ.get("RANK", 0)) == 0


def shell_word(path: str | Path) -> str:
    """A path as a word of a line that the user can repeat in a shell."""
    from fasttrain.utils.text import printable

    return shlex.quote(printable(path))


def program() -> str:
    """How this command was called, for lines that the user can repeat."""
    called = sys.argv[0]
    if called.endswith("__main__.py"):
        return "python -m fasttrain"
    on_path = shutil.which("fasttrain")
    elsewhere = not on_path or os.path.abspath(called) != os.path.abspath(on_path)
    return shell_word(called) if elsewhere and Path(called).name == "fasttrain" else "fasttrain"
