"""Help texts: options in groups."""

import click
import pytest
from helpers import call

from fasttrain.cli.main import main
from fasttrain.cli.options import GROUPS, GroupedCommand

GROUPED = [("run",), ("eval",), ("predict",), ("show",), *(("bench", name) for name in ("pipeline", "step", "train"))]


@pytest.mark.parametrize("words", GROUPED, ids=" ".join)
def test_options_are_listed_by_group(words):
    command = main
    for word in words:
        command = command.commands[word]
    assert isinstance(command, GroupedCommand)
    lines = call(*words, "--help").output.splitlines()
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [group for group in GROUPS if group in headings] and headings[-1] == "Other"
    group_of = {}
    for line in lines:
        if line.removesuffix(":") in headings and not line.startswith(" "):
            heading = line.removesuffix(":")
        if line.startswith("  --"):
            group_of[line.split()[0]] = heading
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert group_of == {option.opts[0]: option.group for option in options}
