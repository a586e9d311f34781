"""scripts/ablation.py: its label noise, and a small ablation that is completed and then repeated."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "ablation.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_label_noise_is_symmetric_seeded_and_has_the_given_share(script):
    labels = np.repeat(np.arange(10), 2000)
    noisy = script["add_label_noise"](labels, 10, 0.4, seed=3)
    wrong = noisy != labels
    assert wrong.sum() == 8000
    assert stats.chisquare(np.bincount(labels[wrong], minlength=10)).pvalue > 1e-4  # the same number of every class
    assert stats.chisquare(np.bincount((noisy - labels)[wrong] % 10, minlength=10)[1:]).pvalue > 1e-4
    np.testing.assert_array_equal(noisy, script["add_label_noise"](labels, 10, 0.4, seed=3))
    assert (noisy != script["add_label_noise"](labels, 10, 0.4, seed=4)).any()
    np.testing.assert_array_equal(labels, script["add_label_noise"](labels, 10, 0.0, seed=3))


def test_label_noise_is_only_in_the_training_images(script, demo_set, tmp_path):
    """Every file exists once, under its name; a share of the training images is in another class's folder."""
    target = script["subset"](demo_set, tmp_path / "data", 4, 0.25, 1)
    moved = {}
    for split in ("train", "val"):
        files = [path for path in (target / split).rglob("*") if path.is_file()]
        folders = sorted(folder.name for folder in (demo_set / split).iterdir())[:4]
        expected = [f"{name}-{path.name}" for name in folders for path in (demo_set / split / name).iterdir()]
        assert sorted(path.name for path in files) == sorted(expected)
        moved[split] = sum(not path.name.startswith(f"{path.parent.name}-") for path in files) / len(files)
    assert moved == {"train": 0.25, "val": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["report", "attract_repulse"])
def test_a_small_ablation_writes_a_table_and_is_not_trained_twice(demo_set, tmp_path, method):
    command = [sys.executable, SCRIPT, "--data", demo_set, "--out", tmp_path / "out", "--method", method, "--arch"]
    command += ["test_resnet", "--classes", 4, "--image-size", 32, "--batch-size", 16, "--epochs", 5, "--seeds", 2]
    command += ["--label-noise", 0.4, "--json", tmp_path / "ablation.json"]
    for _ in range(2):
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=900)
        result = json.loads((tmp_path / "ablation.json").read_text())
        assert result["label_noise"] == 0.4 and all(len(row["scores"]) == 2 for row in result["rows"])
    logs = list((tmp_path / "out").glob("seed*/*/log.jsonl"))
    starts = [line for log in logs for line in log.read_text().splitlines() if '"event": "start"' in line]
    assert len(starts) == len(logs) > 0
