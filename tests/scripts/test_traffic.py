"""Bytes that operations move, beside counts by hand."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT
from torch import nn

SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def traffic():
    spec = importlib.util.spec_from_file_location("traffic", SCRIPTS / "traffic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_kind_of_operation_moves_what_it_reads_and_writes(traffic):
    images, weight, single = (torch.zeros(shape) for shape in ((2, 4, 3, 3), (8, 4, 1, 1), (8, 1, 1, 1)))  # 72, 32, 8
    with torch.no_grad(), traffic.Traffic() as seen:
        made = torch.convolution(images, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # writes 144
        made.relu_()
        made.view(2, 72).add(1.0)
        torch.convolution(made, single, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 8)
    four = 4  # bytes a number
    assert seen.moved["convolution"] == four * (72 + 32 + 144)
    assert seen.moved["activation"] == four * 2 * 144 and seen.moved["add and scale"] == four * 2 * 144
    assert seen.moved["depthwise"] == four * (2 * 144 + 8) and seen.moved["rest"] == 0


def test_a_network_is_counted_forward_and_backward(traffic):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 10))
    _, multiply_adds = traffic.count(model, 2, 4)
    forward = 2 * (16 * 8 * 3 * 9 + 8 * 16 * 10)
    # The weights' gradients cost as much as the forward pass, and so do the inputs', which the first layer spares.
    assert multiply_adds == 2 * forward + 2 * 8 * 16 * 10


def test_the_script_writes_shares_of_a_whole(tmp_path):
    command = [sys.executable, SCRIPTS / "traffic.py", "--arch", "resnet18", "--json", tmp_path / "told.json"]
    subprocess.run([*map(str, command), "--image-size", "64"], check=True, timeout=300)
    (row,) = json.loads((tmp_path / "told.json").read_text())["rows"]
    assert sum(row["shares"].values()) == pytest.approx(1) and row["shares"]["rest"] < 0.1
    assert row["gmac_an_image"] == pytest.approx(3 * 0.149, rel=0.1)  # timm's figure for one forward pass


def test_the_script_does_not_write_over_what_is_no_figures(traffic, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = CliRunner().invoke(traffic.main, ["--json", str(tmp_path / "thesis.txt")])
    assert done.exit_code == 1 and "holds no figures of a benchmark" in done.output
    assert (tmp_path / "thesis.txt").read_text() == "mine"
