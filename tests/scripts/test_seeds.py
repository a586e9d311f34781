"""scripts/seeds.py: arms with several seeds, their paired gains, and a second call that trains nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

pytestmark = pytest.mark.slow


def test_arms_are_compared_by_seed_and_trained_once(demo_set, tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts" / "seeds.py",
        "--out",
        tmp_path / "out",
        "--seeds",
        2,
        "--title",
        "demo",
    ]
    command += ["--score", "balanced_accuracy", "--json", tmp_path / "seeds.json", "--plot", tmp_path / "seeds.png"]
    command += ["--arm", "plain", "", "--arm", "ema", "--set ema.decay=0.9 --set mix.cutmix=0", "--"]
    command += ["--arch", "test_resnet", "--data", demo_set, "--image-size", 32, "--batch-size", 50, "--epochs", 2]
    for _ in range(2):
        subprocess.run([*map(str, command), "--device", "cpu"], check=True, capture_output=True, timeout=600)
    result = json.loads((tmp_path / "seeds.json").read_text())
    plain, ema = result["rows"]
    assert result["score"] == "balanced_accuracy" and result["seeds"] == [0, 1] and result["title"] == "demo"
    for row, key in ((plain, None), (ema, "ema")):
        for seed, score in enumerate(row["scores"]):
            log = tmp_path / "out" / row["title"] / f"seed{seed}" / "log.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            assert sum(line["event"] == "start" for line in lines) == 1
            last = [line for line in lines if line["event"] == "eval"][-1]
            assert score == (last[key] if key else last)["balanced_accuracy"]
    gain = np.array(ema["scores"]) - plain["scores"]
    low, high = stats.t.interval(0.95, 1, gain.mean(), stats.sem(gain))
    assert ema["gain"] == pytest.approx(gain.mean()) and ema["gain_interval"] == pytest.approx((high - low) / 2)
    assert (tmp_path / "seeds.png").stat().st_size > 1000
