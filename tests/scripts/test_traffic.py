"""Bytes that operations move, compared with counts by hand."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT
from torch import nn

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def traffic():
    spec = importlib.util.spec_from_file_location("traffic", SCRIPTS / "traffic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_move_what_they_read_and_write(traffic):
    images, weight, single = (torch.zeros(shape) for shape in ((2, 4, 3, 3), (8, 4, 1, 1), (8, 1, 1, 1)))  # 72, 32, 8
    with torch.no_grad(), traffic.Traffic() as counted:
        output = torch.convolution(images, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # writes 144
        output.relu_()
        output.view(2, 72).add(1.0)
        torch.convolution(output, single, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 8)
    size = 4  # bytes per number
    assert counted.moved["convolution"] == size * (72 + 32 + 144)
    assert counted.moved["activation"] == size * 2 * 144 and counted.moved["add and scale"] == size * 2 * 144
    assert counted.moved["depthwise"] == size * (2 * 144 + 8) and counted.moved["rest"] == 0


def test_a_network_is_counted_forward_and_backward(traffic):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 10))
    _, multiply_adds = traffic.count(model, 2, 4)
    forward = 2 * (16 * 8 * 3 * 9 + 8 * 16 * 10)
    # The weights' gradients cost as much as the forward pass. So do the inputs', which the first layer does not need.
    assert multiply_adds == 2 * forward + 2 * 8 * 16 * 10


def test_the_script_writes_shares_that_sum_to_one(tmp_path):
    command = [sys.executable, SCRIPTS / "traffic.py", "--arch", "resnet18", "--json", tmp_path / "traffic.json"]
    subprocess.run([*map(str, command), "--image-size", "64"], check=True, timeout=300)
    (row,) = json.loads((tmp_path / "traffic.json").read_text())["rows"]
    assert sum(row["shares"].values()) == pytest.approx(1) and row["shares"]["rest"] < 0.1
    assert row["gmac_an_image"] == pytest.approx(3 * 0.149, rel=0.1)  # 0.149 GMAC per forward pass, according to timm


def test_the_script_does_not_overwrite_other_files(traffic, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = CliRunner().invoke(traffic.main, ["--json", str(tmp_path / "thesis.txt")])
    assert done.exit_code == 1 and "holds no benchmark results" in done.output
    assert (tmp_path / "thesis.txt").read_text() == "mine"
