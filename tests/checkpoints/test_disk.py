"""Disks that fill up, go away or come back: what is on them stays whole, and each is told in one line."""

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
    """60 images: three steps an epoch of 20."""
    return part_of(demo_set, 6)


# ---- a full disk


def limited(limit: int, *args: object) -> subprocess.CompletedProcess:
    """`fasttrain run` where no file may grow beyond so many bytes, as on a disk that is full."""
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


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(demo_set, tmp_path):
    """The second run cannot write more than 100 kB into a file; after it the disk has room again."""
    args = (*SHORT, "--data", demo_set / "train", "--out", tmp_path / "run")
    call("run", "--device", "cpu", *args, "--epochs", 3, *EVERY_FIVE)
    out = tmp_path / "run"
    shutil.copytree(out, tmp_path / "whole", symlinks=True)
    for name in ("step-00000030", "step-00000025"):  # as if it had ended at 20
        shutil.rmtree(out / "checkpoints" / name)
    (out / "last").unlink()
    (out / "last").symlink_to("checkpoints/step-00000020")
    done = limited(100_000, *args, "--epochs", 3, *EVERY_FIVE)
    said = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said[-1].startswith("fasttrain: cannot write a checkpoint to")
    assert said[-1].endswith("the one before is intact")
    assert checkpoint.load(out / "last").meta["step"] == 20
    call("run", "--device", "cpu", *args, "--epochs", 3, *EVERY_FIVE)
    same(out, tmp_path / "whole")


def test_a_full_disk_may_be_trained_past(index, tmp_path, monkeypatch, capsys):
    """Saves fail after the first epoch until before the last: the run goes on, and the last one has to succeed."""
    recipe = tiny(epochs=4, checkpoint=CheckpointConfig(on_error="go_on"))
    run(recipe, tmp_path / "whole", index, index)
    honest, full = checkpoint.save_file, [0]

    def save_file(tensors, path):
        full[0] += 1
        if 2 < full[0] < 5:  # the first file of each of two checkpoints
            raise OSError(28, "No space left on device")
        honest(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    run(recipe, tmp_path / "run", index, index)
    log = events(tmp_path / "run")
    assert len([each for each in log if each["event"] == "save_failed"]) == 2
    assert [each["step"] for each in log if each["event"] == "checkpoint"] == [3, 12]
    assert capsys.readouterr().err.count("training continues, because checkpoint.on_error is go_on") == 2
    same(tmp_path / "run", tmp_path / "whole")

    def never(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", never)
    with pytest.raises(RunError, match=r"cannot write a checkpoint to .*No space left.*the one before is intact"):
        run(recipe, tmp_path / "last", index, index)


@pytest.mark.parametrize("tolerant", [False, True])
def test_a_log_that_cannot_grow(tmp_path, capsys, tolerant):
    """A line that is torn by the end of the disk stands alone; later ones are whole again. Tried in a process of its
    own, since the limit stays."""
    program = f"""
import resource, sys
from pathlib import Path
import torch
from fasttrain.distributed.ranks import Ranks
from fasttrain.utils.errors import RunError
from fasttrain.models import Classifier
from fasttrain.training.log import Log
log = Log(Path({str(tmp_path)!r}), Ranks(0, 1, 0, 1, torch.device("cpu")), start_step=0, steps=9, batch_size=1,
          tolerant={tolerant})
log.board = None
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


@pytest.mark.parametrize("seen", ["at once", "at the next save"])
@pytest.mark.parametrize(
    ("tops", "fails", "best"),
    [
        ([0.1, 0.9, 0.5, 0.4], 2, 0.5),
        ([0.1, 0.9, 0.5, 0.6], 3, 0.9),  # one that was not the best
        ([0.1, 0.5, 0.9, 0.6], 2, 0.9),
    ],
)
def test_the_best_is_what_is_on_disk(index, tmp_path, monkeypatch, seen, tops, fails, best):
    """A checkpoint could not be written: the best one is the best of the others."""
    left = iter(tops)
    monkeypatch.setattr(training, "evaluate", lambda *args: training.Scores(next(left), 1.0, 60))
    honest, files = checkpoint.save_file, [0]

    def save_file(tensors, path):
        files[0] += 1
        if files[0] == 2 * fails - 1:
            files[0] += 1  # the other file of this checkpoint
            raise OSError(28, "No space left on device")
        honest(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(Saver, "poll", Saver.finish if seen == "at once" else lambda self: None)
    result = run(tiny(epochs=4, checkpoint=CheckpointConfig(on_error="go_on", keep=9)), tmp_path / "run", index, index)
    assert result.best == best and checkpoint.load(tmp_path / "run" / "best").meta["scores"]["top1"] == best
    assert checkpoint.load(tmp_path / "run" / "last").meta["best"] == best


def test_a_disk_without_links(index, tmp_path, monkeypatch):
    """`last` and `best` are files of one line then; all else is the same, also going on."""

    def symlink(*args, **settings):
        raise OSError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", symlink)
        patch.setattr(os, "link", symlink)
        recipe = tiny(epochs=2, checkpoint=CheckpointConfig(keep=1))
        run(recipe, tmp_path / "run", index, index)
        assert (tmp_path / "run" / "last").read_text() == "checkpoints/step-00000006\n"
        assert checkpoint.find(tmp_path / "run" / "last").name == "step-00000006"
        assert checkpoint.find(tmp_path / "run").name == checkpoint.read_link(tmp_path / "run" / "best").name
        assert run(recipe, tmp_path / "run", index, index).steps == 6
        kept = {each.name for each in (tmp_path / "run" / "checkpoints").iterdir()}
        assert kept == {"step-00000006", checkpoint.find(tmp_path / "run").name}


def test_a_disk_that_answers_with_errors_is_trained_past(index, tmp_path, monkeypatch):
    """Not even names can be looked up any more, until before the last save."""
    honest, calls = checkpoint._free_name, [0]

    def free_name(*args):
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(5, "Input/output error")
        return honest(*args)

    monkeypatch.setattr(checkpoint, "_free_name", free_name)
    run(tiny(epochs=2, checkpoint=CheckpointConfig(on_error="go_on")), tmp_path / "run", index)
    assert [each["event"] for each in events(tmp_path / "run") if "save" in each["event"]] == ["save_failed"]


# ---- saving beside the training


def test_the_loop_does_not_wait_for_the_disk(index, tmp_path, monkeypatch):
    """While a write hangs, steps go on; what is written is the state of its step, though weights have moved on."""
    recipe = tiny(epochs=2)
    run(recipe, tmp_path / "whole", index)
    steps: list[int] = []
    written, honest = threading.Event(), checkpoint.save_file
    advance = Log.advance

    def slow(tensors, path):
        while len(steps) < 5 and not written.is_set():  # two steps after the first save, which comes after the third
            time.sleep(0.01)
        written.set()
        honest(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Log, "advance", lambda log: (steps.append(1), advance(log)))
    run(recipe, tmp_path / "run", index)
    assert written.is_set()
    for name in ("step-00000003", "step-00000006"):
        ours, theirs = (checkpoint.load(tmp_path / each / "checkpoints" / name) for each in ("run", "whole"))
        for one, other in ((ours.model, theirs.model), (ours.train, theirs.train)):
            assert one.keys() == other.keys() and all(torch.equal(each, other[key]) for key, each in one.items())
    kept = [each for each in events(tmp_path / "run") if each["event"] == "checkpoint"]
    assert all(each["held_s"] >= 0 and each["write_s"] > 0 for each in kept) and len(kept) == 2


def test_what_is_saved_is_of_its_step(index, tmp_path, monkeypatch):
    """The values of the epoch so far, which go on changing while a thread writes them."""
    recipe = tiny(epochs=2, checkpoint=CheckpointConfig(every_steps=2, keep=9))
    recipe = replace(recipe, machine=replace(recipe.machine, log_steps=1))
    steps: list[int] = []
    honest, advance = checkpoint.save_file, Log.advance

    def slow(tensors, path):
        until = time.monotonic() + 2
        while len(steps) < 6 and time.monotonic() < until:
            time.sleep(0.01)
        honest(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Log, "advance", lambda log: (steps.append(1), advance(log)))
    run(recipe, tmp_path / "run", index)
    logged = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000002").meta["logged"]
    told = [each["terms"]["cross_entropy"] for each in events(tmp_path / "run") if each["event"] == "train"]
    assert logged == {"cross_entropy": told[:2]}


def test_ctrl_c_while_a_checkpoint_is_being_written(index, tmp_path, monkeypatch):
    """It is written to its end, and logged, before the run ends."""
    honest, began = checkpoint.save_file, threading.Event()

    def slow(tensors, path):
        began.set()
        time.sleep(1.5)
        honest(tensors, path)

    wait = Saver._wait

    def interrupted(self):
        assert began.wait(20)
        monkeypatch.setattr(Saver, "_wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Saver, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(epochs=2), tmp_path / "run", index)
    written = [each for each in events(tmp_path / "run") if each["event"] == "checkpoint"]
    assert [each["path"] for each in written] == ["checkpoints/step-00000003"]
    checkpoint.verify(tmp_path / "run" / "last")


def test_no_thread_is_left(index, tmp_path, monkeypatch):
    """Not after a run, nor after one that failed while a checkpoint was being written."""
    before = set(threading.enumerate())
    run(tiny(epochs=1), tmp_path / "run", index)
    honest = Saver.save

    def save(*args, **settings):
        honest(*args, **settings)
        raise ZeroDivisionError

    monkeypatch.setattr(Saver, "save", save)
    with pytest.raises(ZeroDivisionError):
        run(tiny(epochs=1), tmp_path / "failed", index)
    assert {each for each in threading.enumerate() if each.name in ("saver", "watch")} <= before
    checkpoint.verify(tmp_path / "failed" / "last")
    assert [each["step"] for each in events(tmp_path / "failed") if each["event"] == "checkpoint"] == [3]


# ---- data that goes away


@pytest.mark.parametrize("on_bad", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_images_that_have_gone_end_the_run_in_a_line(demo_set, tmp_path, on_bad):
    """The folder is renamed while the run is under way, and back; the same command goes on."""
    shutil.copytree(demo_set / "train", tmp_path / "data")
    args = (*LONG, "--data", tmp_path / "data", "--out", tmp_path / "run", "--on-bad", on_bad)
    first = start_run(*args)
    await_line(first, "epoch 1")
    (tmp_path / "data").rename(tmp_path / "gone")
    _, said = first.communicate(timeout=100)
    last = said.splitlines()[-1]
    assert first.returncode == 1 and "Traceback" not in said
    assert last.startswith(f"fasttrain: {tmp_path / 'data'}/") and "is no longer there" in last
    assert "skipping" not in said
    (tmp_path / "gone").rename(tmp_path / "data")
    second = start_run(*args)
    await_line(second, " of 4000")
    second.kill()
    second.communicate()
    assert [each["event"] for each in events(tmp_path / "run") if each["event"] in ("start", "resume")] == [
        "start",
        "resume",
    ]


def test_nothing_is_written_beside_the_images(demo_set, tmp_path):
    """A mount that may only be read is enough. (For a superuser, who may write all the same, times must not change.)"""
    data = tmp_path / "data"
    shutil.copytree(demo_set / "train", data)
    files = [data, *data.rglob("*")]
    for each in files:
        each.chmod(stat.S_IREAD | (stat.S_IEXEC if each.is_dir() else 0))
    before = {each: each.stat().st_mtime_ns for each in files}
    done = limited(resource.RLIM_INFINITY, *SHORT, "--epochs", 1, "--data", data, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert {each: each.stat().st_mtime_ns for each in [data, *data.rglob("*")]} == before
    for each in files:
        each.chmod(0o755)


def test_images_of_which_one_is_gone_are_told_apart_from_all(index, tmp_path):
    """One missing file in a folder that is there is named itself."""
    copies = []
    for path in index.paths:
        copy = tmp_path / "data" / os.path.relpath(path, os.path.commonpath(index.paths))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        copies.append(str(copy))
    moved = replace(index, paths=tuple(copies))
    os.unlink(copies[7])
    with pytest.raises(RunError, match=rf"cannot decode {copies[7]}: it cannot be read \(No such file"):
        run(tiny(epochs=1, data=DataConfig(train=(str(tmp_path / "data"),))), tmp_path / "run", moved)


def test_weights_are_there_after_a_save_of_a_moved_model(index, tmp_path):
    """The copies are of the values at the time, also for tensors that later change in place."""
    model = Classifier("test_resnet", 3)
    optimizer = optim.sgd(model, tiny().optim)
    state = State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    snapshot = checkpoint.Snapshot().take(state)
    kept = {name: each.clone() for name, each in model.state_dict().items()}
    with torch.no_grad():
        for each in model.parameters():
            each.add_(1)
    assert all(torch.equal(snapshot.files["model.safetensors"][name], each) for name, each in kept.items())
    memory = {name: each.data_ptr() for name, each in snapshot.files["model.safetensors"].items()}
    snapshot.take(state)
    assert memory == {name: each.data_ptr() for name, each in snapshot.files["model.safetensors"].items()}
    assert all(torch.equal(snapshot.files["model.safetensors"][n], e) for n, e in model.state_dict().items())
