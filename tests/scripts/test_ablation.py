"""scripts/ablation.py: the label noise that it puts into a set, and that a small one runs to its table and goes on."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

SCRIPT = ROOT / "scripts" / "ablation.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_noise_is_symmetric_seeded_and_of_the_share_that_is_asked_for(script):
    labels = np.repeat(np.arange(10), 2000)
    found = script["noisy"](labels, 10, 0.4, seed=3)
    wrong = found != labels
    assert wrong.sum() == 8000
    assert stats.chisquare(np.bincount(labels[wrong], minlength=10)).pvalue > 1e-4  # of every class as many
    assert stats.chisquare(np.bincount((found - labels)[wrong] % 10, minlength=10)[1:]).pvalue > 1e-4
    np.testing.assert_array_equal(found, script["noisy"](labels, 10, 0.4, seed=3))
    assert (found != script["noisy"](labels, 10, 0.4, seed=4)).any()
    np.testing.assert_array_equal(labels, script["noisy"](labels, 10, 0.0, seed=3))


def test_noise_is_in_the_training_images_alone(script, demo_set, tmp_path):
    """Each file is there once, under its name; a share of those to train on is in another class's folder."""
    made = script["subset"](demo_set, tmp_path / "data", 4, 0.25, 1)
    moved = {}
    for split in ("train", "val"):
        files = [path for path in (made / split).rglob("*") if path.is_file()]
        folders = sorted(each.name for each in (demo_set / split).iterdir())[:4]
        whole = [f"{name}-{path.name}" for name in folders for path in (demo_set / split / name).iterdir()]
        assert sorted(path.name for path in files) == sorted(whole)
        moved[split] = sum(not path.name.startswith(f"{path.parent.name}-") for path in files) / len(files)
    assert moved == {"train": 0.25, "val": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["report", "attract_repulse"])
def test_a_small_one_ends_with_a_table_and_is_not_trained_twice(demo_set, tmp_path, method):
    command = [sys.executable, SCRIPT, "--data", demo_set, "--out", tmp_path / "out", "--method", method, "--arch"]
    command += ["test_resnet", "--classes", 4, "--image-size", 32, "--batch-size", 16, "--epochs", 5, "--seeds", 2]
    command += ["--label-noise", 0.4, "--json", tmp_path / "told.json"]
    for _ in range(2):
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=900)
        told = json.loads((tmp_path / "told.json").read_text())
        assert told["label_noise"] == 0.4 and all(len(row["top1"]) == 2 for row in told["rows"])
    logs = list((tmp_path / "out").glob("seed*/*/log.jsonl"))
    starts = [line for log in logs for line in log.read_text().splitlines() if '"event": "start"' in line]
    assert len(starts) == len(logs) > 0
