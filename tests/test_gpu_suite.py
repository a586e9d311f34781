"""The GPU suite's script, as far as a machine without one allows: a part at toy size, going on, and its report."""

import json
import os
import re
import subprocess
import sys
import time
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
    assert failed.returncode == 1 and "not done: kernels" in failed.stderr
    assert not (tmp_path / "out" / "kernels.done").exists()
    assert suite(tmp_path / "out", tmp_path / "nowhere").returncode == 2


# In place of fasttrain: it tells what it is asked to do, never ends where $HANGS names it, and has no figures.
STUB = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in *"$HANGS"*) sleep 60 ;; esac
while [ "$1" != --json ]; do shift; done
echo '{"rows": []}' > "$2"
"""


@pytest.fixture
def stub(tmp_path):
    """Runs the suite with it, where it hangs on one thing; gives the result and what it was asked to do."""
    command, calls = tmp_path / "stub", tmp_path / "calls"
    command.write_text(STUB)
    command.chmod(0o755)

    def run(*parts, hangs, **limits):
        calls.write_text("")
        more = {"FASTTRAIN": str(command), "CALLS": str(calls), "HANGS": hangs} | limits
        return suite(tmp_path / "out", tmp_path, *parts, **more), calls.read_text().splitlines()

    return run


def test_a_part_that_runs_over_is_ended_and_goes_on_with_what_is_missing(stub, tmp_path):
    done, calls = stub("step", "autoaugment", hangs="--host", LIMIT="2")
    assert done.returncode == 1 and "not done: step;" in done.stderr
    assert "step: ended, its 2 s were over" in done.stdout and "autoaugment: " in done.stdout
    assert len(calls) == 3 and (tmp_path / "out" / "autoaugment.done").exists()
    told = json.loads((tmp_path / "out" / "gpu.json").read_text()).keys()
    assert told == {"step-test_resnet", "train-without-autoaugment"}  # what was there by then stays
    done, calls = stub("step", "autoaugment", hangs="nothing", LIMIT="60")
    assert done.returncode == 0 and len(calls) == 1 and "--host" in calls[0]
    assert "host-gpu" in json.loads((tmp_path / "out" / "gpu.json").read_text())


def test_no_part_runs_beyond_the_time_for_all(stub, tmp_path):
    done, calls = stub("step", "memory", "train", hangs="--host", TOTAL="2")
    assert done.returncode == 1 and "not done: step memory train;" in done.stderr
    assert "ended" in done.stdout and "memory: not begun" in done.stdout and "train: not begun" in done.stdout
    assert len(calls) == 2 and (tmp_path / "out" / "gpu.md").exists()


def test_the_largest_batch_is_the_last_that_works(stub, tmp_path):
    done, _ = stub("memory", hangs="nothing")
    assert done.returncode == 0, done.stderr
    assert {each.name for each in (tmp_path / "out" / "memory").iterdir()} == {
        "test_resnet-8.json",
        "test_resnet-16.json",
    }
    assert "step-largest-test_resnet" in json.loads((tmp_path / "out" / "gpu.json").read_text())


def test_a_signal_to_the_script_ends_what_it_runs(demo_set, tmp_path):
    command = tmp_path / "stub"
    command.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    command.chmod(0o755)
    env = os.environ | {"TOY": "1", "DATA": str(demo_set / "val"), "PYTHON": sys.executable, "FASTTRAIN": str(command)}
    running = subprocess.Popen(["bash", str(SCRIPT), str(tmp_path / "out"), "kernels"], env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.terminate()
    assert running.wait(60) == 130 and (tmp_path / "out" / "gpu.json").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_its_tests_are_all_that_need_a_gpu():
    marked = {each.name for each in Path(__file__).parent.glob("test_*.py") if "pytest.mark.gpu" in each.read_text()}
    (named,) = re.findall(r"tests=\((.*)\) marks=\(-m gpu\)", SCRIPT.read_text())
    assert {*named.split()} == marked - {Path(__file__).name}


@pytest.mark.slow
def test_every_part_works_at_toy_size(demo_set, tmp_path):
    done = suite(tmp_path / "out", demo_set / "val")
    assert done.returncode == 0, done.stdout + done.stderr
    names = json.loads((tmp_path / "out" / "gpu.json").read_text()).keys()
    expected = "tests kernels-gpu step-test_resnet host-gpu step-plain step-aligned pipeline-8 train-test_resnet"
    assert {
        *expected.split(),
        "train-without-autoaugment",
        "step-graphs",
        "step-largest-test_resnet",
        "parity-gpu",
    } <= names
