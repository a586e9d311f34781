"""scripts/soak.py: its functions, and a small soak with every fault."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "scripts" / "soak.py"
spec = importlib.util.spec_from_file_location("soak", SCRIPT)
assert spec and spec.loader
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def test_the_schedule_depends_on_the_seed_and_has_each_fault_once_per_span():
    plan = list(itertools.islice(soak.schedule(3, soak.KINDS, 100), 24))
    assert plan == list(itertools.islice(soak.schedule(3, soak.KINDS, 100), 24))
    assert plan != list(itertools.islice(soak.schedule(4, soak.KINDS, 100), 24))
    for span in range(3):
        part = plan[8 * span : 8 * span + 8]
        assert {kind for _, kind in part} == set(soak.KINDS) and part[-1][0] == 800 * (span + 1)
    assert [step for step, _ in plan] == sorted(step for step, _ in plan)


def log(*events: tuple[str, int]) -> str:
    return "".join(json.dumps({"event": event, "step": step}) + "\n" for event, step in events)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (log(("start", 0), ("train", 5), ("train", 10), ("checkpoint", 5), ("resume", 5), ("train", 10)), ""),
        (log(("start", 0), ("train", 5), ("stopped", 7), ("resume", 7), ("eval", 9), ("start", 0), ("train", 5)), ""),
        (log(("start", 0), ("train", 5), ("train", 5)), "line 3: train of step 5 after step 5"),
        (log(("start", 0), ("train", 5), ("eval", 4)), "line 3: eval of step 4"),
        (log(("start", 0), ("train", 5), ("resume", 9)), "line 3: resume at step 9"),
        (log(("train", 5)), "line 1: train of step 5"),
        (log(("start", 0)) + '{"event": "train", "st\n', "line 2 is not an event"),
        (log(("start", 0)) + "[1]\n", "line 2 is not an event"),
        (log(("start", 0)) + '{"event": "note"}', "the last line is incomplete"),
    ],
)
def test_problems_of_a_log(text, says):
    problems = soak.log_problems(text)
    assert len(problems) == bool(says) and says in "".join(problems)


def test_growth_is_fitted_to_the_longest_stretches_without_faults():
    """Two processes; the second one grows by 2 MiB per 1000 steps and has a fault at second 500."""
    rows = [
        {"time": t, "run": 1 + (t > 200), "step": 10 * t, "rss_mib": 500 + 0.02 * t * (t > 200) + 9 * (t == 201),
         "handles": 40, "threads": 7, "under_way": t != 201}
        for t in range(1000)
    ]  # fmt: skip
    faults = [{"time": 200.5, "until": 201.5}, {"time": 500, "until": 510}]
    parts = soak.stretches(rows, faults, 300)
    assert [(part[0]["step"], part[-1]["step"]) for part in parts] == [(5410, 9990), (2320, 4990), (300, 2000)]
    fits = soak.growth(parts[0])
    assert fits["rss_mib"]["per_1000_steps"] == 2 and fits["handles"]["per_1000_steps"] == 0 and fits["n"] == 459
    assert soak.growth(parts[2])["rss_mib"]["per_1000_steps"] == 0
    assert soak.stretches(rows[:5], [], 300) == []


BAD = """
import subprocess, sys
from pathlib import Path
child = subprocess.Popen(["sleep", "60"])
print("Traceback (most recent call last)\\nfasttrain: one\\nfasttrain: two", file=sys.stderr)
Path(r"HOME", "run").mkdir()
Path(r"HOME", "run", ".lock").touch()
sys.exit(3)
"""


def test_an_exit_that_breaks_every_promise_is_reported(tmp_path):
    args = Namespace(seed=0, minutes=0, patience=10, interval=0.1)
    bad = soak.Soak(args, [sys.executable, "-c", BAD.replace("HOME", str(tmp_path))], tmp_path, tmp_path / "data")
    bad.start()
    bad.fault = "SIGTERM"
    bad.stop(signal.SIGCONT)  # has no effect
    broken = "; ".join(bad.broken)
    for part in ("ended with 3 instead of 75", "left 1 processes", "a traceback", "printed 2 error lines",
                 "left its lock", "did not print 'stopped by SIGCONT'", "its log ends with {}"):  # fmt: skip
        assert part in broken
    assert not soak.session_processes(bad.process.pid)


def test_a_run_that_hangs_is_killed(tmp_path):
    args = Namespace(seed=0, minutes=0, patience=0.3, interval=0.1)
    slow = soak.Soak(args, ["sleep", "60"], tmp_path, tmp_path / "data")
    slow.start()
    slow.check_exit(0)
    assert slow.broken == ["start: did not end within 0.3 s"] and not soak.session_processes(slow.process.pid)
    assert slow.samples and slow.samples[0]["threads"] == 1 and slow.samples[0]["rss_mib"] > 0


def start(out: Path, *args: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--batch-size", "50", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.mark.slow
def test_a_run_survives_every_fault(demo_set, tmp_path):
    """The original images do not change."""
    before = {path: path.read_bytes() for path in demo_set.rglob("*.jpg")}
    figures, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    process = start(tmp_path / "soak", "--data", demo_set, "--steps", 200, "--json", figures, "--plot", plot)
    output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output
    result = json.loads(figures.read_text())
    assert result["faults"] == {kind: {"injected": 1, "survived": 1} for kind in soak.KINDS}, output
    assert result["steps"] == 200 and result["ended"] == "whole" and result["broken"] == []
    assert plot.stat().st_size > 10_000
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_the_run_is_bit_equal_to_one_without_faults_and_ctrl_c_loses_nothing(demo_set, tmp_path):
    args = ("--data", demo_set, "--steps", 100, "--compare", "--only", "SIGTERM", "--only", "SIGKILL",
            "--json", tmp_path / "soak.json")  # fmt: skip
    process = start(tmp_path / "soak", *args)
    log = tmp_path / "soak" / "run" / "log.jsonl"
    for _ in range(1200):
        if log.exists() and '"train"' in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["ended"] == "interrupted" and result["broken"] == [] and 0 < result["steps"] < 100
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [command for command in commands if str(tmp_path / "soak").encode() in command]
    process = start(tmp_path / "soak", *args)
    output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["bit_equal"] is True and result["steps"] == 100
    assert all(counts == {"injected": 1, "survived": 1} for counts in result["faults"].values())
