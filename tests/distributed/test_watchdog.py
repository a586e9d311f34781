"""The watchdog names a rank that hangs and ends the run."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fasttrain.distributed.ranks import Ranks
from fasttrain.distributed.watchdog import EVALUATING, SAVING, TRAINING, WAITING, Beat, Watch, verdict

PROGRAM = """
import os, signal, sys, time
from fasttrain import train
from fasttrain.cli.main import main
original, kind = train.batches, os.environ["KIND"]


def hanging(*args, **settings):
    for count, batch in enumerate(original(*args, **settings)):
        if count == 3 and os.environ["RANK"] == "1":
            if kind == "frozen":
                print("PID", os.getpid(), flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        yield batch


train.batches = hanging
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "kind, message",
    [
        pytest.param("slow", "rank 1 is still waiting for images at step 4", marks=pytest.mark.slow),
        pytest.param("frozen", "rank 1 does not respond", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_hangs_is_named(demo_set, tmp_path, kind, message):
    """slow: rank 1 sleeps while it waits for images, as on a disk that hangs. frozen: its process is stopped."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "program.py"), "run", "--arch", "test_resnet", "--image-size", "32", "--device", "cpu"]
    command += ["--batch-size", "50", "--data", str(demo_set / "train"), "--out", str(tmp_path / "run")]
    command += ["--set", "machine.hang_timeout=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KIND": kind}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    stopped_pid = int(process.stdout.readline().split()[1]) if kind == "frozen" else 0
    start = time.monotonic()
    if stopped_pid:  # torchrun would wait half a minute before it kills a stopped process
        threading.Timer(15, lambda: os.kill(stopped_pid, signal.SIGKILL)).start()
    _, stderr = process.communicate(timeout=120)
    lines = [line for line in stderr.splitlines() if "fasttrain: " in line]
    assert process.returncode != 0 and len(lines) == 1, stderr
    assert message in lines[0] and "the others are training at step 4" in lines[0] and "resumes" in lines[0]
    assert time.monotonic() - start < 60


SLOW = """
import os, sys, time
from fasttrain import train
from fasttrain.checkpoints import checkpoint
from fasttrain.cli.main import main
original_evaluate, original_save_file = train.evaluate, checkpoint.save_file


def evaluate(model, crops, *args):
    def slowly():
        for batch in crops:
            time.sleep(1.2)
            yield batch

    return original_evaluate(model, slowly(), *args)


def save_file(*args):
    time.sleep(6)
    original_save_file(*args)


train.evaluate, checkpoint.save_file = evaluate, save_file
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_slow_rank_does_not_count_as_hanging(demo_set, tmp_path):
    """The evaluation, and the last save while the other rank is done, both take longer than the timeout."""
    (tmp_path / "program.py").write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "program.py"), "run", "--arch", "test_resnet", "--image-size", "32", "--device", "cpu"]
    command += ["--batch-size", "50", "--data", str(demo_set), "--out", str(tmp_path / "run"), "--epochs", "1"]
    command += ["--set", "machine.hang_timeout=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0 and "no progress" not in done.stderr, done.stderr


def beats(*positions: tuple[int, int]) -> dict[int, Beat]:
    return {rank: Beat(step, activity, 1, 1) for rank, (step, activity) in enumerate(positions)}


@pytest.mark.parametrize(
    "positions, silent, message",
    [
        ([(7, TRAINING), (7, WAITING)], [], "rank 1 is still waiting for images at step 8, while the others"),
        ([(6, SAVING), (7, WAITING), (7, TRAINING)], [], "rank 0 is still saving at step 7"),
        ([(7, EVALUATING), (7, TRAINING), (7, TRAINING)], [], "rank 1, rank 2 are still training at step 8"),
        ([(7, TRAINING), (7, TRAINING)], [], "all 2 ranks are training at step 8, and none is behind"),
        ([(7, TRAINING), (7, TRAINING)], [0], "rank 0 does not respond"),
        ([(7, TRAINING)], [], "rank 1 does not respond"),
        ([(1, WAITING)] * 12 + [(1, TRAINING)], [], re.escape("rank 6, rank 7, … are still waiting")),
    ],
)
def test_the_verdict_names_the_ranks_behind(positions, silent, message):
    line = verdict(beats(*positions), silent, max(2, len(positions)), 30)
    assert re.search(message, line) and line.startswith("no progress for 30 s: ") and "\n" not in line


def test_one_rank_starts_no_thread():
    with Watch(Ranks(0, 1, 0, 1, torch.device("cpu")), 0.01) as watch:
        watch.at(3, TRAINING)
        time.sleep(0.1)
        assert watch.thread is None
