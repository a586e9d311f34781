"""Validation and checkpoints: what is best if validation images come, go or change, and evaluations that fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import call, events, part_of, run, tiny

from fasttrain.checkpoints import checkpoint, meta
from fasttrain.config.schema import CheckpointConfig
from fasttrain.data.scan import scan
from fasttrain.utils.errors import RunError

RECIPE = tiny(epochs=1, checkpoint=CheckpointConfig(keep=1))
LONGER = replace(RECIPE, epochs=3)


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 4)


@pytest.fixture
def val(demo_set, tmp_path):
    """30 of the demo set's validation images, in a folder of its own."""
    for path in sorted((demo_set / "val").glob("*/02[0-2].jpg")) or sorted((demo_set / "val").glob("*/*.jpg"))[::8]:
        copy = tmp_path / "val" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return tmp_path / "val"


def notes(out: Path) -> list[str]:
    return [event["text"] for event in events(out) if event["event"] == "note"]


def test_a_scored_best_is_not_replaced_by_a_checkpoint_without_scores(index, val, tmp_path):
    out = tmp_path / "run"
    allow = replace(LONGER, resume=replace(LONGER.resume, allow=("epochs",)))
    best = run(RECIPE, out, index, scan(val)).best
    folder = checkpoint.find(out / "best")
    assert run(allow, out, index).best == best
    assert checkpoint.find(out / "best") == folder != checkpoint.find(out / "last")
    assert meta.read(folder)["scores"]["top1"] == best
    assert any(
        f"no longer has validation images; `best` stays the checkpoint with top-1 {best:.2%}" in n for n in notes(out)
    )


def test_scores_over_different_images_are_not_compared(index, val, tmp_path, monkeypatch):
    out = tmp_path / "run"
    allow = replace(LONGER, resume=replace(LONGER.resume, allow=("epochs",)))
    run(RECIPE, out, index, scan(val))
    folder = checkpoint.find(out / "last")
    content = meta.read(folder) | {"best": 2.0}  # higher than any score
    meta.write(folder, content)
    next(val.glob("*/*.jpg")).unlink()
    result = run(allow, out, index, scan(val))
    assert result.best is not None and result.best <= 1 and checkpoint.find(out / "best") != folder
    assert "the validation images differ from before: earlier scores do not count, and `best` is chosen again" in notes(
        out
    )


def test_validation_may_start_later(index, val, tmp_path):
    out = tmp_path / "run"
    allow = replace(LONGER, resume=replace(LONGER.resume, allow=("epochs",)))
    assert run(RECIPE, out, index).best is None
    assert run(allow, out, index, scan(val)).best is not None
    assert "this run has validation images from now on; `best` is chosen by their top-1" in notes(out)


def test_a_failed_evaluation_loses_no_training(index, val, tmp_path):
    """The epoch is saved before the error ends the run; the same command resumes after it."""
    out, val_index = tmp_path / "run", scan(val)
    victim = Path(val_index.paths[7])
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 3])
    with pytest.raises(RunError, match=f"cannot decode {victim}"):
        run(RECIPE, out, index, val_index)
    assert meta.read(checkpoint.find(out / "last"))["step"] == 2
    victim.write_bytes(content)
    assert run(replace(LONGER, resume=replace(LONGER.resume, allow=("epochs",))), out, index, val_index).steps == 6
    assert [event["step"] for event in events(out) if event["event"] == "resume"] == [2]
    assert not [event for event in events(out) if event["event"] == "eval" and event["step"] == 2]


@pytest.mark.slow
def test_a_failed_evaluation_of_one_rank_loses_no_training(demo_set, val, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo_set / "train", data / "train")
    shutil.move(val, data / "val")
    call("run", "--arch", "test_resnet", "--data", data, "--dry-run")  # scans the headers
    victim = sorted((data / "val").glob("*/*.jpg"))[-1]  # in the last rank's share
    content = victim.read_bytes()
    victim.write_bytes(content[:-200])
    os.utime(victim, ns=(victim.stat().st_atime_ns, victim.stat().st_mtime_ns))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fasttrain"]
    command += ["run", "--arch", "test_resnet", "--image-size", "32", "--batch-size", "50", "--epochs", "1", "--device"]
    command += ["cpu", "--data", str(data), "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert done.returncode and len(lines) == 1 and f"cannot decode {victim}" in lines[0], done.stderr
    assert meta.read(checkpoint.find(tmp_path / "run" / "last"))["step"] == 10
