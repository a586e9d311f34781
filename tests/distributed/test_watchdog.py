"""A rank that hangs is named, and the run ends instead of waiting for it for ever."""

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
honest, how = train.batches, os.environ["HOW"]


def watched(*args, **settings):
    for count, batch in enumerate(honest(*args, **settings)):
        if count == 3 and os.environ["RANK"] == "1":
            if how == "frozen":
                print("PID", os.getpid(), flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        yield batch


train.batches = watched
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "how, says",
    [
        ("slow", "rank 1 is still waiting for images at step 4"),
        pytest.param("frozen", "rank 1 does not respond", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_hangs_is_named(demo_set, tmp_path, how, says):
    """One sleeps while it waits for images, as on a disk that does not answer; one is stopped as a whole."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "program.py"), "run", "--arch", "test_resnet", "--image-size", "32", "--device", "cpu"]
    command += ["--batch-size", "50", "--data", str(demo_set / "train"), "--out", str(tmp_path / "run")]
    command += ["--set", "machine.hang_timeout=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOW": how}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    stopped = int(process.stdout.readline().split()[1]) if how == "frozen" else 0
    began = time.monotonic()
    if stopped:  # torchrun waits for a stopped process half a minute before it kills it
        threading.Timer(15, lambda: os.kill(stopped, signal.SIGKILL)).start()
    _, said = process.communicate(timeout=120)
    told = [line for line in said.splitlines() if "fasttrain: " in line]
    assert process.returncode != 0 and len(told) == 1, said
    assert says in told[0] and "the others are training at step 4" in told[0] and "resumes" in told[0]
    assert time.monotonic() - began < 60


SLOW = """
import os, sys, time
from fasttrain import train
from fasttrain.checkpoints import checkpoint
from fasttrain.cli.main import main
honest, save = train.evaluate, checkpoint.save_file


def evaluate(model, crops, *args):
    def slowly():
        for each in crops:
            time.sleep(1.2)
            yield each

    return honest(model, slowly(), *args)


def save_file(*args):
    time.sleep(6)
    save(*args)


train.evaluate, checkpoint.save_file = evaluate, save_file
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_who_is_slow_is_not_taken_for_one_that_hangs(demo_set, tmp_path):
    """An evaluation, and the last save while the other rank has nothing left to do, each longer than the timeout."""
    (tmp_path / "program.py").write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "program.py"), "run", "--arch", "test_resnet", "--image-size", "32", "--device", "cpu"]
    command += ["--batch-size", "50", "--data", str(demo_set), "--out", str(tmp_path / "run"), "--epochs", "1"]
    command += ["--set", "machine.hang_timeout=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0 and "no progress" not in done.stderr, done.stderr


def beats(*places: tuple[int, int]) -> dict[int, Beat]:
    return {rank: Beat(step, doing, 1, 1) for rank, (step, doing) in enumerate(places)}


@pytest.mark.parametrize(
    "places, silent, says",
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
def test_who_is_behind(places, silent, says):
    line = verdict(beats(*places), silent, max(2, len(places)), 30)
    assert re.search(says, line) and line.startswith("no progress for 30 s: ") and "\n" not in line


def test_one_rank_needs_no_watch():
    with Watch(Ranks(0, 1, 0, 1, torch.device("cpu")), 0.01) as watch:
        watch.at(3, TRAINING)
        time.sleep(0.1)
        assert watch.thread is None
