"""A run whose output cannot be written, and a terminal that closes."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import LONG, await_line, events, start_run

from fasttrain.checkpoints import checkpoint, meta

SHELL = '"$PYTHON" -m fasttrain run --arch test_resnet --image-size 32 --batch-size 50 --epochs 2 --device cpu --data '


def shell(command, demo_set, tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    text = command.replace("RUN", f"{SHELL}{demo_set / 'train'} --out {tmp_path / 'run'}").replace("TMP", str(tmp_path))
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=200, env=env)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("(RUN 2>&1; echo $? >TMP/status) | head -1", id="closed pipe"),
        pytest.param("RUN 2>/dev/full >/dev/full; echo $? >TMP/status", id="full disk", marks=pytest.mark.slow),
        pytest.param("RUN 2>&- >&-; echo $? >TMP/status", id="closed streams", marks=pytest.mark.slow),
    ],
)
def test_output_that_cannot_be_written_does_not_end_a_run(demo_set, tmp_path, command):
    done = shell(command, demo_set, tmp_path)
    assert (tmp_path / "status").read_text().strip() == "0", done.stderr
    assert meta.read(checkpoint.find(tmp_path / "run" / "last"))["step"] == 20
    assert events(tmp_path / "run")[-1]["event"] == "end"


def test_the_exit_status_tells_what_nobody_reads(demo_set, tmp_path):
    done = shell("RUN --batch-size 9999 2>/dev/full; echo $? >TMP/status", demo_set, tmp_path)
    assert (tmp_path / "status").read_text().strip() == "2", done.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("run --no-such-option 2>/dev/full", 2),
        ("run --epochs x 2>&1 | true; exit ${PIPESTATUS[0]}", 2),
        ("recipes >/dev/full", 1),
        ("recipes tresnet >/dev/full 2>/dev/full", 2),
        ("recipes | true; exit ${PIPESTATUS[0]}", 1),
    ],
)
def test_commands_end_with_their_status_where_output_cannot_be_written(command, status):
    command = command.replace("run", '"$PYTHON" -m fasttrain run').replace("recipes", '"$PYTHON" -m fasttrain recipes')
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert command.count(">") != 1 or status != 1 or "cannot write the output: No space left" in done.stderr


@pytest.mark.slow
def test_sighup_stops_and_saves_a_run(demo_set, tmp_path):
    process = start_run(*LONG, "--data", demo_set / "train", "--out", tmp_path / "run")
    await_line(process, "epoch 0")
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGHUP after step" in stderr


@pytest.mark.slow
def test_an_ignored_sighup_does_not_stop_a_run(demo_set, tmp_path):
    command = "trap '' HUP; RUN >TMP/out 2>&1 & until grep -q 'epoch 0' TMP/out; do sleep 0.1; done; kill -HUP $!; wait"
    shell(command, demo_set, tmp_path)
    assert events(tmp_path / "run")[-1]["event"] == "end"
