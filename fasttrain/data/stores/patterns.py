"""Names that stand for several files, such as train-{000000..000012}.tar or train-*.parquet."""

import itertools
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic

from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
_MOST_SHARDS = 100_000


def expand(pattern: str) -> list[str]:
    """The files of a pattern such as train-{000000..000012}.tar or train-*.tar. Raises UserError where there are none,
    or far too many."""
    files: list[str] = []
    for name in expand_braces(pattern):
        files += sorted(glob(name)) if has_magic(name) and not os.path.lexists(name) else [name]
    if not files:
        raise UserError(f"no such file: {printable(pattern)}")
    return files


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for; they need not exist."""
    pieces = _BRACES.split(pattern)
    texts = pieces[::4]
    choices: list[Sequence[str]] = []
    count = 1
    for first, last, names in zip(pieces[1::4], pieces[2::4], pieces[3::4], strict=True):
        numbers = range(int(first), int(last) + 1) if first is not None else range(0)
        count *= len(numbers) if first is not None else names.count(",") + 1
        if count > _MOST_SHARDS:
            raise UserError(f"{printable(pattern)} stands for more than {_MOST_SHARDS:,} files")
        width = len(first or "")
        choices.append([str(number).zfill(width) for number in numbers] if first is not None else names.split(","))
    return [
        "".join(text + part for text, part in zip(texts, (*chosen, ""), strict=True))
        for chosen in itertools.product(*choices)
    ]
