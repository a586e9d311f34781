"""The benchmarks run, count by trace, and write what they found; what they measure is not asserted."""

import json

import pytest
import torch
from click.testing import CliRunner

from fasttrain import bench
from fasttrain.cli import main


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(bench, "BATCHES_CPU", (2,))
    monkeypatch.setattr(bench, "TRIPLET_CPU", ((8, 16),))
    monkeypatch.setattr(bench, "_SIZE", 16)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_bench_kernels_runs_and_writes(toy, tmp_path):
    path = tmp_path / "k.json"
    result = CliRunner().invoke(main, ["bench", "kernels", "--device", "cpu", "--rounds", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    told = json.loads(path.read_text())
    assert {"date", "device", "versions", "rows"} <= told.keys()
    assert torch.__version__.startswith(told["versions"]["torch"])
    own = [row for row in told["rows"] if row["contender"] == "fasttrain"]
    assert [row["work"] for row in own] == ["mix", "triplet"] and own[0]["launches"] == 1
    for row in told["rows"]:
        assert 0 < row["least"] <= row["seconds"] <= row["most"] and row["contender"] in result.stdout


def test_bytes_are_those_of_the_shapes():
    images = torch.zeros(3, 8, 10, 3, dtype=torch.uint8)
    count, moved = bench._trace(lambda: images.float().add_(1), torch.device("cpu"))
    assert count == 2 and moved == 720 + 3 * 2880  # bytes in, floats out, floats in and out again
