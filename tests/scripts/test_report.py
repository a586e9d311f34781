"""scripts/report.sh end to end at a tiny size: seven runs, their views, the ensemble, a submission and its score."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from fasttrain import recipes
from fasttrain.evaluation import predictions

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "report.sh"


def report(*args: object) -> subprocess.CompletedProcess:
    # The network is tiny: most of the time is start-up on one core.
    env = {**os.environ, "FASTTRAIN": str(Path(sys.executable).with_name("fasttrain")), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(SCRIPT), *map(str, args)], capture_output=True, text=True, env=env, timeout=540)


def test_its_models_are_those_of_the_ensemble():
    lines = SCRIPT.read_text().split('models="\n')[1].split('"')[0].splitlines()
    table = dict(line.split() for line in lines)
    assert sorted(table) == sorted(recipes.ENSEMBLE)
    for name, start in table.items():
        recipe = recipes.by_name(name)
        needs = any(loss.fine_tunes for loss in recipe.losses)
        assert start == (recipes.for_arch(recipe.arch).name if needs else "-")
    order = list(table)
    assert all(start == "-" or order.index(start) < order.index(name) for name, start in table.items())


@pytest.fixture(scope="module")
def data(demo_set, tmp_path_factory):
    """A small set in the challenge's layout: 20 and 5 images per class, and 30 test images with labels."""
    folder = tmp_path_factory.mktemp("challenge") / "data"
    labels: list[str] = []
    for number, cls in enumerate(sorted(path.name for path in (demo_set / "train").iterdir())):
        for split, count in (("train", 20), ("val", 5)):
            (folder / split / cls).mkdir(parents=True)
            for path in sorted((demo_set / split / cls).iterdir())[:count]:
                shutil.copy(path, folder / split / cls)
        (folder / "test" / "imgs").mkdir(parents=True, exist_ok=True)
        for path in sorted((demo_set / "val" / cls).iterdir())[-3:]:
            shutil.copy(path, folder / "test" / "imgs" / f"img_{len(labels)}.JPEG")
            labels.append(f"img_{len(labels)}.JPEG,{number}")
    (folder / "test" / "labels.csv").write_text("Image IDs,Labels\n" + "\n".join(labels) + "\n")
    return folder


@pytest.mark.slow
def test_the_full_report_runs_and_resumes(data, tmp_path):
    out = tmp_path / "out"
    done = report("--smoke", data, out)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout.splitlines()[-1] and "of 30 images" in done.stdout.splitlines()[-1]
    for name in recipes.ENSEMBLE:
        log = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        assert log[-1]["event"] == "end"
        assert (out / name / "val.npz").exists()
        inits = [event for event in log if event["event"] == "note" and event["text"].startswith("init: ")]
        assert len(inits) == (1 if "+" in name else 0)
    fused, test = predictions.load(out / "val.npz"), predictions.load(out / "test.npz")
    assert fused.probs.shape == (50, 10) and test.probs.shape == (30, 10) and test.labels is None
    rows = (out / "submission.csv").read_text().splitlines()
    assert rows[0] == "Image IDs,Predictions" and len(rows) == 31

    # Repeat it without one model's probabilities: only these are computed again, and the other files stay.
    victim = out / recipes.ENSEMBLE[3]
    (victim / "val.npz").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz") if path.parent != out}
    again = report("--smoke", data, out)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert (victim / "val.npz").exists()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "usage:"),
        (("--fast", "a", "b"), "unknown option --fast"),
        (("nowhere", "out"), "folder nowhere/train does not exist"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(args, says):
    done = report(*args)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["torchrun_one_node.sh", "torchrun_nodes.sh"])
def test_launchers_report_that_there_is_no_gpu(tmp_path, script):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "1", "NODE_RANK": "0", "MASTER": "localhost"}
    done = subprocess.run(["bash", str(SCRIPT.with_name(script))], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1 and "no GPU found; set GPUS" in done.stderr
