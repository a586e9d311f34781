"""The GPU suite's script, as far as a machine without one allows: a part at toy size, going on, and its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_suite.sh"


def suite(out, data, *parts, **environment):
    env = {**os.environ, "TOY": "1", "DATA": str(data), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env["FASTTRAIN"] = str(Path(sys.executable).parent / "fasttrain")
    command = ["bash", str(SCRIPT), str(out), *parts]
    return subprocess.run(command, capture_output=True, text=True, env=env | environment, timeout=900)


def test_a_part_is_done_once_and_told_in_one_file_and_a_table(demo_set, tmp_path):
    done = suite(tmp_path / "out", demo_set / "val", "parity")
    assert done.returncode == 0, done.stdout + done.stderr
    everything = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [row["size"] for row in everything["parity-gpu"]["rows"]] == [224, 448]
    assert all(row["mean"] < 0.5 and row["images"] == 250 for row in everything["parity-gpu"]["rows"])
    assert (
        everything["parity-gpu"]["versions"]["torch"] and "## parity-gpu" in (tmp_path / "out" / "gpu.md").read_text()
    )
    assert "parity: done before" in suite(tmp_path / "out", demo_set / "val", "parity").stdout


def test_a_part_that_fails_is_told_and_tried_again(demo_set, tmp_path):
    failed = suite(tmp_path / "out", demo_set / "val", "host", "parity", FASTTRAIN="false")
    assert failed.returncode == 2 and "there is no part host" in failed.stderr
    failed = suite(tmp_path / "out", demo_set / "val", "kernels", FASTTRAIN="false")
    assert failed.returncode == 1 and "failed: kernels" in failed.stderr
    assert not (tmp_path / "out" / "kernels.done").exists()
    assert suite(tmp_path / "out", tmp_path / "nowhere").returncode == 2


@pytest.mark.slow
def test_every_part_works_at_toy_size(demo_set, tmp_path):
    done = suite(tmp_path / "out", demo_set / "val")
    assert done.returncode == 0, done.stdout + done.stderr
    names = json.loads((tmp_path / "out" / "gpu.json").read_text()).keys()
    assert {"tests", "kernels-gpu", "step-gpu", "host-gpu", "step-plain", "step-aligned", "pipeline-gpu", "train-gpu",
            "train-without-autoaugment", "step-largest-test_resnet", "parity-gpu"} <= names  # fmt: skip
