"""Full, missing and failing disks: files on them stay intact, and the failure is reported in one line."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import LONG, await_line, call, events, part_of, run, same, start_run, tiny

from fasttrain import train as training
from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.async_save import Saver
from fasttrain.config.schema import CheckpointConfig, DataConfig
from fasttrain.models import Classifier
from fasttrain.training import optim
from fasttrain.training.log import Log
from fasttrain.training.state import State
from fasttrain.utils.errors import RunError


@pytest.fixture(scope="module")
def index(demo_set):
    """60 images: three steps of 20 per epoch."""
    return part_of(demo_set, 6)


# ---- a full disk


def run_with_file_limit(limit: int, *args: object) -> subprocess.CompletedProcess:
    """`fasttrain run` where no file may grow beyond `limit` bytes, as on a full disk."""
    command = [sys.executable, "-m", "fasttrain", "run", "--device", "cpu", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=env,
        timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


EVERY_FIVE = ("--set", "checkpoint.every_steps=5", "--set", "checkpoint.keep=9")
SHORT = ("--arch", "test_resnet", "--image-size", "32", "--batch-size", "50", "--seed", "0")


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(demo_set, tmp_path):
    """The second run cannot write more than 100 kB into a file. The third has room again and resumes."""
    args = (*SHORT, "--data", demo_set / "train", "--out", tmp_path / "run")
    call("run", "--device", "cpu", *args, "--epochs", 3, *EVERY_FIVE)
    out = tmp_path / "run"
    shutil.copytree(out, tmp_path / "expected", symlinks=True)
    for name in ("step-00000030", "step-00000025"):  # as if it had stopped at step 20
        shutil.rmtree(out / "checkpoints" / name)
    (out / "last").unlink()
    (out / "last").symlink_to("checkpoints/step-00000020")
    done = run_with_file_limit(100_000, *args, "--epochs", 3, *EVERY_FIVE)
    last_line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last_line.startswith("fasttrain: cannot write a checkpoint to")
    assert last_line.endswith("the one before is intact")
    assert checkpoint.load(out / "last").meta["step"] == 20
    call("run", "--device", "cpu", *args, "--epochs", 3, *EVERY_FIVE)
    same(out, tmp_path / "expected")


def test_training_continues_past_a_full_disk(index, tmp_path, monkeypatch, capsys):
    """The saves of the second and third of four epochs fail and the run continues; its last save must succeed."""
    recipe = tiny(epochs=4, checkpoint=CheckpointConfig(on_error="go_on"))
    run(recipe, tmp_path / "expected", index, index)
    original, calls = checkpoint.save_file, [0]

    def save_file(tensors, path):
        calls[0] += 1
        if 2 < calls[0] < 5:  # the first file of two checkpoints
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    run(recipe, tmp_path / "run", index, index)
    log = events(tmp_path / "run")
    assert len([event for event in log if event["event"] == "save_failed"]) == 2
    assert [event["step"] for event in log if event["event"] == "checkpoint"] == [3, 12]
    assert capsys.readouterr().err.count("training continues, because checkpoint.on_error is go_on") == 2
    same(tmp_path / "run", tmp_path / "expected")

    def fail(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(RunError, match=r"cannot write a checkpoint to .*No space left.*the one before is intact"):
        run(recipe, tmp_path / "last", index, index)


@pytest.mark.parametrize("tolerant", [False, True])
def test_a_log_on_a_full_disk(tmp_path, capsys, tolerant):
    """A line that is cut off by a full disk damages no other line. It runs in another process because of the limit."""
    program = f"""
import resource, sys
from pathlib import Path
import torch
from fasttrain.distributed.ranks import Ranks
from fasttrain.utils.errors import RunError
from fasttrain.models import Classifier
from fasttrain.training.log import Log
log = Log(Path({str(tmp_path)!r}), Ranks(0, 1, 0, 1, torch.device("cpu")), start_step=0, steps=9, batch_size=1,
          tolerant={tolerant}, tensorboard=False)
log.event("one", text="x" * 50)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    log.event("two", text="x" * 50)
    log.event("three", text="x" * 50)
except RunError as error:
    print("stopped:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.event("four", text="x" * 50)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in (lines[0], lines[-1])] == ["one", "four"] and len(lines) == 3
    assert done.stderr.count("cannot write") == (1 if tolerant else 0)
    assert done.stdout.startswith("stopped: cannot write") == (not tolerant)


@pytest.mark.parametrize("reported", ["at once", "at the next save"])
@pytest.mark.parametrize(
    ("top1s", "failing_save", "best"),
    [
        ([0.1, 0.9, 0.5, 0.4], 2, 0.5),
        ([0.1, 0.9, 0.5, 0.6], 3, 0.9),  # the failed one was not the best
        ([0.1, 0.5, 0.9, 0.6], 2, 0.9),
    ],
)
def test_best_is_the_best_checkpoint_on_disk(index, tmp_path, monkeypatch, reported, top1s, failing_save, best):
    """Where a checkpoint cannot be written, `best` is the best of the others."""
    remaining = iter(top1s)
    monkeypatch.setattr(training, "evaluate", lambda *args: training.Scores(next(remaining), 1.0, 60))
    original, files = checkpoint.save_file, [0]

    def save_file(tensors, path):
        files[0] += 1
        if files[0] == 2 * failing_save - 1:
            files[0] += 1  # the other file of this checkpoint
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(Saver, "poll", Saver.finish if reported == "at once" else lambda self: None)
    result = run(tiny(epochs=4, checkpoint=CheckpointConfig(on_error="go_on", keep=9)), tmp_path / "run", index, index)
    assert result.best == best and checkpoint.load(tmp_path / "run" / "best").meta["scores"]["top1"] == best
    assert checkpoint.load(tmp_path / "run" / "last").meta["best"] == best


def test_a_disk_without_links(index, tmp_path, monkeypatch):
    """`last` and `best` are files of one line instead; everything else, including resuming, is the same."""

    def fail(*args, **settings):
        raise OSError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", fail)
        patch.setattr(os, "link", fail)
        recipe = tiny(epochs=2, checkpoint=CheckpointConfig(keep=1))
        run(recipe, tmp_path / "run", index, index)
        assert (tmp_path / "run" / "last").read_text() == "checkpoints/step-00000006\n"
        assert checkpoint.find(tmp_path / "run" / "last").name == "step-00000006"
        assert checkpoint.find(tmp_path / "run").name == checkpoint.read_link(tmp_path / "run" / "best").name
        assert run(recipe, tmp_path / "run", index, index).steps == 6
        kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
        assert kept == {"step-00000006", checkpoint.find(tmp_path / "run").name}


def test_training_continues_past_io_errors(index, tmp_path, monkeypatch):
    """In the first save even looking up names fails; the last save succeeds."""
    original, calls = checkpoint.free_name, [0]

    def free_name(*args):
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(5, "Input/output error")
        return original(*args)

    monkeypatch.setattr(checkpoint, "free_name", free_name)
    run(tiny(epochs=2, checkpoint=CheckpointConfig(on_error="go_on")), tmp_path / "run", index)
    assert [event["event"] for event in events(tmp_path / "run") if "save" in event["event"]] == ["save_failed"]


# ---- saving in a thread


def test_the_loop_does_not_wait_for_the_disk(index, tmp_path, monkeypatch):
    """While a write hangs, training continues; the file has the weights of its step, not later ones."""
    recipe = tiny(epochs=2)
    run(recipe, tmp_path / "expected", index)
    steps: list[int] = []
    written, original = threading.Event(), checkpoint.save_file
    advance = Log.advance

    def slow(tensors, path):
        while len(steps) < 5 and not written.is_set():  # two steps after the first save, which comes after the third
            time.sleep(0.01)
        written.set()
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Log, "advance", lambda log: (steps.append(1), advance(log)))
    run(recipe, tmp_path / "run", index)
    assert written.is_set()
    for name in ("step-00000003", "step-00000006"):
        ours, theirs = (checkpoint.load(tmp_path / folder / "checkpoints" / name) for folder in ("run", "expected"))
        for one, other in ((ours.model, theirs.model), (ours.train, theirs.train)):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    saves = [event for event in events(tmp_path / "run") if event["event"] == "checkpoint"]
    assert all(event["held_s"] >= 0 and event["write_s"] > 0 for event in saves) and len(saves) == 2


def test_a_checkpoint_has_the_values_of_its_step(index, tmp_path, monkeypatch):
    """The logged values of the epoch so far do not change while a thread writes them."""
    recipe = tiny(epochs=2, checkpoint=CheckpointConfig(every_steps=2, keep=9))
    recipe = replace(recipe, machine=replace(recipe.machine, log_steps=1))
    steps: list[int] = []
    original, advance = checkpoint.save_file, Log.advance

    def slow(tensors, path):
        deadline = time.monotonic() + 2
        while len(steps) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Log, "advance", lambda log: (steps.append(1), advance(log)))
    run(recipe, tmp_path / "run", index)
    logged = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000002").meta["logged"]
    losses = [event["terms"]["cross_entropy"] for event in events(tmp_path / "run") if event["event"] == "train"]
    assert logged == {"cross_entropy": losses[:2]}


def test_ctrl_c_while_a_checkpoint_is_being_written(index, tmp_path, monkeypatch):
    """The checkpoint is finished and logged before the run ends."""
    original, began = checkpoint.save_file, threading.Event()

    def slow(tensors, path):
        began.set()
        time.sleep(1.5)
        original(tensors, path)

    wait = Saver._wait

    def interrupted(self):
        assert began.wait(20)
        monkeypatch.setattr(Saver, "_wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Saver, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(epochs=2), tmp_path / "run", index)
    saves = [event for event in events(tmp_path / "run") if event["event"] == "checkpoint"]
    assert [event["path"] for event in saves] == ["checkpoints/step-00000003"]
    checkpoint.verify(tmp_path / "run" / "last")


def test_no_thread_is_left(index, tmp_path, monkeypatch):
    """Neither after a run, nor after one that failed while a checkpoint was being written."""
    before = set(threading.enumerate())
    run(tiny(epochs=1), tmp_path / "run", index)
    original = Saver.save

    def save(*args, **settings):
        original(*args, **settings)
        raise ZeroDivisionError

    monkeypatch.setattr(Saver, "save", save)
    with pytest.raises(ZeroDivisionError):
        run(tiny(epochs=1), tmp_path / "failed", index)
    assert {thread for thread in threading.enumerate() if thread.name in ("saver", "watch")} <= before
    checkpoint.verify(tmp_path / "failed" / "last")
    assert [event["step"] for event in events(tmp_path / "failed") if event["event"] == "checkpoint"] == [3]


# ---- missing and read-only data


@pytest.mark.parametrize("on_bad", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_missing_images_end_the_run_with_one_line(demo_set, tmp_path, on_bad):
    """The folder is renamed during the run and then renamed back; the same command resumes."""
    shutil.copytree(demo_set / "train", tmp_path / "data")
    args = (*LONG, "--data", tmp_path / "data", "--out", tmp_path / "run", "--on-bad", on_bad)
    first = start_run(*args)
    await_line(first, "epoch 1")
    (tmp_path / "data").rename(tmp_path / "renamed")
    _, stderr = first.communicate(timeout=100)
    last_line = stderr.splitlines()[-1]
    assert first.returncode == 1 and "Traceback" not in stderr
    assert last_line.startswith(f"fasttrain: {tmp_path / 'data'}/") and "no longer exists" in last_line
    assert "skipping" not in stderr
    (tmp_path / "renamed").rename(tmp_path / "data")
    second = start_run(*args)
    await_line(second, " of 4000")
    second.kill()
    second.communicate()
    starts = [event["event"] for event in events(tmp_path / "run") if event["event"] in ("start", "resume")]
    assert starts == ["start", "resume"]


@pytest.mark.slow
def test_nothing_is_written_to_the_image_folders(demo_set, tmp_path):
    """A read-only mount is enough. Root may write anyway, so the times of the files must not change either."""
    data = tmp_path / "data"
    shutil.copytree(demo_set / "train", data)
    files = [data, *data.rglob("*")]
    for path in files:
        path.chmod(stat.S_IREAD | (stat.S_IEXEC if path.is_dir() else 0))
    before = {path: path.stat().st_mtime_ns for path in files}
    done = run_with_file_limit(resource.RLIM_INFINITY, *SHORT, "--epochs", 1, "--data", data, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")]} == before
    for path in files:
        path.chmod(0o755)


def test_one_missing_image_is_named(index, tmp_path):
    """Where the folder exists and one file is missing, the message names the file."""
    copies = []
    for path in index.paths:
        copy = tmp_path / "data" / os.path.relpath(path, os.path.commonpath(index.paths))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        copies.append(str(copy))
    moved = replace(index, paths=tuple(copies))
    os.unlink(copies[7])
    with pytest.raises(RunError, match=rf"cannot decode {copies[7]}: the file no longer exists; put it back"):
        run(tiny(epochs=1, data=DataConfig(train=(str(tmp_path / "data"),))), tmp_path / "run", moved)


def test_a_snapshot_copies_the_weights(index, tmp_path):
    """Later changes in place do not change the copies. The next snapshot reuses their memory."""
    model = Classifier("test_resnet", 3)
    optimizer = optim.sgd(model, tiny().optim)
    state = State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    snapshot = checkpoint.Snapshot().take(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    copies = snapshot.files["model.safetensors"]
    assert all(torch.equal(copies[name], tensor) for name, tensor in before.items())
    memory = {name: tensor.data_ptr() for name, tensor in copies.items()}
    snapshot.take(state)
    copies = snapshot.files["model.safetensors"]
    assert memory == {name: tensor.data_ptr() for name, tensor in copies.items()}
    assert all(torch.equal(copies[name], tensor) for name, tensor in model.state_dict().items())
